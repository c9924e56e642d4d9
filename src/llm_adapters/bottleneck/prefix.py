"""Learned keys and values beside the sequence's own, in any attention block that can use a cache.

Every decoder of transformers hands its new keys and values to a cache and attends to what it gives back. A stand-in for
the cache puts the prefix in front of that, so one way serves all families, nothing of it is in the real cache, and the
positions of the tokens stay as they are.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llm_adapters.compat.transformers import attention_implementation
from llm_adapters.errors import RequestError

_CACHES = ("cache", "past_key_values", "layer_past")  # what the families and releases of transformers call it
_IMPLEMENTATIONS = ("eager", "sdpa")  # those whose masks are tensors (batch, heads, queries, keys)


class PrefixedCache:
    """Stands in for the cache (or for none) during one call of an attention block."""

    def __init__(self, cache: Any, prefix: torch.Tensor) -> None:
        self.cache, self.prefix = cache, prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def get_seq_length(self, *args: Any) -> int:
        """Number of tokens in the real cache."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix, then what the real cache makes of the new `keys` and `values`.

        Returns:
            Keys and values, each (batch, num_key_value_heads, keys, head_dim).
        """
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        before = self.prefix.to(keys.dtype).unsqueeze(1).expand(2, keys.shape[0], *self.prefix.shape[1:])
        return torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)


def shape_of(name: str, block: nn.Module, settings: Any) -> tuple[int, int]:
    """Number of key-value heads of an attention block and their size, (num_key_value_heads, head_dim).

    Args:
        name: the block's name, for the message.
        block: the block.
        settings: the decoder's configuration.

    Raises:
        RequestError: the block can use no cache, and so no prefix; or it has ALiBi as Falcon and MPT compute it, where
            the prefix would be farther away the more padding there is.
    """
    parameters = inspect.signature(block.forward).parameters
    if getattr(settings, "alibi", False) or "position_bias" in parameters:
        raise RequestError(
            f"prefix_length: {type(block).__name__} measures distances over the padding (ALiBi), where a prefix has no "
            "position of its own: leave prefix_length at 0"
        )
    if not any(cache in parameters for cache in _CACHES) or "attention_mask" not in parameters:
        raise RequestError(
            f"prefix_length: the attention block {name} ({type(block).__name__}) takes no cache and mask, which a "
            "prefix needs: leave prefix_length at 0"
        )
    heads = settings.num_attention_heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    if getattr(settings, "multi_query", False) and not getattr(settings, "new_decoder_architecture", False):
        return 1, head_dim  # Falcon, whose newer form repeats the keys for every head before it caches them
    return getattr(settings, "num_key_value_heads", None) or heads, head_dim


def prepend(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prefixes: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give an attention block prefixes in front of its keys and values: its arguments with another cache and mask.

    Args:
        block: the block that is about to be called with `args` and `kwargs`.
        args, kwargs: what it would be called with.
        prefixes: each (2, num_key_value_heads, prefix_length, head_dim), keys and values, with the rows of the batch
            that see it (batch,), or None for all.

    Raises:
        RequestError: the model runs an attention that takes other masks than tensors.
    """
    implementation = attention_implementation(block)
    if implementation not in _IMPLEMENTATIONS:
        raise RequestError(
            f"a prefix works with the attention implementations {' and '.join(_IMPLEMENTATIONS)}, and the model runs "
            f"{implementation}: call model.set_attn_implementation('sdpa')"
        )
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    given = bound.arguments
    name = next(cache for cache in _CACHES if cache in bound.signature.parameters)
    cache = given.get(name)
    hidden = next(iter(given.values()))
    given["attention_mask"] = _mask(given.get("attention_mask"), cache, _layer(block), hidden, prefixes)
    length = sum(prefix.shape[-2] for prefix, _ in prefixes)
    if given.get("alibi") is not None:  # BLOOM's, from the first token on, which is where the prefix is then
        given["alibi"] = nn.functional.pad(given["alibi"], (length, 0))
    given[name] = PrefixedCache(cache, torch.cat([prefix for prefix, _ in prefixes], -2))
    return bound.args, bound.kwargs


def _mask(
    mask: torch.Tensor | None,
    cache: Any,
    layer: int,
    hidden: torch.Tensor,
    prefixes: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> torch.Tensor | None:
    """The mask (batch, heads or 1, queries, keys) with columns for the prefixes on the left.

    A prefix is as visible to a token as the token is to itself, which holds for masks of either kind: numbers that are
    added to the scores, and truth values.
    """
    queries = hidden.shape[1]
    keys, start = (queries, 0) if cache is None else cache.get_mask_sizes(queries, layer)
    itself = (0 if cache is None else cache.get_seq_length(layer)) - start
    if mask is None:  # plain causal attention
        if queries == 1 and all(rows is None for _, rows in prefixes):
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device).tril(itself)[None, None]
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise RequestError("a prefix works with masks (batch, heads, queries, keys): the model uses another kind")
    seen = mask.diagonal(itself, -2, -1).unsqueeze(-1)
    hidden_value = ~seen if mask.dtype == torch.bool else torch.full_like(seen, torch.finfo(mask.dtype).min)
    columns = []
    for prefix, rows in prefixes:
        column = seen if rows is None else torch.where(rows[:, None, None, None], seen, hidden_value)
        columns.append(column.expand(*column.shape[:-1], prefix.shape[-2]))
    batch = max(column.shape[0] for column in (mask, *columns))
    return torch.cat([tensor.expand(batch, *tensor.shape[1:]) for tensor in (*columns, mask)], -1)


def _layer(block: nn.Module) -> int:
    return next(index for name in ("layer_idx", "layer_id") if (index := getattr(block, name, None)) is not None)
