"""PEFT's LoRA on a linear layer, faster: in training one function, in generation one kernel or merged.

In the precision of the hidden state, with adapter weights kept as they are (float32 masters); for the backward pass is
kept what cannot be had again for less.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops.cpu import prepacked as weights
from llm_adapters.ops.lora import LoraStack, lora_linear


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
    return own(x, *args, **kwargs) if parts is None else lora_linear(x, *parts)


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
    with torch.no_grad():
        pairs = {
            number: (layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name])
            for number, name in enumerate(names)
            if name in layer.lora_A
        }
        if not pairs:
            return base
        stack = LoraStack(pairs, len(names), weight)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out, rows = base(x), x.numel() // x.shape[-1]
        return stack.add_(out, x, *(() if route is None else (route.of(rows), route.runs(rows))))

    return forward
