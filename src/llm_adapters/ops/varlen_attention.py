"""Attention of packs: each segment over the shared prefix and itself (see csrc/varlen_attention.c for the CPU's own).

Without a backend's function it is `padded_attention`, a bucket of segments of about one length at a time.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from llm_adapters.ops.backends import for_tensor, function
from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.packing import CausalMask, LengthBucket, Pack
from llm_adapters.ops.padded_attention import (
    Scores,
    alibi,
    attend,
    attend_backward,
    by_kv_head,
    gather,
    scatter,
    segment_rows,
    with_prefix,
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pack: Pack,
        scores: Scores,
    ) -> torch.Tensor:
        ctx.backend = for_tensor(query) if function("varlen_attention", query, value) else None
        if ctx.backend is not None:
            rows = [part.transpose(0, 1).contiguous() for part in (query, key, value)]
            # Nothing of the probabilities is kept but each row's log-sum-exp.
            out, lse = ctx.backend.varlen_attention(*rows, *_segments(pack), *scores)
            out[pack.end :] = 0
            saved: list[Any] = [*rows, lse]
        else:
            out, probs = _forward(query, key, value, pack, scores)
            saved = [query, key, value, *probs]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*saved)
            ctx.pack, ctx.scores = pack, scores
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, *probs = ctx.saved_tensors
        (grad,) = gradients  # (tokens, num_heads, head_dim)
        if ctx.backend is not None:
            tables = ctx.pack.cu_seqlens, *probs, ctx.pack.prefix, ctx.pack.max_seqlen
            found = ctx.backend.varlen_attention_backward(grad, query, key, value, *tables, *ctx.scores)
        else:
            found = _backward(grad.transpose(0, 1), query, key, value, ctx.pack, ctx.scores, probs)
        return *(part.transpose(0, 1) for part in found), None, None


def _segments(pack: Pack) -> tuple[torch.Tensor, int, int]:
    return pack.cu_seqlens, pack.prefix, pack.max_seqlen


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scores: Scores
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The result, (tokens, num_heads, head_dim), and the probabilities of each bucket and, if any, of the prefix."""
    num_heads, tokens, _ = query.shape
    out, probs = empty(query, tokens, num_heads, value.shape[-1]), []
    for bucket in pack.buckets:
        queries = gather(query, bucket, len(key)).mul_(scores.scale)
        keys, values = with_prefix(key, bucket), with_prefix(value, bucket)
        found, own_probs = attend(queries, keys, values, bucket.causal_mask(scores.window), scores)
        probs.append(own_probs)
        scatter(found, bucket, out[bucket.start : bucket.end])
    out[pack.end :] = 0
    if pack.prefix:
        own = slice(0, pack.prefix)
        queries = by_kv_head(query[:, own], len(key)) * scores.scale
        found, own_probs = attend(queries, key[:, own], value[:, own], pack.causal_mask(scores.window), scores)
        probs.append(own_probs)
        out[own] = found.view(num_heads, pack.prefix, -1).transpose(0, 1)
    return out, probs


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scores: Scores,
    probs: list[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, (tokens, heads, head_dim) each; the others (heads, tokens, head_dim)."""
    prefix, num_kv_heads, scale = pack.prefix, len(key), scores.scale
    # (tokens, heads, head_dim), as the projections have it.
    d_query, d_key, d_value = (empty(t, t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value))
    for part in (d_query, d_key, d_value):
        part[pack.end :] = 0
    if prefix:
        own = slice(0, prefix)
        dq, dk, dv = attend_backward(
            by_kv_head(grad[:, own], num_kv_heads),
            by_kv_head(query[:, own], num_kv_heads) * scale,
            key[:, own],
            value[:, own],
            pack.causal_mask(scores.window),
            scores,
            probs[-1],
        )
        d_query[own] = dq.mul_(scale).view(len(query), prefix, -1).transpose(0, 1)
        d_key[own] = dk.transpose(0, 1)
        d_value[own] = dv.transpose(0, 1)
    for bucket, own_probs in zip(pack.buckets, probs, strict=False):  # the prefix's are last
        d_out = gather(grad, bucket, num_kv_heads)
        # Padding is computed and dropped, and must have no gradient.
        d_out.view(-1, d_out.shape[-1]).masked_fill_(bucket.padding(len(query))[:, None], 0)
        dq, dk, dv = attend_backward(
            d_out,
            gather(query, bucket, num_kv_heads).mul_(scale),
            with_prefix(key, bucket),
            with_prefix(value, bucket),
            bucket.causal_mask(scores.window),
            scores,
            own_probs,
        )
        scatter(dq.mul_(scale), bucket, d_query[bucket.start : bucket.end])
        for out, part in ((d_key, dk), (d_value, dv)):
            scatter(part, bucket, out[bucket.start : bucket.end], has_prefix=True)
            # Every segment has its share in the prefix's gradient.
            shared = part.view(len(bucket.lengths), num_kv_heads, -1, part.shape[-1])[:, :, :prefix]
            out[:prefix] += shared.sum(0).transpose(0, 1)
    return d_query, d_key, d_value


def _with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scores: Scores,
    p: float,
) -> torch.Tensor:
    """The same with dropout and with autograd's own backward pass, for the older families that drop here."""

    def drop_and_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: CausalMask) -> torch.Tensor:
        bias = mask.bias(query.dtype)[:, None]
        if scores.alibi_slopes is not None:
            whole = slice(0, mask.padded_length)
            bias = bias + alibi(mask, scores.alibi_slopes, whole, key.shape[1]).to(query.dtype)
        products = torch.bmm(query, key.transpose(1, 2)) * scores.scale
        if scores.softcap is not None:
            products = torch.tanh(products / scores.softcap) * scores.softcap
        products = (products.view(len(bias), -1, *bias.shape[2:]) + bias).view_as(products)
        return torch.bmm(nn.functional.dropout(torch.softmax(products, -1), p), value)

    def of_bucket(bucket: LengthBucket) -> torch.Tensor:
        queries = gather(query, bucket, len(key))
        found = drop_and_attend(
            queries, with_prefix(key, bucket), with_prefix(value, bucket), bucket.causal_mask(scores.window)
        )
        return segment_rows(found, bucket, len(query)).view(-1, len(query), found.shape[-1])

    parts = []
    if pack.prefix:
        own = slice(0, pack.prefix)
        queries = by_kv_head(query[:, own], len(key))
        first = drop_and_attend(queries, key[:, own], value[:, own], pack.causal_mask(scores.window))
        parts.append(first.view(len(query), pack.prefix, -1).transpose(0, 1))
    parts += [of_bucket(bucket) for bucket in pack.buckets]
    return torch.cat((*parts, parts[0].new_zeros(pack.tokens - pack.end, *parts[0].shape[1:])))


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of every segment of `pack` over the shared prefix and itself.

    Args:
        query: (num_heads, tokens, head_dim).
        key: (num_kv_heads, tokens, head_dim); `value` likewise, perhaps of another head size.
        value: see `key`.
        pack: the pack that the tokens are of.
        scale: see `Scores`.
        window: see `Scores`.
        dropout: probability of dropping an entry of the attention's probabilities.
        alibi_slopes: see `Scores`.
        softcap: see `Scores`.

    Returns:
        (tokens, num_heads, head_dim); for padding zeros, or where a backend computes it, the attention of itself.

    Raises:
        ValueError: the tensors are not of a pack of this length.
    """
    for part in (query, key, value):
        if part.shape[1] != pack.tokens:
            raise ValueError(f"{part.shape[1]} tokens of a pack of {pack.tokens}")
    scores = Scores(scale, window, alibi_slopes, softcap)
    if dropout:
        return _with_dropout(query, key, value, pack, scores, dropout)
    if kernel := function("packed_attention", query, value, scores):  # a backend's own, with its own gradient
        return kernel(query, key, value, pack, scores)
    return _VarlenAttention.apply(query, key, value, pack, scores)
