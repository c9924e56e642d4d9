"""LoRA added to what a layer of any kind has computed, such as one whose weights are quantised.

In the precision of x, with A and B kept as they are (float32 masters). `ops.lora` has the one in the pass of a plain
linear layer.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llm_adapters.ops import dropout
from llm_adapters.ops.linear import grad_weight, with_shape


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, p: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        seed = dropout.sample_mask(flat, p) if p else None
        dropped = flat if seed is None else dropout.apply(flat, seed, p)
        hidden = dropped @ (a.t() / (1.0 - p)).to(x.dtype)  # dropout's factor is in A, a few rows
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, a, b, hidden, seed)
            ctx.scale, ctx.p = scale, p
        added = torch.addmm(out.reshape(-1, out.shape[-1]), hidden, (b.t() * scale).to(x.dtype))
        return with_shape(added, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, a, b, hidden, seed = ctx.saved_tensors
        flat, grad = (t.reshape(-1, t.shape[-1]) for t in (x, gradients[0]))
        d_hidden = grad @ (b * ctx.scale).to(grad.dtype)
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = d_hidden @ (a / (1.0 - ctx.p)).to(grad.dtype)
            d_x = (d_x if seed is None else dropout.apply(d_x, seed, ctx.p)).view_as(x)
        d_a = grad_weight(d_hidden, flat, 1.0 / (1.0 - ctx.p), seed, ctx.p)
        d_b = grad_weight(hidden, grad, ctx.scale)
        return gradients[0], d_x, d_a[: len(a)], d_b[: len(a)].t(), None, None


def add_lora(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, p: float
) -> torch.Tensor:
    """``out + scale * (dropout(x) a^T) b^T``.

    Args:
        out: (..., out_features), of the precision of `x`.
        x: (..., in_features).
        a: (rank, in_features), of any precision.
        b: (out_features, rank), likewise.
        scale: LoRA's alpha / rank.
        p: probability of dropout; 0 for none.

    Returns:
        (..., out_features), a new tensor.
    """
    return _AddLora.apply(out, x, a, b, scale, p)
