"""Faster forwards of single modules: the bottleneck's delta, RMS norms, gated MLPs. LoRA is in `lora`.

Each computes what the module's own forward does, in the precision of the hidden state, with adapter weights kept as
they are (float32 masters), and keeps for the backward pass only what cannot be had again for less.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llm_adapters.fast_paths.lora_old import input_gradient, lora_forward, lora_output, lora_parts, weight_gradients
from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops import dropout
from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.cpu import prepacked as weights
from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.linear import shaped
from llm_adapters.ops.packing import rounded

_ROWS = 16  # in such numbers an adapter's rows are multiplied (see `packing.rounded`)

# --- the bottleneck


def bottleneck_delta(layer: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """`BottleneckLayer.delta` in the precision of `hidden`, where the layer's own is in that of the adapter."""
    dropped = layer.options[name].bottleneck_dropout if layer.training else 0.0
    h = CheapDropout.apply(hidden, dropped) if dropped else hidden
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
            more = rounded(count, _ROWS) - count
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


class CheapDropout(torch.autograd.Function):
    """Dropout as `dropout` draws it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        """`x`, any shape, with each entry dropped with probability `p`."""
        mask = dropout.drawn(x, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return dropout.drop(x.contiguous(), mask, p, 1.0 / (1.0 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The same entries of the gradient."""
        (mask,) = ctx.saved_tensors
        return dropout.drop(gradients[0].contiguous(), mask, ctx.p, 1.0 / (1.0 - ctx.p)), None


# --- norms


class _RmsNorm(torch.autograd.Function):
    """``w * x / rms(x)`` over the last dimension, w frozen and nowhere 0.

    The kernel's gradient needs the result, which the layers that read it keep too, and not x, which nobody else does.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if kernel := kernels.of(x):
            x, out = x.contiguous(), empty(x, *x.shape)
            inverse = torch.empty(*x.shape[:-1], 1)
            kernel.call("rms_norm", x, weight, out, inverse, inverse.numel(), x.shape[-1], eps)
        else:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            out = (x * inverse).to(x.dtype).mul_(weight)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(out if kernel else x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors  # with a kernel, not x but the result
        (grad,) = gradients
        if kernel := kernels.of(x):
            out = empty(x, *x.shape)
            parts = grad.contiguous(), x, weight, inverse, out
            kernel.call("rms_norm_backward", *parts, inverse.numel(), x.shape[-1])
            return out, None, None
        # With r = 1 / rms(x): r * (g w - x r^2 mean(g w x)). That is a layer norm's gradient for a mean of 0, which
        # torch has as one function, but for r * mean(g w), which a layer norm takes away.
        none, wanted = torch.zeros_like(inverse), [True, False, False]
        exact = weight.to(inverse.dtype) if x.device.type == "cpu" else weight  # as its kernels want it
        out = torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, none, inverse, exact, None, wanted)[0]
        mean = (grad @ weight)[..., None] * (inverse / x.shape[-1])
        return out.add_(mean.to(out.dtype)), None, None


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
            if expected.shape == x.shape and _close(_RmsNorm.apply(x, candidate, eps), expected):
                return candidate, eps
    return None


def rms_forward(own: Any, weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    """An RMS norm, fused."""
    if x.dtype != weight.dtype:
        return own(x)
    return _RmsNorm.apply(x, weight, eps)


# --- gated MLPs


def _silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``."""
    if kernel := kernels.of(gate):
        gate, up = gate.contiguous(), up.contiguous()
        out = empty(gate, *gate.shape)
        kernel.call("silu_gate", gate, up, out, gate.numel())
        return out
    return functional.silu(gate).mul_(up)


def _silu_gate_gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of `_silu_gate`'s factors, and its result if it is wanted `again`."""
    if kernel := kernels.of(gate):
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        d_gate, d_up = empty(gate, *gate.shape), empty(gate, *gate.shape)
        out = empty(gate, *gate.shape) if again else None
        kernel.call("silu_gate_backward", grad, gate, up, d_gate, d_up, out, gate.numel())
        return d_gate, d_up, out
    active = functional.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), active * grad, active.mul_(up) if again else None


class _SiluGate(torch.autograd.Function):
    """``silu(gate) * up``; keeps the two factors and neither the activation nor the product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(gate, up)
        return _silu_gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return _silu_gate_gradients(gradients[0], gate, up, False)[:2]


class _SiluGateLora(torch.autograd.Function):
    """`LoraLinear` of ``silu(gate) * up``, which is computed again in the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, *parts: Any) -> torch.Tensor:
        """`parts`: as `lora_output` takes them."""
        out, kept = lora_output(_silu_gate(gate, up).reshape(-1, gate.shape[-1]), *parts)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(gate, up, *kept)
            ctx.constants = parts[-2:]
        return shaped(out, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up, *kept = ctx.saved_tensors
        grad, flat_gate, flat_up = (t.reshape(-1, t.shape[-1]) for t in (gradients[0], gate, up))
        scale, p = ctx.constants
        d_x, between = input_gradient(grad, kept, scale, p, True)
        assert d_x is not None
        d_gate, d_up, x = _silu_gate_gradients(d_x, flat_gate, flat_up, True)
        assert x is not None
        d_a, d_b = weight_gradients(grad, x, between, kept, scale, p)
        return d_gate.view_as(gate), d_up.view_as(up), None, None, d_a, d_b, None, None


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
    return down(_SiluGate.apply(gate, up)) if parts is None else _SiluGateLora.apply(gate, up, *parts)


def frozen_silu_mlp(module: Any) -> Any:
    """The forward of a gated MLP of linear layers in blocks: the activation, and without a LoRA on the other one the
    product too, are done while multiplying."""
    gate, up = (vars(part).get("forward") for part in (module.gate_proj, module.up_proj))
    if not isinstance(gate, weights.Packed):
        return None
    if not isinstance(up, weights.Packed):  # it has a LoRA
        return lambda x: module.down_proj(module.up_proj(x).mul_(gate.silu(x)))
    return lambda x: module.down_proj(up.times(x, gate.silu(x)))


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    room = 1e-5 if expected.dtype == torch.float32 else 2e-2
    return bool((found - expected).abs().max() <= room * (expected.abs().max() + 1e-6))
