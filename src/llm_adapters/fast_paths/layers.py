"""Faster forwards of single modules: the bottleneck's delta, RMS norms, gated MLPs. LoRA is in `lora`.

Each computes what the module's own forward does, in the precision of the hidden state, with adapter weights kept as
they are (float32 masters), and keeps for the backward pass only what cannot be had again for less.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llm_adapters.fast_paths.lora import lora_forward, lora_parts
from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops.cpu import prepacked as weights
from llm_adapters.ops.dropout import sparse_dropout
from llm_adapters.ops.rms_norm import rms_norm
from llm_adapters.ops.sizes import padded_size
from llm_adapters.ops.swiglu import swiglu, swiglu_lora

_ROWS = 16  # in such numbers an adapter's rows are multiplied (see `sizes`)

# --- the bottleneck


def bottleneck_delta(layer: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """`BottleneckLayer.delta` in the precision of `hidden`, where the layer's own is in that of the adapter."""
    dropped = layer.options[name].bottleneck_dropout if layer.training else 0.0
    h = sparse_dropout(hidden, dropped) if dropped else hidden
    down, up = _bottleneck(layer, name, hidden.dtype)
    return functional.linear(layer.activations[name](functional.linear(h, *down)), *up)


def frozen_delta(layer: Any, kept: dict[Any, Any], packed: bool, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """`bottleneck_delta` in eval mode, with weights that stay as they are: cast (and `packed`) once, into `kept`."""
    key = name, hidden.dtype
    if key not in kept:
        blocks = packed and hidden.dtype == torch.bfloat16
        kept[key] = [weights.linear(*part, blocks) for part in _bottleneck(layer, *key)]
    down, up = kept[key]
    return up(layer.activations[name](down(hidden)))


def routed_add(layer: Any, route: Route, name: str, stream: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """`BottleneckLayer.add` for the rows that are of the adapter `name`."""
    out = stream.clone(memory_format=torch.contiguous_format)
    rows, flat = out.view(-1, out.shape[-1]), [source.reshape(-1, source.shape[-1]) for source in sources]
    for number, span in route.runs(len(rows)):
        if route.names[number] == name:
            count = span.stop - span.start
            more = padded_size(count, _ROWS) - count
            delta = layer.delta(name, *(functional.pad(source[span], (0, 0, 0, more)) for source in flat))
            rows[span] += delta[:count].to(out.dtype)
    return out


def _bottleneck(layer: Any, name: str, kind: torch.dtype) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Weight and bias of the two projections, the scale in the second, in the precision `kind`."""
    config, down, up = layer.options[name], layer.bottleneck_down[name], layer.bottleneck_up[name]
    scale = layer.bottleneck_scale[name] if config.scaling == "learned" else config.scaling
    weight, bias = up.weight, up.bias
    if not (isinstance(scale, float) and scale == 1.0):
        # Scaling the weight, a few hundred rows, and not the delta, all tokens'.
        weight, bias = weight * scale, None if bias is None else bias * scale
    return (down.weight.to(kind), None if down.bias is None else down.bias.to(kind)), (
        weight.to(kind),
        None if bias is None else bias.to(kind),
    )


# --- norms


def rms_parts(module: nn.Module) -> tuple[torch.Tensor, float] | None:
    """w and eps for which `module` is ``w * x / rms(x)``, found by trying; None where it is something else."""
    parameters = dict(module.named_parameters())
    eps = next((e for n in ("variance_epsilon", "eps") if isinstance(e := getattr(module, n, None), float)), None)
    if list(parameters) != ["weight"] or list(module.children()) or eps is None:
        return None
    weight = parameters["weight"]
    if weight.dim() != 1 or weight.requires_grad:
        return None
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            expected = module(x)
        except Exception:  # a module that takes something else is simply not this one
            return None
        for candidate in (weight, weight + 1):  # gemma keeps the weight's distance from 1
            if not candidate.all():
                continue  # its gradient cannot be had from its result
            if expected.shape == x.shape and _close(rms_norm(x, candidate, eps), expected):
                return candidate, eps
    return None


def rms_forward(own: Any, weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    """An RMS norm, fused."""
    if x.dtype != weight.dtype:
        return own(x)
    return rms_norm(x, weight, eps)


# --- gated MLPs


def is_silu_mlp(module: nn.Module) -> bool:
    """Whether `module` is ``down(silu(gate(x)) * up(x))``, found by its children and by trying."""
    children = dict(module.named_children())
    act = children.pop("act_fn", getattr(module, "act_fn", None))
    if sorted(children) != ["down_proj", "gate_proj", "up_proj"] or list(module.parameters(recurse=False)):
        return False
    if not callable(act):
        return False
    weight = next(children["gate_proj"].parameters())
    width = getattr(children["gate_proj"], "in_features", None)
    if width is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, width, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            return torch.equal(act(x), functional.silu(x)) and _close(silu_mlp_forward(module, x), module(x))
        except Exception:  # a module that takes something else is simply not this one
            return False


def silu_mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A gated MLP with the gate's product in one function, and with a fused LoRA after it in the same."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    down = module.down_proj
    fused = getattr(vars(down).get("forward"), "func", None) is lora_forward
    fused = fused and not (down._forward_hooks or down._forward_pre_hooks)
    parts = lora_parts(down, gate.dtype) if fused else None
    return down(swiglu(gate, up)) if parts is None else swiglu_lora(gate, up, *parts)


def frozen_silu_mlp(module: Any) -> Any:
    """The forward of a gated MLP of linear layers in blocks: the activation, and without a LoRA on the other one the
    product too, are done while multiplying."""
    gate, up = (vars(part).get("forward") for part in (module.gate_proj, module.up_proj))
    if not isinstance(gate, weights.PrepackedLinear):
        return None
    if not isinstance(up, weights.PrepackedLinear):  # it has a LoRA
        return lambda x: module.down_proj(module.up_proj(x).mul_(gate.silu(x)))
    return lambda x: module.down_proj(up.times(x, gate.silu(x)))


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    room = 1e-5 if expected.dtype == torch.float32 else 2e-2
    return bool((found - expected).abs().max() <= room * (expected.abs().max() + 1e-6))
