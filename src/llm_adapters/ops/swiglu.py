"""SwiGLU, ``silu(gate) * up`` (Shazeer 2020), alone and with the LoRA linear layer that follows it."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llm_adapters.compat import torch as compat
from llm_adapters.ops.backends import function
from llm_adapters.ops.linear import with_shape
from llm_adapters.ops.lora import input_gradient, lora_output, weight_gradients


def _forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if kernel := function("swiglu", gate):
        return kernel(gate, up)
    return functional.silu(gate).mul_(up)


def _backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of both factors, and the result again if asked to `recompute` it."""
    if kernel := function("swiglu_backward", gate):
        return kernel(grad, gate, up, recompute)
    active = functional.silu(gate)
    return compat.silu_backward(grad * up, gate), active * grad, active.mul_(up) if recompute else None


class _Swiglu(torch.autograd.Function):
    """Keeps the two factors and neither the activation nor the product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return _backward(gradients[0], gate, up, recompute=False)[:2]


class _SwigluLora(torch.autograd.Function):
    """`lora_linear` of the gated product, which is computed again in the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, *parts: Any) -> torch.Tensor:
        out, saved = lora_output(_forward(gate, up).reshape(-1, gate.shape[-1]), *parts)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(gate, up, *saved)
            ctx.scale, ctx.p = parts[-2:]
        return with_shape(out, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up, *saved = ctx.saved_tensors
        grad, flat_gate, flat_up = (t.reshape(-1, t.shape[-1]) for t in (gradients[0], gate, up))
        d_x, d_hidden = input_gradient(grad, saved, ctx.scale, ctx.p, True)
        assert d_x is not None
        d_gate, d_up, x = _backward(d_x, flat_gate, flat_up, recompute=True)
        assert x is not None
        d_a, d_b = weight_gradients(grad, x, d_hidden, saved, ctx.scale, ctx.p)
        return d_gate.view_as(gate), d_up.view_as(up), None, None, d_a, d_b, None, None


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, all of one shape."""
    return _Swiglu.apply(gate, up)


def swiglu_lora(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    p: float,
) -> torch.Tensor:
    """`lora.lora_linear` of ``silu(gate) * up``, which is not kept for the backward pass.

    Args:
        gate: (..., in_features).
        up: (..., in_features).
        weight: as `lora_linear` takes it, and so the others.
        bias: see there.
        a: see there.
        b: see there.
        scale: see there.
        p: see there.

    Returns:
        (..., out_features).
    """
    return _SwigluLora.apply(gate, up, weight, bias, a, b, scale, p)
