"""PEFT's LoRA on a linear layer, faster: in training one function, in generation one kernel or merged.

In the precision of the hidden state, with adapter weights kept as they are (float32 masters); for the backward pass is
kept what cannot be had again for less.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops import dropout
from llm_adapters.ops import linear as products
from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.cpu import prepacked as weights
from llm_adapters.ops.linear import Added, paired, shaped, whole


class LoraLinear(torch.autograd.Function):
    """``x W^T + b + s * (dropout(x) A^T) B^T`` with W frozen (Hu et al. 2022, eq. 3)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parts: Any) -> torch.Tensor:
        """`parts`: as `lora_output` takes them."""
        out, kept = lora_output(x.reshape(-1, x.shape[-1]), *parts)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, *kept)
            ctx.constants = parts[-2:]
        return shaped(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The gradients of x, A and B."""
        x, *kept = ctx.saved_tensors
        flat, grad = (t.reshape(-1, t.shape[-1]) for t in (x, gradients[0]))
        scale, p = ctx.constants
        d_x, between = input_gradient(grad, kept, scale, p, ctx.needs_input_grad[0])
        d_a, d_b = weight_gradients(grad, flat, between, kept, scale, p)
        return None if d_x is None else d_x.view_as(x), None, None, d_a, d_b, None, None


def lora_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    p: float,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The layer's output for the rows `x`, and the tensors that the functions below need besides them."""
    mask = dropout.drawn(x, p) if p else None
    # Dropout's 1 / (1 - p) is in A, a few rows, and not in the hidden states, all tokens'.
    added = Added((a.t(), 1.0 / (1.0 - p)), (b.t(), scale), mask, p, products.BEFORE)
    out, middle = products.product_with(x, weight.t(), bias, added)
    return out, [weight, a, b, middle, mask]


def input_gradient(
    grad: torch.Tensor, kept: Any, scale: float, p: float, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of the rows (if `wanted`) and of what is between A and B; `kept` as `lora_output` gives it."""
    weight, a, b, _, mask = kept
    if not wanted:
        return None, grad @ (b * scale).to(grad.dtype)
    return products.product_with(grad, weight, None, Added((b, scale), (a, 1.0 / (1.0 - p)), mask, p, products.AFTER))


def weight_gradients(
    grad: torch.Tensor, x: torch.Tensor, between: torch.Tensor, kept: Any, scale: float, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A and B for the rows `x`; `between` as `input_gradient` gives it."""
    _, a, _, middle, mask = kept
    d_a, d_b = products.outer(between, x, 1.0 / (1.0 - p), mask, p), products.outer(middle, grad, scale)
    return d_a[: len(a)], d_b[: len(a)].t()


def lora_weight(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The frozen weight (out, in) and bias under PEFT's LoRA `layer`; None where the fused forward does not fit it."""
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    if type(layer) is not Linear:
        return None
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or any(p.requires_grad for p in base.parameters()):
        return None
    return (base.weight.t() if type(base) is Conv1D else base.weight), base.bias


def lora_forward(layer: Any, own: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's LoRA linear layer, fused; `own` is its forward, for whatever the fused one does not do."""
    parts = None if args or kwargs else lora_parts(layer, x.dtype)
    return own(x, *args, **kwargs) if parts is None else LoraLinear.apply(x, *parts)


def lora_parts(layer: Any, kind: torch.dtype) -> tuple[Any, ...] | None:
    """What `LoraLinear` takes besides hidden states of the precision `kind`; None where it does not fit."""
    weight, name = lora_weight(layer), _only_lora(layer)
    if weight is None or name is None or kind != weight[0].dtype or torch.is_autocast_enabled(weight[0].device.type):
        return None
    p = layer.lora_dropout[name].p if layer.training and isinstance(layer.lora_dropout[name], nn.Dropout) else 0.0
    return *weight, layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), p


def _only_lora(layer: Any) -> str | None:
    """The one active adapter of a LoRA layer; None where there are more or it is more than ``s * x A^T B^T``."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or not is_plain_lora(layer, active):
        return None
    return active[0]


def is_plain_lora(layer: Any, names: Sequence[str]) -> bool:
    """Whether `layer` is PEFT's LoRA on a linear layer, and its adapters `names` are ``s * x A^T B^T`` and no more."""
    if lora_weight(layer) is None or layer.merged:
        return False
    return not any(layer.lora_variant.get(name) or layer.lora_bias.get(name) for name in names)


def merged_lora(layer: Any, packed: bool) -> Any:
    """The forward of a LoRA layer with its adapter added to a copy of the weight, in float32, and that rounded to the
    weight's precision; None where PEFT's own is needed.

    Args:
        layer: PEFT's LoRA on a linear layer, whose weights stay as they are.
        packed: see `weights.linear`.
    """
    found, name = lora_weight(layer), _only_lora(layer)
    if found is None or name is None:
        return None
    weight, bias = found
    with torch.no_grad():
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
        return weights.linear(torch.addmm(weight.float(), b.float(), a.float()).to(weight.dtype), bias, packed)


def frozen_lora(layer: Any, route: Route | None, packed: bool) -> Any:
    """The forward of a LoRA layer whose weights stay as they are, the adapters' rounded to the weight's precision; None
    where PEFT's own is needed.

    Args:
        layer: PEFT's LoRA on a linear layer.
        route: which adapter computes which rows; None for the active one and all rows.
        packed: see `weights.linear`.
    """
    found, name = lora_weight(layer), _only_lora(layer)
    if found is None or (route is None and name is None):
        return None
    weight, bias = found
    base = weights.linear(weight, bias, packed)
    names = route.names if route is not None else (name,)
    with torch.no_grad():  # of each adapter (in, rank) and (rank, out)
        pairs = {
            number: (layer.lora_A[name].weight.t(), (layer.lora_B[name].weight * layer.scaling[name]).t())
            for number, name in enumerate(names)
            if name in layer.lora_A
        }
        if not pairs:
            return base
        out_width, width = weight.shape
        if kernel := kernels.of(weight):
            rank = whole(max(up.shape[0] for _, up in pairs.values()))
            downs = weight.new_zeros(len(names), whole(width), rank)
            ups = weight.new_zeros(len(names), rank, whole(out_width))
            for number, (down, up) in pairs.items():
                paired(down.float(), 1.0, downs[number])
                paired(up.float(), 1.0, ups[number])
        else:
            pairs = {number: (down.to(weight.dtype), up.to(weight.dtype)) for number, (down, up) in pairs.items()}

    def by_torch(x: torch.Tensor) -> torch.Tensor:
        out = base(x)
        flat, rows = x.reshape(-1, width), out.view(-1, out_width)
        for number, span in [(0, slice(None))] if route is None else route.runs(len(rows)):
            if number in pairs:
                rows[span].addmm_(flat[span] @ pairs[number][0], pairs[number][1])
        return out

    if kernel is None:
        return by_torch
    more, sizes = downs.shape[1] - width, (*downs.shape[1:], out_width)

    def by_kernel(x: torch.Tensor) -> torch.Tensor:
        out, count = base(x), x.numel() // width
        which = None if route is None else route.of(count)
        filled = (functional.pad(x, (0, more)) if more else x).contiguous()
        kernel.call("lora", filled, which, downs, ups, out, count, *sizes)
        return out

    return by_kernel
