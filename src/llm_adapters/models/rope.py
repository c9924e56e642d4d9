"""Rotary positions whose frequencies depend on the longest row of a forward (LongRoPE, dynamic NTK scaling)."""

from collections.abc import Iterator, Mapping
from typing import Any


def independent_length(model: Any) -> int | None:
    """Longest row, in tokens, up to which the frequencies are the same whatever rows are beside it.

    A longer one changes those of all rows that are computed with it.

    Args:
        model: a transformers model, with adapters or without.

    Returns:
        The length; None where the frequencies never depend on lengths.
    """
    return min((length for module in model.modules() for length in _lengths(module)), default=None)


def _lengths(rotary: Any) -> Iterator[int]:
    types, settings = getattr(rotary, "rope_type", None), getattr(rotary, "config", None)
    for layer_type, rope_type in types.items() if isinstance(types, Mapping) else [(None, types)]:
        parameters = getattr(settings, "rope_parameters", None) or {}
        parameters = parameters if layer_type is None else parameters[layer_type]
        if rope_type == "longrope":
            yield parameters["original_max_position_embeddings"]
        elif isinstance(rope_type, str) and "dynamic" in rope_type:
            yield rotary.original_max_seq_len
