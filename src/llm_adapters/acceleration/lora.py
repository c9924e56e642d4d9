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

from llm_adapters.acceleration import dropout, kernels, weights
from llm_adapters.acceleration.routing import Route


class LoraLinear(torch.autograd.Function):
    """``x W^T + b + s * (dropout(x) A^T) B^T`` with W frozen (Hu et al. 2022, eq. 3)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parts: Any) -> torch.Tensor:
        """`parts`: as `lora_output` takes them."""
        out, kept = lora_output(x.reshape(-1, x.shape[-1]), *parts)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, *kept)
            ctx.constants = parts[-2:]
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The gradients of x, A and B."""
        x, *kept = ctx.saved_tensors
        flat, grad = (t.reshape(-1, t.shape[-1]) for t in (x, gradients[0]))
        scale, p = ctx.constants
        d_x, d_a, d_b = lora_gradients(grad, flat, kept, scale, p, ctx.needs_input_grad[0])
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
    """The layer's output for the rows `x`, and the tensors that `lora_gradients` needs besides them."""
    mask = dropout.drawn(x, p) if p else None
    out = functional.linear(x, weight, bias)
    # Dropout's 1 / (1 - p) is in A, a few rows, and not in the hidden states, all tokens'.
    middle = _add_product(out, x, (a.t(), 1.0 / (1.0 - p)), (b.t(), scale), mask, p, _BEFORE)
    return out, [weight, a, b, middle, mask]


def lora_gradients(
    grad: torch.Tensor, x: torch.Tensor, kept: Any, scale: float, p: float, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradients of the rows `x` (if `wanted`), of A and of B; `kept` as `lora_output` gives it."""
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
