"""RMS norm with a frozen weight (Zhang & Sennrich 2019, eq. 4)."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llm_adapters.compat import torch as compat
from llm_adapters.ops.backends import for_tensor, function


class _RmsNorm(torch.autograd.Function):
    """The backend's gradient needs the result, which the layers that read it keep too, and not x, which nobody else
    does; the reference's needs x.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.backend = for_tensor(x) if function("rms_norm", x) else None
        if ctx.backend is not None:
            out, inverse_rms = ctx.backend.rms_norm(x, weight, eps)
        else:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
            inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            out = (x * inverse_rms).to(x.dtype).mul_(weight)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x if ctx.backend is None else out, weight, inverse_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, inverse_rms = ctx.saved_tensors  # with a backend, not x but the result
        (grad,) = gradients
        if ctx.backend is not None:
            return ctx.backend.rms_norm_backward(grad, x, weight, inverse_rms), None, None
        # With r = 1 / rms(x): r * (g w - x r^2 mean(g w x)). That is a layer norm's gradient for a mean of 0, which
        # torch has as one function, but for r * mean(g w), which a layer norm takes away.
        d_x = compat.layer_norm_input_grad(grad, x, torch.zeros_like(inverse_rms), inverse_rms, weight)
        mean = (grad @ weight)[..., None] * (inverse_rms / x.shape[-1])
        return d_x.add_(mean.to(d_x.dtype)), None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / rms(x)`` over the last dimension.

    Args:
        x: (..., hidden_size).
        weight: (hidden_size,), frozen, of the precision of `x` and nowhere 0: the gradient divides by it.
        eps: added to the mean square.

    Returns:
        The shape of `x`.
    """
    return _RmsNorm.apply(x, weight, eps)
