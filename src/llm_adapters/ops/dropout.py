"""Dropout whose random numbers cost little: they are what dropout costs on a CPU.

With kernels, a hash of a seed and of an entry's number says whether it is dropped, and nothing but the seed is kept.
Without, one random number is drawn per dropped entry, not one per entry: the gaps between the dropped entries of
independent draws are geometrically distributed, so drawing the gaps gives exactly the same noise for a twentieth of the
numbers at p = 0.05.
"""

import math

import torch

from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.cpu.allocator import empty


def drawn(x: torch.Tensor, p: float) -> torch.Tensor:
    """Which entries of `x` are dropped, each with probability `p` independently, as the functions below take it.

    A seed (no dimension), or the dropped ones' indices (one dimension). Draws from torch's own random state, so that
    seeds, resuming and recomputation work as with torch's dropout.
    """
    if kernels.of(x) is None or x.numel() >= 2**32:  # the hash is of 32 bits
        return dropped(x.numel(), p, x.device)
    _checked(p)
    return torch.randint(2**63 - 1, ())


def drop(x: torch.Tensor, mask: torch.Tensor, p: float, scale: float = 1.0) -> torch.Tensor:
    """``scale * x`` with the entries that are `drawn` set to zero; a new tensor."""
    if mask.dim():
        return blank(x * scale, mask)
    x = x.contiguous()
    out = empty(x, *x.shape)
    _kernels(x).call("drop", x, out, x.numel(), int(mask), threshold(p), scale)
    return out


def add(out: torch.Tensor, x: torch.Tensor, mask: torch.Tensor, p: float) -> None:
    """Add to `out`, in place, the entries of `x` that are not `drawn`; `x` may be written to."""
    if mask.dim():
        out += blank(x, mask)
    else:
        _kernels(x).call("add_dropped", out, x, x.numel(), int(mask), threshold(p))


def threshold(p: float) -> int:
    """The hashes below it mean that an entry is dropped."""
    return min(round(p * 2**32), 2**32 - 1)


def _kernels(x: torch.Tensor) -> kernels.Kernels:
    found = kernels.of(x)
    assert found is not None, "the mask was drawn for kernels"
    return found


def _checked(p: float) -> None:
    if not 0 < p < 1:
        raise ValueError(f"p is {p}: a probability above 0 and below 1 is needed")


def dropped(count: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Indices of the dropped ones of `count` entries, each dropped with probability `p` independently; ascending int32.

    int32, as they are kept until the backward pass (int64 from 2^31 entries on).
    """
    _checked(p)
    pieces: list[torch.Tensor] = []
    start = 0
    while start < count:
        expected = (count - start) * p
        draws = int(expected + 4 * math.sqrt(expected)) + 8
        uniform = 1.0 - torch.rand(draws, dtype=torch.float64, device=device)  # (0, 1], so that the log is finite
        gaps = (uniform.log_() / math.log1p(-p)).floor_().to(torch.int64)
        found = start + (gaps + 1).cumsum(0) - 1
        pieces.append(found)
        start = int(found[-1]) + 1
    found = torch.cat(pieces)
    found = found[: int(torch.searchsorted(found, count))]
    return found.to(torch.int32) if count < 2**31 else found


def blank(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`values` with the entries at the flat `indices` set to zero, in place."""
    values.view(-1).index_fill_(0, indices.long(), 0)
    return values


def sparse_dropout(x, p):
    from llm_adapters.fast_paths.layers import CheapDropout

    return CheapDropout.apply(x, p)
