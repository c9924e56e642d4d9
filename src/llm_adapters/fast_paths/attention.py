"""Attention over packs and of generation's forwards, in the place of the model's own.

Families that look their attention up by name get it as an implementation of transformers; in the others, the middle of
their own code is replaced (`compat.own_attention`). What a forward computes travels on its attention mask: the one
thing that every family hands from the model down to each attention, and that is there again when a layer is recomputed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from llm_adapters.compat import own_attention
from llm_adapters.compat.transformers import (
    attention_entries,
    attention_implementation,
    attention_is_replaceable,
    eager_attention,
    sdpa_attention,
)
from llm_adapters.fast_paths.patches import Patches
from llm_adapters.ops import paged_attention, varlen_attention
from llm_adapters.ops.kv_cache import ForwardBatch
from llm_adapters.ops.packing import Pack

NAME = "llm_adapters_packed"
EAGER = "llm_adapters_packed_eager"  # beside a model whose own attention is transformers' eager one

# What a family may hand to its attention that changes nothing here, or is told by the pack.
_HARMLESS = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "position_embeddings"}
_KNOWN = {"scaling", "dropout", "sliding_window", "softcap"}  # the named arguments of `packed_attention`

_recorder: ContextVar[Callable[..., None] | None] = ContextVar("recorder", default=None)


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
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
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
        softcap: see `ops.padded_attention.Scores`.
        alibi_slopes: likewise.
        pack: the pack that the tokens are of.
        others: what families hand to their attention besides.

    Returns:
        (1, tokens, heads, head_dim), and None for the probabilities.

    Raises:
        Unsupported: something is asked for that packs do not have.
    """
    _refuse(others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    row = query[0], key[0], value[0]
    out = varlen_attention.varlen_attention(*row, pack, scale, sliding_window, dropout, alibi_slopes, softcap)
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
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    *,
    forward_batch: ForwardBatch,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one forward of generation, see `paged_attention.cached_attention`.

    Arguments, results and errors as of `packed_attention`. Keys and values are stored in the batch's cache.
    """
    _refuse(others)
    layer = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    if layer is None:
        raise Unsupported("its attention does not know which layer it is")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = paged_attention.cached_attention(
        layer, query[0], key[0], value[0], forward_batch, scale, sliding_window, alibi_slopes, softcap
    )
    return out[None], None


def _refuse(others: dict[str, Any]) -> None:
    strange = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if [name for name in strange if others[name] is not False]:
        raise Unsupported(f"its attention has {', '.join(strange)}")


# --- what a forward computes, on its mask


def mask_of(batch: Pack | ForwardBatch, device: torch.device) -> torch.Tensor:
    """Make the attention mask of a forward that computes `batch`: of a shape and type that transformers hands on as it
    is, without building one from the positions."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask.batch = batch
    return mask


def has_batch(mask: Any) -> bool:
    """Tell whether a mask is one of `mask_of`."""
    return hasattr(mask, "batch")


def batch_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> torch.Tensor:
    """Compute the attention of what `mask` has been made of, (1, tokens, heads, head_dim); see `packed_attention`."""
    tensors = query, key, value
    if isinstance(mask.batch, Pack):
        out, _ = packed_attention(module, *tensors, mask, pack=mask.batch, **kwargs)
    else:
        out, _ = cached_attention(module, *tensors, mask, forward_batch=mask.batch, **kwargs)
    if recorder := _recorder.get():
        recorder(*tensors, out)
    return out


def _attention(own: Any, module: nn.Module, *tensors: Any, **kwargs: Any) -> Any:
    """Compute packs and generation's forwards here; whatever is neither goes to transformers' `own` attention."""
    if has_batch(tensors[3]):
        return batch_attention(module, *tensors, **kwargs), None
    recorder = _recorder.get()
    if recorder is not None:
        _refuse({name: value for name, value in kwargs.items() if name not in _KNOWN})
    out = own(module, *tensors, **kwargs)
    if recorder is not None:
        recorder(*tensors[:3], out[0])
    return out


@contextlib.contextmanager
def recording(recorder: Callable[..., None]) -> Iterator[None]:
    """Call `recorder` with the queries, keys and values of each attention inside, and with its result."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


# --- in the place of the model's own


def unsupported_reason(model: Any) -> str | None:
    """Say why the attention of `model` cannot be replaced; None where it can."""
    return None if attention_is_replaceable(model) else own_attention.unsupported_reason(model)


def replace(model: Any, patches: Patches) -> None:
    """Have the attention of `model` computed here, until the patches are undone."""
    if not attention_is_replaceable(model):
        for patch in own_attention.replacements(model, has_batch, batch_attention):
            patches.set(*patch)
        return
    before = attention_implementation(model)
    eager = before == "eager"
    name, own = (EAGER, eager_attention) if eager else (NAME, sdpa_attention)
    for mapping, value in attention_entries(functools.partial(_attention, own), eager):
        patches.share_item(mapping, name, value)
    patches.defer(lambda: model.set_attn_implementation(before))
    model.set_attn_implementation(name)
