"""Dropout whose mask is a seed: a hash of the seed and of an entry's number says if the entry is dropped.

Nothing but the seed is kept for the backward pass, and random numbers, which are what dropout costs on a CPU, are not
drawn. A backend's functions and the reference here drop the very same entries (`keep_mask` in csrc/numbers.h).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llm_adapters.ops.backends import function
from llm_adapters.ops.hashing import hash32

_SEEDS = 256  # drawn at once

_drawn = threading.local()  # seeds by device, while they are drawn together


@contextlib.contextmanager
def seeds_drawn_together() -> Iterator[None]:
    """Have torch draw the seeds of all that is inside in one call: a call for each costs a GPU's host as much as a
    layer's product does.

    Not for a forward pass that is computed again in the backward pass: there, each draw has to be one of torch's own.
    """
    before = getattr(_drawn, "seeds", None)
    _drawn.seeds = {}
    try:
        yield
    finally:
        _drawn.seeds = before


def sample_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """A seed, int64 without dimensions, which says which entries of `x` are dropped, each with probability `p`.

    It comes from torch's own random state on the device of `x`, so that seeds, resuming and recomputation work as with
    torch's dropout, and stays on that device.

    Raises:
        ValueError: `p` is no probability above 0 and below 1, or `x` has more entries than the hash tells apart.
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p}: a probability above 0 and below 1 is needed")
    if x.numel() > 2**32:
        raise ValueError(f"a tensor of {x.numel()} entries: dropout takes up to 2^32, use smaller batches")
    seeds = getattr(_drawn, "seeds", None)
    if seeds is None:
        return torch.randint(2**63 - 1, (), device=x.device)
    left = seeds.setdefault(x.device, [])
    if not left:
        # Every second number: Triton compiles a function again for an address that is no multiple of 16.
        left += torch.randint(2**63 - 1, (_SEEDS, 2), device=x.device)[:, 0].unbind()
    return left.pop()


def threshold(p: float) -> int:
    """The number of 32 bits below which a hash means that an entry is dropped."""
    return min(round(p * 2**32), 2**32 - 1)


def keep_mask(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """True for the entries of `x` that are kept, bool, the shape of `x`.

    The hash is `hash32` of the entry's number; its 32 bits are compared as a number without sign.
    """
    numbers = torch.arange(x.numel(), device=x.device).to(torch.int32)  # beyond 2^31 they go on below 0
    bits = hash32(numbers, seed).bitwise_xor_(-(2**31))
    return (bits >= threshold(p) - 2**31).view(x.shape)


def apply(x: torch.Tensor, seed: torch.Tensor, p: float, scale: float = 1.0) -> torch.Tensor:
    """``scale * x`` with the entries set to zero that `seed` drops; a new tensor."""
    if kernel := function("dropout", x):
        return kernel(x, seed, p, scale)
    return (x * scale).masked_fill_(~keep_mask(x, seed, p), 0)


def add_(out: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, p: float) -> None:
    """Add to `out`, in place, the entries of `x`, of the same shape, that `seed` does not drop."""
    if kernel := function("dropout_add_", out):
        kernel(out, x, seed, p)
    else:
        out.add_(x.masked_fill(~keep_mask(x, seed, p), 0))


class _SparseDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        seed = sample_mask(x, p)
        ctx.save_for_backward(seed)
        ctx.p = p
        return apply(x, seed, p, 1.0 / (1.0 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (seed,) = ctx.saved_tensors
        return apply(gradients[0], seed, ctx.p, 1.0 / (1.0 - ctx.p)), None


def sparse_dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout of `x`, any shape, each entry with probability `p`, and what is kept times ``1 / (1 - p)``."""
    return _SparseDropout.apply(x, p)
