"""Generation's key-value cache: a slot for every sequence, and attention over the slots and over new prompts at once.

One forward takes one token of each sequence that is being generated, and whole prompts of those that begin. All lie in
one row, as in a pack, so that every layer's matrix products are as large as they can be; only attention tells them
apart. Keys and values go into the cache here, and the model needs no cache of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_adapters.acceleration.packing import Pack, additive, causal

_COLUMNS = 32  # by which the cache grows


class SlotCache:
    """Keys and values, a slot per sequence; every slot begins with the prefix that all prompts share.

    It has no more columns than the longest sequence needs: batched products of a part of the columns would first copy
    that part, for every layer and token.

    Args:
        slots: number of sequences at a time.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.columns = slots, 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fit(self, columns: int) -> None:
        """Make room for `columns` tokens in every slot, and give back room that is not needed any more."""
        wanted = -(-columns // _COLUMNS) * _COLUMNS
        if self.columns < wanted or self.columns > wanted + 2 * _COLUMNS:
            kept = min(self.columns, wanted)
            for index, layer in self._layers.items():
                grown = [part.new_empty(*part.shape[:2], wanted, part.shape[3]) for part in layer]
                for old, new in zip(layer, grown, strict=True):
                    new[:, :, :kept] = old[:, :, :kept]
                    new[:, :, kept:] = 0
                self._layers[index] = grown[0], grown[1]
            self.columns = wanted

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (slots, key-value heads, columns, width), in the shape of the first ones seen.

        They begin as zeros: what no sequence has filled is read, and weighted with nothing.
        """
        if index not in self._layers:
            shapes = ((self.slots, len(part), self.columns, part.shape[-1]) for part in (key, value))
            keys, values = (part.new_zeros(shape) for part, shape in zip((key, value), shapes, strict=True))
            self._layers[index] = keys, values
        return self._layers[index]

    def copy(self, source: torch.Tensor, target: torch.Tensor, start: int, stop: int) -> None:
        """Copy columns ``start:stop`` of the slots `source` to the slots `target`, all at once, (slots,) int64 each."""
        for layer in self._layers.values():
            for part in layer:
                part[target, :, start:stop] = part[source, :, start:stop]


@dataclass
class Step:
    """What one forward computes: the row holds a token of each of the first slots, and then new prompts.

    Attributes:
        cache: what it reads and fills.
        at: (decoded,), int64: where in its slot the token of each of the first slots goes.
        pack: the new prompts, without the shared prefix; None for none.
        slots: (prompts,), int64: their slots. None stores the only one in every slot: the shared prefix itself.
    """

    cache: SlotCache
    at: torch.Tensor
    pack: Pack | None = None
    slots: torch.Tensor | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Every layer asks for the same: make it for the first."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of the decoded tokens: (decoded, columns), 0 where a token may look."""

        def make() -> torch.Tensor:
            columns = torch.arange(self.cache.columns, device=self.at.device)
            return additive(causal(self.at, columns, window), dtype)

        return self.once(("bias", window, dtype), make)

    def rows(self) -> torch.Tensor:
        """(decoded,), int64: 0, 1, 2, ..."""
        return self.once("rows", lambda: torch.arange(len(self.at), device=self.at.device))


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor],
    step: Step,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One token of each of the first slots, over what its slot holds, itself included.

    Args:
        query: (heads, decoded, width); `key` and `value` (key-value heads, decoded, width).
        kept: the layer's keys and values.
        step: says where the tokens go.
        scale: the factor on the scores.
        window: a token sees no more than so many tokens.

    Returns:
        (decoded, heads, width).
    """
    heads, count, width = query.shape
    groups = len(key)
    for whole, part in zip(kept, (key, value), strict=True):
        whole[step.rows(), :, step.at] = part.transpose(0, 1)
    keys, values = (whole[:count].flatten(0, 1) for whole in kept)
    queries = (query.transpose(0, 1) * scale).reshape(count * groups, heads // groups, width)
    scores = torch.bmm(queries, keys.transpose(1, 2))
    scores.view(count, heads, -1).add_(step.bias(window, scores.dtype)[:, None])
    return torch.bmm(torch.softmax(scores, -1), values).view(count, heads, -1)
