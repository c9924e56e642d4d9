"""Packs: several sequences laid end to end in one row, without padding, their common beginning stored once.

A segment (what is left of one sequence) sees the shared prefix and itself, nothing else, and its positions go on from
the prefix, so that every token gets exactly what it would get in a sequence of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Pack:
    """One row of tokens: the shared prefix, then the segments.

    Attributes:
        input_ids: (1, tokens), int64.
        position_ids: (1, tokens), int64: 0.. in the prefix, going on from its end in every segment.
        prefix: number of tokens of the shared prefix, 0 for none.
        lengths: tokens of each segment, all at least 1.
        gather: (segments, longest): where in the row each segment's tokens are; a padded place points at its first.
        scatter: (tokens - prefix,): where in the flattened ``gather`` each of the row's segment tokens is.
        padded: (places,): the places of the flattened ``gather`` that are padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    prefix: int
    lengths: tuple[int, ...]
    gather: torch.Tensor
    scatter: torch.Tensor
    padded: torch.Tensor
    _biases: dict[tuple[int | None, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]], prefix: int = 0, device: torch.device | str | None = None
    ) -> "Pack":
        """Lay `sequences` end to end, the first `prefix` tokens of all of them, which must be the same, once."""
        lengths = tuple(len(sequence) - prefix for sequence in sequences)
        if min(lengths) < 1:
            raise ValueError(f"a sequence of {prefix + min(lengths)} tokens has none beside a prefix of {prefix}")
        row = [*sequences[0][:prefix], *(token for sequence in sequences for token in sequence[prefix:])]
        positions = [*range(prefix), *(at for length in lengths for at in range(prefix, prefix + length))]
        width = max(lengths)
        # Lists, as a few hundred small tensor operations for each pack would cost more than the tokens' arithmetic.
        gather: list[list[int]] = []
        scatter: list[int] = []
        padded: list[int] = []
        start = prefix
        for index, length in enumerate(lengths):
            gather.append([*range(start, start + length), *[start] * (width - length)])
            scatter += range(index * width, index * width + length)
            padded += range(index * width + length, (index + 1) * width)
            start += length
        return cls(
            torch.tensor([row], device=device),
            torch.tensor([positions], device=device),
            prefix,
            lengths,
            torch.tensor(gather, device=device),
            torch.tensor(scatter, device=device),
            torch.tensor(padded, dtype=torch.int64, device=device),
        )

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return self.input_ids.shape[1]

    @property
    def starts(self) -> list[int]:
        """Where in the row each segment begins."""
        starts, at = [], self.prefix
        for length in self.lengths:
            starts.append(at)
            at += length
        return starts

    def bias(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to the scores: 0 where a token may look, else a very negative number.

        Args:
            window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.
            dtype: of the scores.

        Returns:
            For the prefix, (prefix, prefix); for the segments, (segments, longest, prefix + longest), where the
            columns are the prefix and then the segment's own tokens.
        """
        key = (window, dtype)
        if key not in self._biases:
            device = self.gather.device
            width = self.gather.shape[1]
            positions = torch.arange(self.prefix + width, device=device)
            visible = _causal(positions, positions, window)
            real = torch.arange(width, device=device) < torch.tensor(self.lengths, device=device)[:, None]
            seen = visible[self.prefix :].expand(len(self.lengths), -1, -1).clone()
            seen[:, :, self.prefix :] &= real[:, None, :]
            seen[:, :, self.prefix] |= ~real  # a padded place sees something, so that its softmax is a number
            self._biases[key] = (
                _additive(visible[: self.prefix, : self.prefix], dtype),
                _additive(seen, dtype),
            )
        return self._biases[key]


def _causal(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min / 2
    )


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all `sequences` begin with; at least one is left of each (0 for a single sequence)."""
    if len(sequences) < 2:
        return 0
    # What the first and the last in alphabetical order share, all between them share.
    first, last = min(map(list, sequences)), max(map(list, sequences))
    shared = 0
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        shared += 1
    return min(shared, min(map(len, sequences)) - 1)


def split(lengths: Sequence[int], prefix: int, budget: int, most: int | None = None) -> list[list[int]]:
    """Cut sequences of these `lengths` into packs of about equal size and of neighbours in length.

    Args:
        lengths: tokens of each sequence, the prefix counted.
        prefix: tokens that all share and that a pack holds once.
        budget: the most tokens of a pack; a longer sequence gets a pack of its own.
        most: the most sequences of a pack; None for no limit.

    Returns:
        For each pack the indices of its sequences, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    total = sum(length - prefix for length in lengths)
    count = max(1, -(-total // max(1, budget - prefix)))
    aim = prefix + -(-total // count)  # equal shares: a small last pack would waste the machine
    packs: list[list[int]] = []
    size = budget + 1
    for index in order:
        more = lengths[index] - prefix
        full = most is not None and packs and len(packs[-1]) >= most
        if not packs or full or size + more > budget or size >= aim:
            packs.append([])
            size = prefix
        packs[-1].append(index)
        size += more
    return packs
