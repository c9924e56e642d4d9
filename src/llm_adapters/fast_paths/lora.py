"""PEFT's LoRA on a linear layer: in training one function, in generation one pass beside the base layer, or merged.

All in the precision of the hidden state, with adapter weights kept as they are (float32 masters).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llm_adapters.compat.peft import is_plain_lora_adapter, is_plain_lora_linear
from llm_adapters.compat.transformers import is_conv1d
from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops.cpu import prepacked
from llm_adapters.ops.lora import LoraStack, lora_linear

Forward = Callable[[torch.Tensor], torch.Tensor]


def base_weight(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Find the frozen weight (out, in) and bias under PEFT's LoRA `layer`; None where fusing does not fit."""
    if not is_plain_lora_linear(layer):
        return None
    base: Any = layer.base_layer
    turned = is_conv1d(base)  # its weight is (in, out)
    if not (turned or type(base) is nn.Linear):
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return (weight.t() if turned else weight), bias


def forward(layer: Any, own: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute PEFT's LoRA linear layer, fused; `own` is its forward, for whatever the fused one does not do."""
    parts = None if args or kwargs else active_weights(layer, x.dtype)
    return own(x, *args, **kwargs) if parts is None else lora_linear(x, *parts)


def is_fused(layer: nn.Module) -> bool:
    """Tell whether the layer's forward is this module's `forward`."""
    return getattr(vars(layer).get("forward"), "func", None) is forward


def active_weights(layer: Any, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """Gather what `lora_linear` takes besides hidden states of `dtype`: weight, bias, A, B, scale and dropout's
    probability; None where it does not fit."""
    base, name = base_weight(layer), _active_adapter(layer)
    if base is None or name is None or dtype != base[0].dtype or torch.is_autocast_enabled(base[0].device.type):
        return None
    dropout = layer.lora_dropout[name]
    p = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    return *base, layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), p


def _active_adapter(layer: Any) -> str | None:
    """The one active adapter of a LoRA layer; None where there are more or it is more than ``s * x A^T B^T``."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or not is_plain_lora_adapter(layer, active[0]):
        return None
    return active[0]


def is_plain_lora(layer: Any, names: Sequence[str]) -> bool:
    """Tell whether `layer` is PEFT's LoRA on a linear layer, its adapters `names` no more than ``s * x A^T B^T``."""
    if base_weight(layer) is None or layer.merged:
        return False
    return all(is_plain_lora_adapter(layer, name) for name in names)


def merged_forward(layer: Any, prepack: bool) -> Forward | None:
    """Make the forward of a LoRA layer with its adapter added to a copy of the weight, in float32, and the sum rounded
    to the weight's precision; None where PEFT's own is needed.

    Args:
        layer: PEFT's LoRA on a linear layer, whose weights do not change.
        prepack: see `prepacked.linear`.
    """
    base, name = base_weight(layer), _active_adapter(layer)
    if base is None or name is None:
        return None
    weight, bias = base
    with torch.no_grad():
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
        return prepacked.linear(torch.addmm(weight.float(), b.float(), a.float()).to(weight.dtype), bias, prepack)


def inference_forward(layer: Any, route: Route | None, prepack: bool) -> Forward | None:
    """Make the forward of a LoRA layer whose weights do not change, the adapters' rounded to the weight's precision;
    None where PEFT's own is needed.

    Args:
        layer: PEFT's LoRA on a linear layer.
        route: which adapter computes which rows; None for the active one and all rows.
        prepack: see `prepacked.linear`.
    """
    base, name = base_weight(layer), _active_adapter(layer)
    if base is None or (route is None and name is None):
        return None
    weight, bias = base
    linear = prepacked.linear(weight, bias, prepack)
    names = route.names if route is not None else (name,)
    with torch.no_grad():
        adapters = {
            number: (layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name])
            for number, name in enumerate(names)
            if name in layer.lora_A
        }
        if not adapters:
            return linear
        stack = LoraStack(adapters, len(names), weight)

    def computed(x: torch.Tensor) -> torch.Tensor:
        out = linear(x)
        rows = x.numel() // x.shape[-1]
        routed = (None, None) if route is None else (route.get(rows), route.runs(rows))
        return stack.add_(out, x, *routed)

    return computed
