"""Attention over packs and of generation's forwards, as an attention implementation of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llm_adapters.compat.transformers import attention_entries, sdpa_attention
from llm_adapters.fast_paths.patches import Patches
from llm_adapters.ops import paged_attention, varlen_attention
from llm_adapters.ops.kv_cache import ForwardBatch
from llm_adapters.ops.packing import Pack

NAME = "llm_adapters_packed"

# What a family may hand to its attention that changes nothing here, or is told by the pack.
_HARMLESS = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "position_embeddings"}


_KNOWN = {"scaling", "dropout", "sliding_window"}  # the named arguments of `packed_attention`


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
        query: (1, heads, tokens, head_dim).
        key: (1, key-value heads, tokens, head_dim).
        value: (1, key-value heads, tokens, head_dim).
        attention_mask: not read, as the pack says who sees whom.
        scaling: the factor on the scores; None for 1 / sqrt(head_dim).
        dropout: probability of dropping an entry of the attention's probabilities.
        sliding_window: a token sees no more than so many tokens.
        pack: the pack that the tokens are of.
        others: what families hand to their attention besides.

    Returns:
        (1, tokens, heads, head_dim), and None for the probabilities.

    Raises:
        Unsupported: something is asked for that packs do not have.
    """
    _refuse(others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = varlen_attention.varlen_attention(query[0], key[0], value[0], pack, scale, sliding_window, dropout)
    return out[None], None


def cached_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    forward_batch: ForwardBatch,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one forward of generation, see `paged_attention.cached_attention`.

    Arguments, results and errors as of `packed_attention`. Keys and values are stored in the batch's cache.
    """
    _refuse(others)
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise Unsupported("its attention does not know which layer it is")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    row = query[0], key[0], value[0]
    return paged_attention.cached_attention(layer, *row, forward_batch, scale, sliding_window)[None], None


def _refuse(others: dict[str, Any]) -> None:
    strange = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if [name for name in strange if others[name] is not False]:
        raise Unsupported(f"its attention has {', '.join(strange)}")


def _attention(
    module: nn.Module,
    *tensors: Any,
    pack: Pack | None = None,
    forward_batch: ForwardBatch | None = None,
    recorder: Callable[..., None] | None = None,
    **kwargs: Any,
) -> Any:
    """Compute packs and generation's forwards here; whatever is neither goes to transformers' SDPA.

    A `recorder` is called with the queries, keys and values and the result.
    """
    if forward_batch is not None:
        return cached_attention(module, *tensors, forward_batch=forward_batch, **kwargs)
    if pack is not None:
        out = packed_attention(module, *tensors, pack=pack, **kwargs)
    else:
        if recorder is not None:
            _refuse({name: value for name, value in kwargs.items() if name not in _KNOWN})
        out = sdpa_attention(module, *tensors, **kwargs)
    if recorder is not None:
        recorder(*tensors[:3], out[0])
    return out


def register(patches: Patches) -> None:
    """Make the implementation known to transformers under `NAME`, until the last session's patches are undone."""
    for mapping, value in attention_entries(_attention):
        patches.share_item(mapping, NAME, value)


def no_mask(device: torch.device) -> torch.Tensor:
    """A mask in the shape that transformers hands on as it is, without building one from the positions."""
    return torch.zeros(1, 1, 1, 1, device=device)
