"""The output head and the cross-entropy in one: logits exist for a few rows at a time, and never twice."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from llm_adapters.ops.backends import function
from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.linear import linear
from llm_adapters.ops.sizes import padded_size

# Of logits at once: enough rows for the product to run at full speed.
CHUNK_BYTES = 31 * 2**20
IGNORE_INDEX = -100  # as a target: no loss and no gradient
_ROWS = 16  # rows are multiplied in such numbers, see `sizes`


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Computes the gradient with the loss, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        max_rows = max(_ROWS, CHUNK_BYTES // (weight.element_size() * len(weight)) // _ROWS * _ROWS)
        # Equal shares, as the product of a small rest is slow.
        rows = padded_size(-(-len(hidden) // max(1, -(-len(hidden) // max_rows))), _ROWS)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = empty(hidden, *hidden.shape) if ctx.needs_input_grad[0] else None
        # The same buffer for all chunks: fresh memory for so many logits costs more than their softmax.
        logits_buffer = empty(hidden, rows, len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            count = len(targets[part])
            logits = logits_buffer[: padded_size(count, _ROWS)]
            linear(_padded(hidden[part]), weight, bias, out=logits)
            total += _cross_entropy_(logits[:count], targets[part]).sum()
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


def _cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row, (rows,), float32; `logits` (rows, vocab_size) become their gradient."""
    if kernel := function("cross_entropy_", logits):
        return kernel(logits, targets)
    ignored = targets == IGNORE_INDEX
    targets = targets.masked_fill(ignored, 0)
    log_probs = torch.log_softmax(logits, 1, dtype=torch.float32)
    losses = -log_probs.gather(1, targets[:, None]).squeeze(1)
    # softmax - one_hot, subtracted before it is rounded
    logits.copy_(
        log_probs.exp_().scatter_add_(1, targets[:, None], log_probs.new_full((1, 1), -1.0).expand(len(logits), 1))
    )
    logits.masked_fill_(ignored[:, None], 0)
    return losses.masked_fill_(ignored, 0)


def _padded(hidden: torch.Tensor) -> torch.Tensor:
    """(rows, hidden_size), with rows of zeros up to a round number."""
    return nn.functional.pad(hidden, (0, 0, 0, padded_size(len(hidden), _ROWS) - len(hidden)))


def fused_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross-entropies of ``hidden weight^T + bias`` against `targets`, with a frozen output head.

    Args:
        hidden: (labels, hidden_size), the hidden states that predict the labels.
        weight: (vocab_size, hidden_size) of the output head.
        bias: (vocab_size,) or None.
        targets: (labels,), int64; `IGNORE_INDEX` for none.

    Returns:
        A scalar, float32.
    """
    return _FusedLinearCrossEntropy.apply(hidden, weight, bias, targets)
