"""Attention of neighbouring segments of a pack, padded to one length, with the shared prefix in front of each.

Two batched matrix products and a softmax, on any device: the reference of `varlen_attention`, and generation's prompts.
On a CPU that is several times faster than torch's fused attention at the lengths of worked problems, and the backward
pass is written out so that nothing but the probabilities is kept. Long segments are attended to in blocks of rows, each
over what it may see, and their probabilities are computed again in the backward pass: what a layer keeps grows with the
length, and not with its square (the mask does, but there is one for all layers).

The rows of a batch are, for a bucket of segments, `padded_length` rows of each head of each segment:

    query  (segments * num_kv_heads, heads of each * padded_length, head_dim)
    key    (segments * num_kv_heads, prefix + padded_length, head_dim)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from llm_adapters.compat import torch as compat
from llm_adapters.ops.backends import function
from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.packing import CausalMask, LengthBucket

BLOCK = 512  # rows; a longer segment is attended to in blocks of so many


class Scores(NamedTuple):
    """The scores that a family's attention gives to keys: ``cap(scale * query . key) + slope * distance``.

    Attributes:
        scale: the factor on the products.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.
        alibi_slopes: (num_heads,), float32: the slope of each head (Press et al. 2022); the distance is the key's
            position less the query's, 0 or less. None for no such term.
        softcap: ``cap(x) = softcap * tanh(x / softcap)``; None for no cap.
    """

    scale: float
    window: int | None = None
    alibi_slopes: torch.Tensor | None = None
    softcap: float | None = None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: CausalMask, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``softmax(scores) value`` of what is visible, and the probabilities where there is one block.

    Args:
        query: as in this module's drawing, scaled.
        key: likewise; `value` has the same rows.
        value: see `key`.
        mask: of the bucket, with the window of `scores`.
        scores: what they are beside the scale.

    Returns:
        The rows of `query`, with the head size of `value`; probabilities (batch, rows, columns), or None.
    """
    length = mask.padded_length
    if length <= BLOCK:
        probs = _probabilities(query, key, mask, slice(0, length), scores)
        return torch.bmm(probs, value), probs
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    for rows, visible in _blocks(mask):
        probs = _probabilities(_row_block(query, rows, length), key[:, visible], mask, rows, scores)
        found = torch.bmm(probs, value[:, visible])
        out.unflatten(1, (-1, length))[:, :, rows] = found.unflatten(1, (-1, rows.stop - rows.start))
    return out, None


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: CausalMask,
    scores: Scores,
    probs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value; `grad` has the shape of `attend`'s result, `probs` as it gives them."""
    if probs is not None:
        return _gradients(grad, query, key, value, probs, scores.softcap)
    length = mask.padded_length
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, visible in _blocks(mask):
        q_block, k_block = _row_block(query, rows, length), key[:, visible]
        probs = _probabilities(q_block, k_block, mask, rows, scores)
        d_block = _row_block(grad, rows, length)
        dq, dk, dv = _gradients(d_block, q_block, k_block, value[:, visible], probs, scores.softcap)
        d_query.unflatten(1, (-1, length))[:, :, rows] = dq.unflatten(1, (-1, rows.stop - rows.start))
        d_key[:, visible] += dk
        d_value[:, visible] += dv
    return d_query, d_key, d_value


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: CausalMask, rows: slice, scores: Scores
) -> torch.Tensor:
    """The softmax of the scores of some `rows` of all segments over the columns `key`, (batch, rows, columns)."""
    products = torch.bmm(query, key.transpose(1, 2), out=empty(query, *query.shape[:2], key.shape[1]))
    by_segment = products.view(len(mask.lengths), -1, rows.stop - rows.start, key.shape[1])
    if kernel := function("masked_softmax_", by_segment):
        kernel(by_segment, mask.lengths, mask.prefix, rows.start, mask.window, *scores[2:])
        return products
    if scores.softcap is not None:
        by_segment.div_(scores.softcap).tanh_().mul_(scores.softcap)
    by_segment.add_(mask.bias(products.dtype)[:, None, rows, : key.shape[1]])
    if scores.alibi_slopes is not None:
        by_segment.add_(alibi(mask, scores.alibi_slopes, rows, key.shape[1]))
    return torch.softmax(products, -1)


