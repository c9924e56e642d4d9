"""Faster forwards of single modules: PEFT's LoRA on a linear layer, the bottleneck's delta, RMS norms, gated MLPs.

Each computes what the module's own forward does, in the precision of the hidden state, with adapter weights kept as
they are (float32 masters), and keeps for the backward pass only what cannot be had again for less.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llm_adapters.acceleration import dropout, kernels, weights
from llm_adapters.acceleration.packing import rounded
from llm_adapters.acceleration.routing import Route

_ROWS = 16  # in such numbers an adapter's rows are multiplied (see `packing.rounded`)

# --- LoRA


class _LoraLinear(torch.autograd.Function):
    """``x W^T + b + s * (dropout(x) A^T) B^T`` with W frozen (Hu et al. 2022, eq. 3)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parts: Any) -> torch.Tensor:
        """`parts`: as `_lora` takes them."""
        out, kept = _lora(x.reshape(-1, x.shape[-1]), *parts)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, *kept)
            ctx.constants = parts[-2:]
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, *kept = ctx.saved_tensors
        flat, grad = (t.reshape(-1, t.shape[-1]) for t in (x, gradients[0]))
        scale, p = ctx.constants
        d_x, d_a, d_b = _lora_gradients(grad, flat, kept, scale, p, ctx.needs_input_grad[0])
        return None if d_x is None else d_x.view_as(x), None, None, d_a, d_b, None, None


def _lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    p: float,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The layer's output for the rows `x`, and the tensors that `_lora_gradients` needs besides them."""
    mask = dropout.drawn(x, p) if p else None
    out = functional.linear(x, weight, bias)
    # Dropout's 1 / (1 - p) is in A, a few rows, and not in the hidden states, all tokens'.
    middle = _add_product(out, x, (a.t(), 1.0 / (1.0 - p)), (b.t(), scale), mask, p, _BEFORE)
    return out, [weight, a, b, middle, mask]


def _lora_gradients(
    grad: torch.Tensor, x: torch.Tensor, kept: Any, scale: float, p: float, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradients of the rows `x` (if `wanted`), of A and of B; `kept` as `_lora` gives it."""
    weight, a, b, middle, mask = kept
    if wanted:
        d_x = grad @ weight
        d_middle = _add_product(d_x, grad, (b, scale), (a, 1.0 / (1.0 - p)), mask, p, _AFTER)
    else:
        d_x, d_middle = None, grad @ (b * scale).to(grad.dtype)
    seen = x if mask is None else dropout.drop(x, mask, p)
    d_a = (d_middle.t() @ seen).to(torch.float32).div_(1.0 - p)
    d_b = (grad.t() @ middle).to(torch.float32).mul_(scale)
    return d_x, d_a, d_b


_NOWHERE, _BEFORE, _AFTER = range(3)  # as in kernels.c
_LARGEST_RANK = 128  # the kernel reads both matrices for every few rows: larger ones are in no cache


def _add_product(
    out: torch.Tensor,
    x: torch.Tensor,
    down: tuple[torch.Tensor, float],
    up: tuple[torch.Tensor, float],
    mask: torch.Tensor | None,
    p: float,
    dropped: int,
) -> torch.Tensor:
    """Add ``x down up``, x dropped before or the product after, to `out`, in place.

    Args:
        out: (rows, width).
        x: (rows, in).
        down: (in, rank), of any precision, and a factor.
        up: (rank, width), likewise.
        mask: what is dropped, as `dropout.drawn` gives it; None for nothing.
        p: with what probability.
        dropped: `_BEFORE` or `_AFTER`.

    Returns:
        ``x down``, (rows, rank), in the precision of x.
    """
    (rows, width), rank = out.shape, down[0].shape[1]
    kernel = kernels.of(x)
    fits = rank <= _LARGEST_RANK and all(size == whole(size) for size in (width, x.shape[1]))
    if kernel and fits and (mask is None or not mask.dim()) and down[0].dtype == up[0].dtype == torch.float32:
        blocks = [paired(*part, x.new_empty(whole(part[0].shape[0]), whole(part[0].shape[1]))) for part in (down, up)]
        middle = x.new_empty(rows, whole(rank))
        sizes = rows, x.shape[1], middle.shape[1], width
        seed = (0, 0, _NOWHERE) if mask is None else (int(mask), dropout.threshold(p), dropped)
        kernel.call("lora_in_training", x.contiguous(), *blocks, out, middle, *sizes, *seed)
        return middle[:, :rank].contiguous()
    first, second = ((part * factor).to(x.dtype) for part, factor in (down, up))
    middle = (x if mask is None or dropped == _AFTER else dropout.drop(x, mask, p)) @ first
    if mask is None or dropped == _BEFORE:
        out.addmm_(middle, second)
    else:
        dropout.add(out, middle @ second, mask, p)
    return middle


def whole(size: int) -> int:
    """The next size that the LoRA kernels take."""
    return -(-size // 32) * 32


def paired(matrix: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    """Write `factor` times a matrix to `out`, in the order that the LoRA kernels read; returns that.

    Args:
        matrix: float32, (rows, columns).
        factor: a number.
        out: of `whole` sizes, zeros where the matrix does not reach.
    """
    kernel = kernels.of(out)
    assert kernel is not None
    if not matrix.t().is_contiguous():
        matrix = matrix.contiguous()
    sizes = *matrix.shape, *matrix.stride(), *out.shape
    kernel.call("pair", matrix if matrix.is_contiguous() else matrix.t(), out, *sizes, float(factor))
    return out


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
    parts = None if args or kwargs else _lora_parts(layer, x.dtype)
    return own(x, *args, **kwargs) if parts is None else _LoraLinear.apply(x, *parts)


def _lora_parts(layer: Any, kind: torch.dtype) -> tuple[Any, ...] | None:
    """What `_LoraLinear` takes besides hidden states of the precision `kind`; None where it does not fit."""
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
            x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
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
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors  # with a kernel, not x but the result
        (grad,) = gradients
        if kernel := kernels.of(x):
            out = torch.empty_like(x)
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
        out = torch.empty_like(gate)
        kernel.call("silu_gate", gate, up, out, gate.numel())
        return out
    return functional.silu(gate).mul_(up)


def _silu_gate_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `_silu_gate`'s factors."""
    if kernel := kernels.of(gate):
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        kernel.call("silu_gate_backward", grad, gate, up, d_gate, d_up, gate.numel())
        return d_gate, d_up
    return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


class _SiluGate(torch.autograd.Function):
    """``silu(gate) * up``; keeps the two factors and neither the activation nor the product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(gate, up)
        return _silu_gate(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _silu_gate_gradients(gradients[0], *ctx.saved_tensors)


class _SiluGateLora(torch.autograd.Function):
    """`_LoraLinear` of ``silu(gate) * up``, which is computed again in the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, *parts: Any) -> torch.Tensor:
        """`parts`: as `_lora` takes them."""
        out, kept = _lora(_silu_gate(gate, up).reshape(-1, gate.shape[-1]), *parts)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(gate, up, *kept)
            ctx.constants = parts[-2:]
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up, *kept = ctx.saved_tensors
        grad, flat_gate, flat_up = (t.reshape(-1, t.shape[-1]) for t in (gradients[0], gate, up))
        scale, p = ctx.constants
        d_x, d_a, d_b = _lora_gradients(grad, _silu_gate(flat_gate, flat_up), kept, scale, p, True)
        assert d_x is not None
        d_gate, d_up = _silu_gate_gradients(d_x, flat_gate, flat_up)
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
    parts = _lora_parts(down, gate.dtype) if fused else None
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
