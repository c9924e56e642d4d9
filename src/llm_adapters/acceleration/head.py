"""The output head and the cross-entropy in one: logits exist for a few rows at a time, and never twice."""

from typing import Any

import torch
from torch import nn

# Rows at once. On a CPU, logits that leave the cache cost more than the product that makes them.
CHUNK_BYTES = 16 * 2**20


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of ``hidden weight^T + bias`` against `targets`; its gradient comes with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        rows = max(16, CHUNK_BYTES // (4 * len(weight)))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            target = targets[part]
            logits = nn.functional.linear(hidden[part], weight, bias)
            at_target = logits.gather(1, target[:, None]).float()
            largest = logits.amax(1, keepdim=True).float()
            probabilities = torch.softmax(logits, 1, dtype=torch.float32)
            # The largest logit's probability is never below 1 / vocabulary: its logarithm is safe.
            normaliser = largest - probabilities.amax(1, keepdim=True).log()
            total += (normaliser - at_target).sum()
            if gradient is not None:
                probabilities.scatter_add_(1, target[:, None], probabilities.new_full((len(target), 1), -1.0))
                gradient[part] = probabilities.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(gradient.dtype), None, None, None


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
