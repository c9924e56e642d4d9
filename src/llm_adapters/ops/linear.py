"""Products of many rows with frozen weights, a LoRA's beside them in the same pass, and the gradients of its matrices.

With kernels where the processor multiplies pairs of bfloat16; elsewhere with torch's functions.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llm_adapters.ops import dropout
from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.cpu.allocator import empty

NOWHERE, BEFORE, AFTER = range(3)  # where a LoRA's dropout acts, as in csrc/products.c
_FEWEST = 64  # rows for which it is worth laying out a weight
_WIDEST = 12288  # beyond, a piece of the weight is in no cache, and too much for a thread's stack


class Added(NamedTuple):
    """A LoRA beside a product: ``x down up``, x dropped before or the result after.

    Args:
        down: (in, rank), of any precision, and a factor.
        up: (rank, width), likewise.
        mask: what is dropped, as `dropout.drawn` gives it; None for nothing.
        p: with what probability.
        at: `BEFORE` or `AFTER`.
    """

    down: tuple[torch.Tensor, float]
    up: tuple[torch.Tensor, float]
    mask: torch.Tensor | None
    p: float
    at: int


def _seed(mask: torch.Tensor | None, p: float, at: int) -> tuple[int, int, int]:
    return (0, 0, NOWHERE) if mask is None else (int(mask), dropout.threshold(p), at)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x weight + bias``, (rows, width).

    Args:
        x: (rows, in).
        weight: (in, width), a matrix in one piece or the transpose of one.
        bias: (width,) or None.
        out: where to write it; None for a new tensor.
    """
    out = empty(x, len(x), weight.shape[1]) if out is None else out
    _check(x, weight, bias, out)
    if kernel := _kernel(x, *weight.shape):
        _by(kernel, x, weight, bias, out, (None, None, None, 0), (0, 0, NOWHERE))
        return out
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)


