"""Functions of csrc/elementwise.c: norm, SwiGLU, dropout, rotary positions, softmax, cross-entropy."""

import torch

from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.cpu.prototypes import check_shape, library_for
from llm_adapters.ops.cross_entropy import IGNORE_INDEX
from llm_adapters.ops.dropout import threshold


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight * x / rms(x)`` over the last dimension.

    Args:
        x: (..., hidden_size).
        weight: (hidden_size,).
        eps: added to the mean square.

    Returns:
        The result, and 1 / rms, (..., 1), float32.
    """
    check_shape("the norm's weight", weight, x.shape[-1:])
    x, out = x.contiguous(), empty(x, *x.shape)
    inverse_rms = torch.empty(*x.shape[:-1], 1)
    library_for(x).call("rms_norm", x, weight, out, inverse_rms, inverse_rms.numel(), x.shape[-1], eps)
    return out, inverse_rms


def rms_norm_backward(
    grad: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> torch.Tensor:
    """The gradient of x from `rms_norm`'s results; `grad` has the shape of the first of them."""
    check_shape("the gradient", grad, result.shape)
    check_shape("1 / rms", inverse_rms, (*result.shape[:-1], 1))
    d_x = empty(result, *result.shape)
    parts = grad.contiguous(), result, weight, inverse_rms, d_x
    library_for(result).call("rms_norm_backward", *parts, inverse_rms.numel(), result.shape[-1])
    return d_x


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, both of one shape."""
    check_shape("up", up, gate.shape)
    out = empty(gate, *gate.shape)
    library_for(gate).call("swiglu", gate.contiguous(), up.contiguous(), out, out.numel())
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of `gate` and `up`, all of one shape, and `swiglu`'s result again if asked to `recompute` it."""
    check_shape("up", up, gate.shape)
    check_shape("the gradient", grad, gate.shape)
    d_gate, d_up = empty(gate, *gate.shape), empty(gate, *gate.shape)
    out = empty(gate, *gate.shape) if recompute else None
    parts = grad.contiguous(), gate.contiguous(), up.contiguous(), d_gate, d_up, out
    library_for(gate).call("swiglu_backward", *parts, gate.numel())
    return d_gate, d_up, out


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float, scale: float) -> torch.Tensor:
    """``scale * x`` with the entries set to zero that `seed` drops, each with probability `p`; any shape."""
    x, out = x.contiguous(), empty(x, *x.shape)
    library_for(x).call("dropout", x, out, x.numel(), seed, threshold(p), scale)
    return out


def dropout_add_(out: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, p: float) -> None:
    """Add to `out` the entries of `x`, of the same shape, that `seed` does not drop."""
    check_shape("what is added", x, out.shape)
    library_for(x).call("dropout_add", out, x.contiguous(), x.numel(), seed, threshold(p))


def supports_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """True for heads within tokens, as projections leave them, and one position for all heads."""
    batch, _, tokens, head_dim = x.shape
    dense = x.transpose(1, 2).is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    return dense and cos.dtype == x.dtype and cos.shape == (batch, 1, tokens, head_dim)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """Rotary positions of the two halves of each head, or with `backward` their gradient.

    Args:
        x: (batch, num_heads, tokens, head_dim), a view of a contiguous (batch, tokens, num_heads, head_dim).
        cos: (batch, 1, tokens, head_dim); `sin` likewise.
        sin: see `cos`.
        backward: compute the gradient of x from that of the result.

    Returns:
        The same shape and memory layout as `x`.
    """
    rows = x.transpose(1, 2)
    batch, tokens, num_heads, head_dim = rows.shape
    for part in (cos, sin):
        check_shape("cos or sin", part, (batch, 1, tokens, head_dim))
    out = empty(rows, *rows.shape)
    library_for(x).call("rotary", rows, cos, sin, out, batch * tokens, num_heads, head_dim, backward)
    return out.transpose(1, 2)


def masked_softmax_(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    prefix: int,
    first_row: int,
    window: int | None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Softmax over what each row of padded segments may see, in place.

    Args:
        scores: (segments, num_heads, rows, columns): columns are the shared prefix and the segment's own tokens.
        lengths: (segments,), int64: tokens of each; rows beyond become zeros.
        prefix: tokens of the shared prefix.
        first_row: the place within its segment of the first of the rows.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.
        alibi_slopes: (num_heads,), float32: see `padded_attention.Scores`.
        softcap: likewise.
    """
    segments, num_heads, rows, columns = scores.shape
    check_shape("the segments' lengths", lengths, (segments,))
    check_shape("the slopes", alibi_slopes, (num_heads,))
    if prefix + first_row + rows > columns:
        raise ValueError(f"{rows} rows from {first_row} on see more than {columns} columns with a prefix of {prefix}")
    sizes = segments, num_heads, rows, columns, prefix, first_row, window or 0
    library_for(scores).call("masked_softmax", scores, lengths, alibi_slopes, *sizes, softcap or 0.0)


def softmax_backward_(grad: torch.Tensor, probs: torch.Tensor) -> None:
    """Turn the gradient of a softmax's results `probs`, (..., columns), into that of its scores, in place."""
    check_shape("the gradient", grad, probs.shape)
    library_for(grad).call("softmax_backward", grad, probs, probs.shape[:-1].numel(), probs.shape[-1])


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row; `logits` become its gradient, in place.

    Args:
        logits: (rows, vocab_size).
        targets: (rows,), int64; `IGNORE_INDEX` for no loss and no gradient.

    Returns:
        (rows,), float32.

    Raises:
        IndexError: another target is not in the vocabulary.
    """
    rows, vocab_size = logits.shape
    check_shape("the targets", targets, (rows,))
    smallest, largest = (int(bound) for bound in targets.aminmax())
    if smallest < 0 or largest >= vocab_size:
        wrong = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))]
        if len(wrong):
            raise IndexError(f"label {int(wrong[0])} of a vocabulary of {vocab_size}")
    losses = torch.empty(rows)
    library_for(logits).call("cross_entropy", logits, targets.contiguous(), losses, rows, vocab_size)
    return losses
