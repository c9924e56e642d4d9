"""The bottleneck's delta in the precision of the hidden state, its weights kept as they are (float32 masters)."""

from typing import Any

import torch
from torch.nn import functional

from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops.cpu import prepacked
from llm_adapters.ops.dropout import sparse_dropout
from llm_adapters.ops.sizes import padded_size

_ROW_MULTIPLE = 16  # an adapter's rows are multiplied in such numbers (see `padded_size`)


def delta(layer: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Compute `BottleneckLayer.delta` in the precision of `hidden`, where the layer's own is in the adapter's."""
    dropout = layer.options[name].bottleneck_dropout if layer.training else 0.0
    h = sparse_dropout(hidden, dropout) if dropout else hidden
    down, up = _weights(layer, name, hidden.dtype)
    return functional.linear(layer.activations[name](functional.linear(h, *down)), *up)


def inference_delta(layer: Any, cache: dict[Any, Any], prepack: bool, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Compute `delta` with weights that do not change: converted (and prepacked) once, into `cache`."""
    key = name, hidden.dtype
    if key not in cache:
        blocks = prepack and hidden.dtype == torch.bfloat16
        cache[key] = [prepacked.linear(*part, blocks) for part in _weights(layer, *key)]
    down, up = cache[key]
    return up(layer.activations[name](down(hidden)))


def routed_add(layer: Any, route: Route, name: str, stream: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """Compute `BottleneckLayer.add` for the rows that are of the adapter `name`."""
    out = stream.clone(memory_format=torch.contiguous_format)
    rows, flat = out.view(-1, out.shape[-1]), [source.reshape(-1, source.shape[-1]) for source in sources]
    for adapter, span in route.runs(len(rows)):
        if route.names[adapter] == name:
            count = span.stop - span.start
            padding = padded_size(count, _ROW_MULTIPLE) - count
            found = layer.delta(name, *(functional.pad(source[span], (0, 0, 0, padding)) for source in flat))
            rows[span] += found[:count].to(out.dtype)
    return out


def _weights(layer: Any, name: str, dtype: torch.dtype) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Weight and bias of the two projections in `dtype`, the scale in the second."""
    config, down, up = layer.options[name], layer.bottleneck_down[name], layer.bottleneck_up[name]
    scale = layer.bottleneck_scale[name] if config.scaling == "learned" else config.scaling
    weight, bias = up.weight, up.bias
    if not (isinstance(scale, float) and scale == 1.0):
        # Scaling the weight, a few hundred rows, and not the delta, all tokens'.
        weight, bias = weight * scale, None if bias is None else bias * scale
    return (down.weight.to(dtype), None if down.bias is None else down.bias.to(dtype)), (
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
