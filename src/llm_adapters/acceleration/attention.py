"""Attention over packs, as an attention implementation of transformers.

Two batched matrix products and a softmax over the segments, padded to the longest of them, with the shared prefix in
front of each. On a CPU that is several times faster than its fused attention at the lengths of worked problems, and the
backward pass is written out so that nothing but the probabilities is kept.
"""

from typing import Any

import torch
from torch import nn

from llm_adapters.acceleration.packing import Pack

NAME = "llm_adapters_packed"

# What a family may hand to its attention that changes nothing here, or is told by the pack.
_HARMLESS = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "position_embeddings"}


class Unsupported(Exception):
    """The family's attention wants something that packs do not have."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    pack: Pack,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every segment of `pack` over the shared prefix and itself.

    Args:
        module: the attention module that calls.
        query: (1, heads, tokens, width); `key` and `value` (1, key-value heads, tokens, width).
        attention_mask: not read, as the pack says who sees whom.
        scaling: the factor on the scores; None for 1 / sqrt(width).
        dropout: probability of dropping an entry of the attention's probabilities.
        sliding_window: a token sees no more than so many tokens.
        pack: the pack that the tokens are of.
        others: what families hand to their attention besides.

    Returns:
        (1, tokens, heads, width), and None for the probabilities.

    Raises:
        Unsupported: something is asked for that packs do not have.
    """
    strange = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if [name for name in strange if others[name] is not False]:
        raise Unsupported(f"its attention has {', '.join(strange)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout:
        return _with_dropout(query[0], key[0], value[0], pack, scale, sliding_window, dropout)[None], None
    return _Packed.apply(query[0], key[0], value[0], pack, scale, sliding_window)[None], None


class _Packed(torch.autograd.Function):
    """(heads, tokens, width), twice (key-value heads, tokens, width) -> (tokens, heads, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pack: Pack,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        on_prefix, on_segments = pack.bias(window, query.dtype)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        keys, values = _with_prefix(key, pack), _with_prefix(value, pack)
        queries = _segments(query, pack, len(key))
        probabilities = _probabilities(queries, keys, on_segments, scale)
        out[pack.prefix :] = _back(torch.bmm(probabilities, values), pack, len(query))
        first = query.new_empty(0)
        if pack.prefix:
            own = slice(0, pack.prefix)
            grouped = _grouped(query[:, own], len(key))
            first = _probabilities(grouped, key[:, own], on_prefix[None], scale)
            out[own] = torch.bmm(first, value[:, own]).view(len(query), pack.prefix, -1).transpose(0, 1)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, probabilities, first)
            ctx.pack, ctx.scale = pack, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (grad,) = gradients
        query, key, value, probabilities, first = ctx.saved_tensors
        pack, scale = ctx.pack, ctx.scale
        d_query, d_key, d_value = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
        )
        grad = grad.transpose(0, 1)  # (heads, tokens, width)
        dq, dk, dv = _backward(
            _segments(grad, pack, len(key), zero_padding=True),
            _segments(query, pack, len(key)),
            _with_prefix(key, pack),
            _with_prefix(value, pack),
            probabilities,
            scale,
        )
        d_query[:, pack.prefix :] = _back(dq, pack, len(query)).transpose(0, 1)
        for whole, part in ((d_key, dk), (d_value, dv)):
            part = part.view(len(pack.lengths), len(key), -1, part.shape[-1])
            whole[:, pack.prefix :] = _back(part[:, :, pack.prefix :], pack, len(key)).transpose(0, 1)
            whole[:, : pack.prefix] = part[:, :, : pack.prefix].sum(0)
        if pack.prefix:
            own = slice(0, pack.prefix)
            dq, dk, dv = _backward(
                _grouped(grad[:, own], len(key)),
                _grouped(query[:, own], len(key)),
                key[:, own],
                value[:, own],
                first,
                scale,
            )
            d_query[:, own] = dq.view(len(query), pack.prefix, -1)
            d_key[:, own] += dk
            d_value[:, own] += dv
        return d_query, d_key, d_value, None, None, None


def _with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scale: float,
    window: int | None,
    p: float,
) -> torch.Tensor:
    """As `_Packed`, with dropout and with autograd's own backward pass, for the older families that drop here."""
    on_prefix, on_segments = pack.bias(window, query.dtype)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = torch.bmm(query, key.transpose(1, 2)) * scale
        scores = (scores.view(len(bias), -1, *bias.shape[1:]) + bias[:, None]).view_as(scores)
        return torch.bmm(nn.functional.dropout(torch.softmax(scores, -1), p), value)

    queries = _segments(query, pack, len(key))
    out = attend(queries, _with_prefix(key, pack), _with_prefix(value, pack), on_segments)
    rows = _back(out, pack, len(query))
    if not pack.prefix:
        return rows
    own = slice(0, pack.prefix)
    first = attend(_grouped(query[:, own], len(key)), key[:, own], value[:, own], on_prefix[None])
    return torch.cat((first.view(len(query), pack.prefix, -1).transpose(0, 1), rows))


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    probabilities: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of ``softmax(scale * query key^T + bias) value``, each tensor (batch, rows, width)."""
    # Contiguous transposes: a batched product whose first factor is a transposed view is ten times slower on a CPU.
    d_value = torch.bmm(probabilities.transpose(1, 2).contiguous(), grad)
    d_probabilities = torch.bmm(grad, value.transpose(1, 2))
    d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype).mul_(scale)
    d_key = torch.bmm(d_scores.transpose(1, 2).contiguous(), query)
    return torch.bmm(d_scores, key), d_key, d_value


def _probabilities(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """Query (batch, group * rows, width), key (batch, columns, width), bias (sequences, rows, columns)."""
    rows, columns = bias.shape[1:]
    scores = torch.bmm(query, key.transpose(1, 2))
    grouped = scores.view(len(bias), -1, rows, columns)  # sequences, heads, ...
    torch.add(bias[:, None], grouped, alpha=scale, out=grouped)
    return torch.softmax(scores, -1)


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(heads, rows, width) -> (key-value heads, heads of each * rows, width)."""
    return rows.reshape(groups, -1, rows.shape[-1])


def _segments(rows: torch.Tensor, pack: Pack, groups: int, zero_padding: bool = False) -> torch.Tensor:
    """(heads, tokens, width) -> (segments * key-value heads, heads of each * longest, width)."""
    heads, _, width = rows.shape
    by_token = rows.transpose(0, 1).index_select(0, pack.gather.flatten())
    if zero_padding:  # what is padded is computed and dropped, and must have no gradient
        by_token.index_fill_(0, pack.padded, 0)
    taken = by_token.view(*pack.gather.shape, heads, width).transpose(1, 2)
    return taken.reshape(len(pack.lengths) * groups, -1, width)


def _with_prefix(rows: torch.Tensor, pack: Pack) -> torch.Tensor:
    """(heads, tokens, width) -> (segments * heads, prefix + longest, width)."""
    heads, _, width = rows.shape
    segments, longest = pack.gather.shape
    out = rows.new_empty(segments, heads, pack.prefix + longest, width)
    out[:, :, : pack.prefix] = rows[:, : pack.prefix]
    by_token = rows.transpose(0, 1).index_select(0, pack.gather.flatten())
    out[:, :, pack.prefix :] = by_token.view(segments, longest, heads, width).transpose(1, 2)
    return out.view(segments * heads, -1, width)


def _back(rows: torch.Tensor, pack: Pack, heads: int) -> torch.Tensor:
    """The segments' (segments, ..., longest, width), heads in order between, -> (segment tokens, heads, width)."""
    segments, longest = pack.gather.shape
    width = rows.shape[-1]
    by_token = rows.reshape(segments, heads, longest, width).transpose(1, 2).reshape(segments * longest, heads, width)
    return by_token.index_select(0, pack.scatter)


def _attention(module: nn.Module, *tensors: Any, pack: Pack | None = None, **kwargs: Any) -> Any:
    """Packs here; whatever is no pack goes to transformers' SDPA."""
    if pack is not None:
        return packed_attention(module, *tensors, pack=pack, **kwargs)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *tensors, **kwargs)


def register() -> None:
    """Make the implementation known to transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def no_mask(pack: Pack) -> torch.Tensor:
    """A mask in the shape that transformers hands on as it is, without building one from the positions."""
    return torch.zeros(1, 1, 1, 1, device=pack.input_ids.device)
