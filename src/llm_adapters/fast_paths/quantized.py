"""PEFT's LoRA on a quantised linear layer: the layer's own product, and the LoRA beside it in one function."""

from typing import Any

import torch
from torch import nn

from llm_adapters.compat.peft import is_plain_lora_adapter, is_quantized_lora_linear
from llm_adapters.ops.add_lora import add_lora


def match(module: nn.Module) -> bool:
    """Tell whether `module` is PEFT's LoRA on a quantised linear layer."""
    return is_quantized_lora_linear(module)


def forward(layer: Any, own: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the layer; `own` is its forward, for whatever this one does not do."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = len(active) == 1 and not layer.disable_adapters and not layer.merged
    if args or kwargs or not plain or torch.is_autocast_enabled(x.device.type):
        return own(x, *args, **kwargs)
    (name,) = active
    if not is_plain_lora_adapter(layer, name):
        return own(x)
    dropout = layer.lora_dropout[name]
    p = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return add_lora(layer.base_layer(x), x, a, b, float(layer.scaling[name]), p)