def alibi(mask: CausalMask, slopes: torch.Tensor, rows: slice, columns: int) -> torch.Tensor:
    """The linear bias of some `rows` of every segment over its first `columns`, (num_heads, rows, columns), float32."""
    places = torch.arange(columns, device=slopes.device)
    return slopes[:, None, None] * (places - places[mask.prefix :, None][rows])


def _gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    probs: torch.Tensor,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of ``softmax(cap(query key^T) + bias) value``, each tensor (batch, rows, head_dim).

    A batched product whose first factor is a transposed view is ten times slower on a CPU, so the narrow factor is
    copied in its transposed order and not the wide one.
    """
    d_value = torch.bmm(grad.transpose(1, 2).contiguous(), probs).transpose(1, 2)
    d_scores = torch.bmm(grad, value.transpose(1, 2))
    if kernel := function("softmax_backward_", d_scores):
        kernel(d_scores, probs)
    else:
        d_scores = compat.softmax_backward(d_scores, probs)
    if softcap is not None:  # the derivative of the cap is 1 - tanh^2
        capped = torch.bmm(query, key.transpose(1, 2)).div_(softcap).tanh_()
        d_scores.addcmul_(d_scores, capped.square_(), value=-1)
    d_key = torch.bmm(query.transpose(1, 2).contiguous(), d_scores).transpose(1, 2)
    return torch.bmm(d_scores, key), d_key.contiguous(), d_value.contiguous()


def _blocks(mask: CausalMask) -> Iterator[tuple[slice, slice]]:
    """Rows, and the columns that they may see: the prefix, and the rows up to their own."""
    for start in range(0, mask.padded_length, BLOCK):
        stop = min(start + BLOCK, mask.padded_length)
        yield slice(start, stop), slice(0, mask.prefix + stop)


def _row_block(batch: torch.Tensor, rows: slice, length: int) -> torch.Tensor:
    """These `rows` of every head: (batch, heads * length, head_dim) -> (batch, heads * rows, head_dim)."""
    return batch.unflatten(1, (-1, length))[:, :, rows].flatten(1, 2)


# --- from the rows of a pack to the padded batch and back


def by_kv_head(rows: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(num_heads, rows, head_dim) -> (num_kv_heads, heads of each * rows, head_dim)."""
    return rows.reshape(num_kv_heads, -1, rows.shape[-1])


def gather(rows: torch.Tensor, bucket: LengthBucket, num_kv_heads: int) -> torch.Tensor:
    """(num_heads, tokens, head_dim) -> (segments * num_kv_heads, heads of each * padded_length, head_dim)."""
    num_heads, _, head_dim = rows.shape
    flat = rows.transpose(0, 1).reshape(-1, head_dim)  # no copy, as projections have heads within tokens
    index = bucket.gather_index(num_heads // num_kv_heads, num_kv_heads, with_prefix=False)
    return flat.index_select(0, index).view(len(bucket.lengths) * num_kv_heads, -1, head_dim)


def with_prefix(rows: torch.Tensor, bucket: LengthBucket) -> torch.Tensor:
    """(num_heads, tokens, head_dim) -> (segments * num_heads, prefix + padded_length, head_dim)."""
    num_heads, _, head_dim = rows.shape
    flat = rows.transpose(0, 1).reshape(-1, head_dim)
    index = bucket.gather_index(1, num_heads, with_prefix=True)
    return flat.index_select(0, index).view(len(bucket.lengths) * num_heads, -1, head_dim)


def segment_rows(batch: torch.Tensor, bucket: LengthBucket, num_heads: int) -> torch.Tensor:
    """The way back: a batch of `gather`, in any grouping of the heads, -> (segment tokens * num_heads, head_dim)."""
    return batch.reshape(-1, batch.shape[-1]).index_select(0, bucket.scatter_index(num_heads, False))


def scatter(batch: torch.Tensor, bucket: LengthBucket, out: torch.Tensor, has_prefix: bool = False) -> None:
    """`segment_rows`, written to `out`, (segment tokens, heads, head_dim); a batch may begin with the prefix."""
    flat, index = batch.reshape(-1, batch.shape[-1]), bucket.scatter_index(out.shape[1], has_prefix)
    torch.index_select(flat, 0, index, out=out.view(-1, out.shape[-1]))
