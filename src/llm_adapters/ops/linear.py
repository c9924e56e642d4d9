"""Linear layers with frozen weights, a LoRA in the same pass, and the gradients of its matrices."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llm_adapters.ops import dropout
from llm_adapters.ops.backends import for_tensor, function
from llm_adapters.ops.cpu.allocator import empty


class LoraBranch(NamedTuple):
    """A LoRA beside a linear layer: ``(x a^T) b^T``, with dropout of x before or of the result after.

    Args:
        a: (rank, in_features), of any precision.
        b: (out_features, rank), likewise.
        a_scale: a factor of `a`.
        b_scale: a factor of `b`.
        seed: of dropout, as `dropout.sample_mask` gives it; None for none.
        p: its probability.
        drops_input: it acts on x (as in a forward pass), and not on the result (as in the backward pass of one).
    """

    a: torch.Tensor
    b: torch.Tensor
    a_scale: float
    b_scale: float
    seed: torch.Tensor | None
    p: float
    drops_input: bool


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x weight^T + bias``, without autograd.

    Args:
        x: (rows, in_features).
        weight: (out_features, in_features), fastest if contiguous or the transpose of a contiguous one.
        bias: (out_features,) or None.
        out: (rows, out_features), where to write it; None for a new tensor.

    Returns:
        (rows, out_features).

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(x, weight, bias, out)
    out = empty(x, len(x), len(weight)) if out is None else out
    if kernel := function("linear", x, *weight.t().shape):
        return kernel(x, weight, bias, out)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def linear_lora(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, branch: LoraBranch
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` with a LoRA in the same pass.

    Returns:
        The result, (rows, out_features), and x a^T in the precision of x, (rows, rank), or wider, with zeros, where a
        backend works with round sizes.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(x, weight, bias)
    a, b, a_scale, b_scale, seed, p, drops_input = branch
    if (len(b), a.shape[1]) != weight.shape or len(a) != b.shape[1]:
        raise ValueError(f"a LoRA of {_shapes(a, b)} beside a weight of {_shapes(weight)}")
    if kernel := function("linear_lora", x, *weight.t().shape, branch):
        return kernel(x, weight, bias, branch)
    out = functional.linear(x, weight, bias)
    dropped = dropout.apply(x, seed, p) if seed is not None and drops_input else x
    lora_hidden = dropped @ (a.t() * a_scale).to(x.dtype)
    lora_out = (b.t() * b_scale).to(x.dtype)
    if seed is None or drops_input:
        return out.addmm_(lora_hidden, lora_out), lora_hidden
    dropout.add_(out, lora_hidden @ lora_out, seed, p)
    return out, lora_hidden


def grad_weight(
    left: torch.Tensor, x: torch.Tensor, scale: float, seed: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """``scale * left^T x``, the gradient of a LoRA's matrix, with the entries of `x` dropped that `seed` drops.

    Args:
        left: (rows, rank).
        x: (rows, width).
        scale: a factor.
        seed: as `dropout.sample_mask` gives it; None for nothing.
        p: with what probability.

    Returns:
        (rank, width), float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if len(x) != len(left):
        raise ValueError(f"a gradient of {_shapes(left, x)}: their rows are not as many")
    if kernel := function("grad_weight", x, left.shape[1], x.shape[1]):
        return kernel(left, x, scale, seed, p)
    dropped = x if seed is None else dropout.apply(x, seed, p)
    return (left.t() @ dropped).to(torch.float32).mul_(scale)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return with_shape(linear(x.reshape(-1, x.shape[-1]), weight, bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        grad = gradients[0]
        return with_shape(linear(grad.reshape(-1, grad.shape[-1]), weight.t()), grad), None, None


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x weight^T + bias`` with both frozen: only x gets a gradient.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), of the precision of `x`.
        bias: (out_features,) or None.

    Returns:
        (..., out_features).
    """
    return _FrozenLinear.apply(x, weight, bias)


def is_fast(weight: torch.Tensor) -> bool:
    """True if a backend has a faster product for this weight, (out_features, in_features), than torch."""
    backend = for_tensor(weight)
    return backend is not None and backend.has_fast_linear(weight)


def with_shape(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`out` (rows, out_features), a tensor of its own, with the dimensions of `like` but the last.

    Not a view, as what a custom function returns may be changed in place (OLMo clamps its queries) only if it is none.
    """
    return out.resize_(*like.shape[:-1], out.shape[-1])


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> None:
    wrong = x.shape[1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1])
    if wrong or (out is not None and out.shape != (len(x), len(weight))):
        raise ValueError(f"a linear layer of {_shapes(x, weight)} with a bias of {_shapes(bias)} for {_shapes(out)}")


def _shapes(*tensors: torch.Tensor | None) -> str:
    return " and ".join("none" if tensor is None else str(tuple(tensor.shape)) for tensor in tensors)
