"""The output head and the cross-entropy in one: logits exist for a few rows at a time, and never twice."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.linear import product
from llm_adapters.ops.packing import rounded

# Of logits at once: enough rows for the product to run at full speed.
CHUNK_BYTES = 31 * 2**20
_ROWS = 16  # rows are multiplied in such numbers (see `packing.rounded`), and so many are float32 at a time


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of ``hidden weight^T + bias`` against `targets`; its gradient comes with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        most = max(_ROWS, CHUNK_BYTES // (weight.element_size() * len(weight)) // _ROWS * _ROWS)
        # Equal shares, as the product of a small rest is slow.
        rows = rounded(-(-len(hidden) // max(1, -(-len(hidden) // most))), _ROWS)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = empty(hidden, *hidden.shape) if wanted else None
        # The same buffers for all chunks: fresh memory for so many logits costs more than their softmax.
        logits_buffer = empty(hidden, rows, len(weight))
        kernel = kernels.of(hidden)
        exact_buffer = hidden.new_empty(0 if kernel else _ROWS, len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            count = len(targets[part])
            logits = logits_buffer[: rounded(count, _ROWS)]
            product(_filled(hidden[part]), weight.t(), bias, out=logits)
            if kernel:
                if int(targets[part].max()) >= len(weight):
                    raise IndexError(f"label {int(targets[part].max())} of a vocabulary of {len(weight)}")
                losses = torch.empty(count)
                kernel.call("cross_entropy", logits, targets[part], losses, count, len(weight))
                total += losses.sum()
            else:
                for few, target in zip(logits[:count].split(_ROWS), targets[part, None].split(_ROWS), strict=True):
                    total += _loss_to_gradient(few, target, exact_buffer[: len(few)])
            if gradient is not None:
                logits[count:] = 0
                gradient[part] = torch.mm(logits, weight)[:count]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(gradient.dtype), None, None, None


def _loss_to_gradient(logits: torch.Tensor, target: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies; `logits` (rows, vocabulary) become their gradient; `exact`: room for float32."""
    at_target = logits.gather(1, target).float()
    largest = logits.amax(1, keepdim=True).float()
    torch.softmax(exact.copy_(logits), 1, out=exact)
    # The largest logit's probability is never below 1 / vocabulary: its logarithm is safe.
    normaliser = largest - exact.amax(1, keepdim=True).log()
    exact.scatter_add_(1, target, exact.new_full((1, 1), -1.0).expand_as(target))
    logits.copy_(exact)
    return (normaliser - at_target).sum()


def _filled(hidden: torch.Tensor) -> torch.Tensor:
    """(rows, width), with rows of zeros up to a round number."""
    return nn.functional.pad(hidden, (0, 0, 0, rounded(len(hidden), _ROWS) - len(hidden)))


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross-entropies at the labels, with a frozen output head.

    Args:
        hidden: (labels, width), the hidden states that predict the labels.
        weight: (vocabulary, width) of the output head; `bias`: (vocabulary,) or None.
        targets: (labels,), int64.

    Returns:
        A scalar, float32.
    """
    return _HeadLoss.apply(hidden, weight, bias, targets)


fused_linear_cross_entropy = head_loss
