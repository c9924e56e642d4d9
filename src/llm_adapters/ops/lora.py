"""LoRA beside a frozen linear layer (Hu et al. 2022): in training one function, in generation a stack of adapters.

                   x ------------------> W ---------- + --> out
                   |                                  ^
                   +-- dropout --> A --> B -- scale --+         A: (rank, in_features), B: (out_features, rank)

In the precision of x, with A and B kept as they are (float32 masters).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llm_adapters.ops import dropout
from llm_adapters.ops.backends import function
from llm_adapters.ops.linear import LoraBranch, grad_weight, linear_lora, with_shape
from llm_adapters.ops.sizes import round_up

_UNIT = 32  # sizes of packed matrices are multiples


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parts: Any) -> torch.Tensor:
        out, saved = lora_output(x.reshape(-1, x.shape[-1]), *parts)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, *saved)
            ctx.scale, ctx.p = parts[-2:]
        return with_shape(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        flat, grad = (t.reshape(-1, t.shape[-1]) for t in (x, gradients[0]))
        d_x, d_hidden = input_gradient(grad, saved, ctx.scale, ctx.p, ctx.needs_input_grad[0])
        d_a, d_b = weight_gradients(grad, flat, d_hidden, saved, ctx.scale, ctx.p)
        return None if d_x is None else d_x.view_as(x), None, None, d_a, d_b, None, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    p: float,
) -> torch.Tensor:
    """``x weight^T + bias + scale * (dropout(x) a^T) b^T`` with `weight` and `bias` frozen.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), of the precision of `x`.
        bias: (out_features,) or None.
        a: (rank, in_features), of any precision.
        b: (out_features, rank), likewise.
        scale: LoRA's alpha / rank.
        p: probability of dropout; 0 for none.

    Returns:
        (..., out_features).
    """
    return _LoraLinear.apply(x, weight, bias, a, b, scale, p)


def lora_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    p: float,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """`lora_linear` of the rows `x`, without autograd, and the tensors that the functions below need besides them."""
    seed = dropout.sample_mask(x, p) if p else None
    if kernel := function("lora_weights", x):
        a, b = kernel(x, a, b)
    # Dropout's 1 / (1 - p) is in A, a few rows, and not in the hidden states, all tokens'.
    out, lora_hidden = linear_lora(x, weight, bias, LoraBranch(a, b, 1.0 / (1.0 - p), scale, seed, p, True))
    return out, [weight, a, b, lora_hidden, seed]


def input_gradient(
    grad: torch.Tensor, saved: Sequence[Any], scale: float, p: float, needed: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of the rows (if `needed`) and of x A^T; `saved` as `lora_output` gives it."""
    weight, a, b, _, seed = saved
    if not needed:
        return None, grad @ (b * scale).to(grad.dtype)
    return linear_lora(grad, weight.t(), None, LoraBranch(b.t(), a.t(), scale, 1.0 / (1.0 - p), seed, p, False))


def weight_gradients(
    grad: torch.Tensor, x: torch.Tensor, d_hidden: torch.Tensor, saved: Sequence[Any], scale: float, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A and B for the rows `x`; `d_hidden`, the gradient of x A^T, as `input_gradient` gives it."""
    _, a, _, lora_hidden, seed = saved
    d_a, d_b = grad_weight(d_hidden, x, 1.0 / (1.0 - p), seed, p), grad_weight(lora_hidden, grad, scale)
    return d_a[: len(a)], d_b[: len(a)].t()


class LoraStack:
    """LoRAs that stay as they are, of several adapters, rounded to the precision of the weight and prepared once.

    Args:
        pairs: by the number of the adapter, A (rank, in_features) and B (out_features, rank), the scale in B.
        num_adapters: their numbers are below; those that are not in `pairs` have no LoRA here.
        weight: (out_features, in_features), of the layer beside which they are.
    """

    def __init__(
        self, pairs: Mapping[int, tuple[torch.Tensor, torch.Tensor]], num_adapters: int, weight: torch.Tensor
    ) -> None:
        self._stacked: tuple[torch.Tensor, torch.Tensor] | None = None
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        pack, self._kernel = function("pack_lora", weight), function("lora_add_", weight)
        if pack is None or not pairs:
            self._pairs = {
                number: (a.detach().t().to(weight.dtype), b.detach().t().to(weight.dtype))
                for number, (a, b) in pairs.items()
            }
            return
        out_features, in_features = weight.shape
        rank = round_up(max(len(a) for a, _ in pairs.values()), _UNIT)
        stacked_a = weight.new_zeros(num_adapters, round_up(in_features, _UNIT), rank)
        stacked_b = weight.new_zeros(num_adapters, rank, round_up(out_features, _UNIT))
        for number, (a, b) in pairs.items():
            pack(a.detach().t().float(), 1.0, stacked_a[number])
            pack(b.detach().t().float(), 1.0, stacked_b[number])
        self._stacked = stacked_a, stacked_b

    def add_(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        adapter_ids: torch.Tensor | None = None,
        runs: Sequence[tuple[int, slice]] | None = None,
    ) -> torch.Tensor:
        """Add to each row of `out` the LoRA of its adapter, in place.

        Args:
            out: (..., out_features), contiguous.
            x: (..., in_features).
            adapter_ids: (rows,), int64, -1 for none; None for adapter 0 everywhere.
            runs: the same as neighbouring rows of one adapter, for where that is faster; None if it is not known.

        Returns:
            `out`.
        """
        rows, flat = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        if self._stacked is not None and self._kernel is not None:
            self._kernel(rows, flat, adapter_ids, *self._stacked)
            return out
        if adapter_ids is not None and runs is None:
            for number, (a, b) in self._pairs.items():  # all rows by every adapter: the host does not read the numbers
                others = adapter_ids.ne(number)[:, None]
                rows.addmm_((flat @ a).masked_fill(others, 0), b)
            return out
        for number, span in [(0, slice(None))] if adapter_ids is None or runs is None else runs:
            if number in self._pairs:
                a, b = self._pairs[number]
                rows[span].addmm_(flat[span] @ a, b)
        return out