def product_with(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, added: Added
) -> tuple[torch.Tensor, torch.Tensor]:
    """`product` with what is `added`, and what is between its two matrices, in the precision of x.

    The latter is (rows, rank), or wider, with zeros, where the kernels want that.
    """
    kernel, (down, up, mask, p, at) = _kernel(x, *weight.shape), added
    if (len(down[0]), up[0].shape[1]) != weight.shape or down[0].shape[1] != len(up[0]):
        raise ValueError(f"a LoRA of {_shapes(down[0], up[0])} beside a weight of {_shapes(weight)}")
    _check(x, weight, bias)
    if kernel and (mask is None or not mask.dim()) and down[0].dtype == up[0].dtype == torch.float32:
        rows, width, rank = len(x), weight.shape[1], up[0].shape[0]
        out, middle = empty(x, rows, width), empty(x, -(-rows // kernel.strip) * kernel.strip, whole(rank))
        pairs = [paired(*part, x.new_empty(*map(whole, part[0].shape))) for part in (down, up)]
        _by(kernel, x, weight, bias, out, (*pairs, middle, whole(rank)), _seed(mask, p, at))
        return out, middle[:rows]
    out = functional.linear(x, weight.t(), bias)
    first, second = ((part * factor).to(x.dtype) for part, factor in (down, up))
    middle = (x if mask is None or at == AFTER else dropout.drop(x, mask, p)) @ first
    if mask is None or at == BEFORE:
        return out.addmm_(middle, second), middle
    dropout.add(out, middle @ second, mask, p)
    return out, middle


def _by(
    kernel: kernels.Kernels,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lora: tuple[Any, ...],
    seed: tuple[int, int, int],
) -> None:
    """The kernel's product; `lora`: both matrices, what is between them, and its width."""
    across = not weight.is_contiguous()
    matrix = (weight.t() if across else weight).contiguous()
    *tensors, rank = lora
    kernel.call("product", x.contiguous(), matrix, bias, out, *tensors, len(x), *weight.shape, rank, across, *seed)


def outer(
    left: torch.Tensor,
    x: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """``scale * left^T x``, with the entries of `x` dropped that `mask` says.

    Args:
        left: (rows, rank).
        x: (rows, width).
        scale: a factor.
        mask: as `dropout.drawn` gives it; None for nothing.
        p: with what probability.

    Returns:
        (rank, width), float32.
    """
    (rows, rank), width = left.shape, x.shape[1]
    if len(x) != rows:
        raise ValueError(f"an outer product of {_shapes(left, x)}: their rows are not as many")
    kernel = _kernel(x, rank, width)
    if kernel is None or not (mask is None or not mask.dim()):
        seen = x if mask is None else dropout.drop(x, mask, p)
        return (left.t() @ seen).to(torch.float32).mul_(scale)
    out, pairs = x.new_empty(rank, width, dtype=torch.float32), x.new_empty((rows + 1) // 2 * 2 * rank)
    sizes = rows, rank, width
    kernel.call("outer", left.contiguous(), x.contiguous(), pairs, out, *sizes, *_seed(mask, p, BEFORE), scale)
    return out


def _kernel(x: torch.Tensor, into: int, width: int) -> kernels.Kernels | None:
    """The kernels, if they have products and these sizes are theirs."""
    kernel = kernels.of(x)
    if kernel is None or not kernel.strip or len(x) < _FEWEST or into > _WIDEST or into % 32 or width % 32:
        return None
    return kernel


def shaped(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`out` (rows, width), a tensor of its own, with the dimensions of `like` but the last.

    Not a view, as what a custom function returns may be changed in place (OLMo clamps its queries) only if it is none.
    """
    return out.resize_(*like.shape[:-1], out.shape[-1])


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> None:
    """A kernel would read and write beyond the end of what does not fit."""
    (rows, into), width = x.shape, weight.shape[1]
    wrong = into != len(weight) or (bias is not None and bias.shape != (width,))
    if wrong or (out is not None and out.shape != (rows, width)):
        raise ValueError(f"a product of {_shapes(x, weight)} with a bias of {_shapes(bias)} for {_shapes(out)}")


def _shapes(*tensors: torch.Tensor | None) -> str:
    return " and ".join("none" if tensor is None else str(tuple(tensor.shape)) for tensor in tensors)


def whole(size: int) -> int:
    """The next size that the kernels take."""
    return -(-size // 32) * 32


def paired(matrix: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    """Write `factor` times a matrix to `out`, in the order that the kernels read; returns that.

    Args:
        matrix: float32, (rows, columns).
        factor: a number.
        out: of `whole` sizes, zeros where the matrix does not reach.
    """
    kernel = kernels.of(out)
    assert kernel is not None
    if not matrix.t().is_contiguous():
        matrix = matrix.contiguous()
    sizes = *matrix.shape, *matrix.stride(), *out.shape
    kernel.call("pair", matrix if matrix.is_contiguous() else matrix.t(), out, *sizes, float(factor))
    return out


class _Linear(torch.autograd.Function):
    """``x W^T + b`` with both frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return shaped(product(x.reshape(-1, x.shape[-1]), weight.t(), bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        grad = gradients[0]
        return shaped(product(grad.reshape(-1, grad.shape[-1]), weight), grad), None, None


def _is_trained(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def takes(layer: nn.Module) -> bool:
    """Whether `layer` is a frozen linear layer that `linear_forward` makes faster."""
    if type(layer) is not nn.Linear or _is_trained(layer) or "forward" in vars(layer):
        return False
    kernel = kernels.of(layer.weight)
    return kernel is not None and bool(kernel.strip)


def linear_forward(layer: Any, own: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer whose weights are frozen; `own` is its forward, for whatever this one does not do."""
    if x.dtype != layer.weight.dtype or torch.is_autocast_enabled(x.device.type) or _is_trained(layer):
        return own(x)
    return _Linear.apply(x, layer.weight, layer.bias)


def is_fast(weight):
    kernel = kernels.of(weight)
    return kernel is not None and bool(kernel.strip)


def frozen_linear(x, w, b):
    return _Linear.apply(x, w, b)
