"""Frozen linear layers: in training a faster product, in generation weights that were laid out once."""

from typing import Any

import torch
from torch import nn

from llm_adapters.ops import linear


def match(module: nn.Module) -> bool:
    """Tell whether `module` is a frozen linear layer for whose weight there is a faster product."""
    return type(module) is nn.Linear and not _is_trained(module) and linear.is_fast(module.weight)


def forward(layer: nn.Linear, own: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a linear layer whose weights are frozen; `own` is its forward, for what this one does not do."""
    if x.dtype != layer.weight.dtype or torch.is_autocast_enabled(x.device.type) or _is_trained(layer):
        return own(x)
    return linear.frozen_linear(x, layer.weight, layer.bias)


def _is_trained(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))
