"""Rotary positions (Su et al. 2021) that turn the two halves of a head, in two passes over memory instead of five."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llm_adapters.ops.backends import function


class _Rotary(torch.autograd.Function):
    """``x * cos + (-x2, x1) * sin`` for x = (x1, x2), (batch, num_heads, tokens, head_dim); cos and sin are frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        if kernel := function("rotary", x, cos, sin):
            return kernel(x, cos, sin, False)
        out = x * cos
        half = x.shape[-1] // 2
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        grad = gradients[0]
        if kernel := function("rotary", grad, cos, sin):
            return kernel(grad, cos, sin, True), None, None
        d_x = grad * cos
        half = grad.shape[-1] // 2
        d_x[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        d_x[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return d_x, None, None


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, as transformers' function of this name in the llama family gives them.

    Args:
        q: (batch, num_heads, tokens, head_dim).
        k: (batch, num_kv_heads, tokens, head_dim).
        cos: (batch, tokens, rotated), for the first `rotated` entries of each head; `sin` likewise.
        sin: see `cos`.
        unsqueeze_dim: the dimension of the heads.

    Returns:
        The shapes of `q` and `k`.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotated = cos.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        # Some families (OLMo 2) keep cos and sin in float32: the sum is float32 then, and rounded once.
        if rotated == x.shape[-1]:
            return _Rotary.apply(x, cos, sin).to(x.dtype)
        return torch.cat((_Rotary.apply(x[..., :rotated], cos, sin).to(x.dtype), x[..., rotated:]), -1)

    return rotate(q), rotate(k)
