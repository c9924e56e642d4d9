"""Attention over packs and over generation's steps, as an attention implementation of transformers."""

import functools
from typing import Any

import torch
from torch import nn

from llm_adapters.ops import kv_cache as pages
from llm_adapters.ops import varlen_attention
from llm_adapters.ops.packing import LengthBucket, Pack

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
    _refuse(others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return varlen_attention.varlen_attention(query[0], key[0], value[0], pack, scale, sliding_window, dropout)[
        None
    ], None


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    step: pages.Step,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a generation's `step`: tokens over their slots, new prompts over the shared prefix and themselves.

    Arguments, results and errors as of `packed_attention`. Keys and values are stored in the step's cache.
    """
    _refuse(others)
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise Unsupported("its attention does not know which layer it is")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = query[0], key[0], value[0]
    heads, tokens, _ = query.shape
    out = query.new_empty(tokens, heads, value.shape[-1])
    before = step.cache.prefix_of(layer, step.adapter)
    pages.store(layer, key, value, step)
    count = 0
    for decoded in step.decoded:
        rows = slice(count, count + decoded.at.numel())
        out[rows] = pages.decode(layer, query[:, rows], step.cache, decoded, scale, sliding_window)
        count = rows.stop
    if step.pack is not None:
        q, k, v = (part[:, count:] for part in (query, key, value))
        if before is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(before, (k, v), strict=True))
        _prompts(q, k, v, step, step.pack, scale, sliding_window, out[count:])
    return out[None], None


def _refuse(others: dict[str, Any]) -> None:
    strange = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if [name for name in strange if others[name] is not False]:
        raise Unsupported(f"its attention has {', '.join(strange)}")


def _prompts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: pages.Step,
    pack: Pack,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """The prompts of a step; `key` and `value` begin with the shared prefix; `out` is (tokens, heads, width)."""
    heads, groups = len(query), len(key)
    flat = (query.transpose(0, 1) * scale).reshape(-1, query.shape[-1])
    for number, band in enumerate(pack.buckets):
        places = step.cached(("queries", number, heads, groups), functools.partial(_own_places, band, heads, groups))
        queries = flat.index_select(0, places).view(len(band.lengths) * groups, -1, query.shape[-1])
        found, _ = varlen_attention.attend(
            queries,
            varlen_attention.with_prefix(key, band),
            varlen_attention.with_prefix(value, band),
            band.causal_mask(window),
        )
        varlen_attention.scatter(found, band, out[band.start - pack.prefix : band.end - pack.prefix])
    out[pack.end - pack.prefix :] = 0


def _own_places(band: LengthBucket, heads: int, groups: int) -> torch.Tensor:
    """Where the queries of `band` are in a row that begins after the shared prefix."""
    return band.gather_index(heads // groups, groups, with_prefix=False) - band.prefix * heads


def _attention(
    module: nn.Module, *tensors: Any, pack: Pack | None = None, step: pages.Step | None = None, **kwargs: Any
) -> Any:
    """Packs and generation's steps here; whatever is neither goes to transformers' SDPA."""
    if step is not None:
        return slot_attention(module, *tensors, step=step, **kwargs)
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


def no_mask(device: torch.device) -> torch.Tensor:
    """A mask in the shape that transformers hands on as it is, without building one from the positions."""
    return torch.zeros(1, 1, 1, 1, device=device)
