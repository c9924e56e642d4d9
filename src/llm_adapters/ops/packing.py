"""Packs: several sequences laid end to end in one row, without padding, their common beginning stored once.

A segment (what is left of one sequence) sees the shared prefix and itself, nothing else, and its positions go on from
the prefix, so that every token gets exactly what it would get in a sequence of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Sizes come in steps. A CPU's matrix products are compiled and kept for every new shape: many shapes cost time, and
# memory that looks like a leak.
_TOKENS, _LONGEST = 32, 16
_ALIKE = 0.7  # of the longest in a band, the least that a segment may have: a round number, not a measured one


def rounded(count: int, step: int) -> int:
    """The next size up that is a multiple of `step`, or below it a power of two."""
    return -(-count // step) * step if count > step else 1 << max(0, count - 1).bit_length()


class Once:
    """Makes once what every layer asks for."""

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when `key` was first asked for."""
        kept = vars(self).setdefault("_kept", {})
        if key not in kept:
            kept[key] = make()
        return kept[key]


@dataclass
class Pack(Once):
    """One row of tokens: the shared prefix, then the segments, then fillers that see nothing and that nobody sees.

    Attributes:
        input_ids: (1, tokens), int64.
        position_ids: (1, tokens), int64: 0.. in the prefix, going on from its end in every segment.
        prefix: number of tokens of the shared prefix, 0 for none.
        lengths: tokens of each segment, all at least 1.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    prefix: int
    lengths: tuple[int, ...]

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
        fillers = [0] * (rounded(len(row), _TOKENS) - len(row))
        row, positions = row + fillers, positions + fillers
        return cls(torch.tensor([row], device=device), torch.tensor([positions], device=device), prefix, lengths)

    @property
    def tokens(self) -> int:
        """Tokens that are computed, the fillers counted."""
        return self.input_ids.shape[1]

    @property
    def end(self) -> int:
        """Where in the row the fillers begin."""
        return self.prefix + sum(self.lengths)

    @property
    def starts(self) -> list[int]:
        """Where in the row each segment begins."""
        starts, at = [], self.prefix
        for length in self.lengths:
            starts.append(at)
            at += length
        return starts

    @property
    def spans(self) -> torch.Tensor:
        """(1 + segments, 3), int64: where the prefix and each segment begin and end, and what they see before."""

        def make() -> torch.Tensor:
            ends = zip(self.starts, self.lengths, strict=True)
            rows = [(0, self.prefix, 0), *((at, at + size, self.prefix) for at, size in ends)]
            return torch.tensor(rows, device="cpu")

        return self.once("spans", make)

    @property
    def bands(self) -> tuple["Band", ...]:
        """The segments in runs of neighbours of about the same length, for attention."""

        def make() -> tuple[Band, ...]:
            runs: list[list[int]] = []
            for length in self.lengths:
                if runs and _alike([*runs[-1], length]):
                    runs[-1].append(length)
                else:
                    runs.append([length])
            bands: list[Band] = []
            for run in runs:
                start = bands[-1].end if bands else self.prefix
                bands.append(Band(self.prefix, start, tuple(run), self.input_ids.device))
            return tuple(bands)

        return self.once("bands", make)

    def visible(self, window: int | None) -> "Visible":
        """What the tokens of the shared prefix see, as of one segment."""

        def make() -> Visible:
            return Visible(torch.tensor([self.prefix], device=self.input_ids.device), 0, self.prefix, window)

        return self.once(("visible", window), make)


@dataclass
class Band(Once):
    """Segments of a pack that stand next to each other and that attention pads to one length.

    Attributes:
        prefix: tokens of the pack's shared prefix.
        start: where in the row the first segment begins.
        lengths: tokens of each segment.
        device: of the pack.
    """

    prefix: int
    start: int
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def end(self) -> int:
        """Where in the row the last segment ends."""
        return self.start + sum(self.lengths)

    @property
    def longest(self) -> int:
        """To so many tokens attention pads every segment."""
        return rounded(max(self.lengths), _LONGEST)

    def places(self, heads: int, groups: int, before: bool) -> torch.Tensor:
        """Where in the rows (tokens * heads) each padded place is, in the order (segments, groups, heads of each, ...).

        Args:
            heads: heads in each group.
            groups: groups of heads.
            before: whether each segment begins with the shared prefix.

        Returns:
            (segments * groups * heads * (prefix if before, and longest),), int64; padding points at a real token.
        """

        def make() -> torch.Tensor:
            lengths = self._lengths()[:, None]
            starts = self.start + lengths.cumsum(0) - lengths
            own = torch.arange(self.longest, device=self.device)
            own = starts + torch.where(own < lengths, own, 0)
            if before:
                first = torch.arange(self.prefix, device=self.device).expand(len(self.lengths), -1)
                own = torch.cat((first, own), 1)
            head = torch.arange(groups * heads, device=self.device)[:, None]
            return (own[:, None] * (groups * heads) + head).flatten()

        return self.once(("places", heads, groups, before), make)

    def padding(self, heads: int) -> torch.Tensor:
        """Which of `places` (without the prefix) are padding."""

        def make() -> torch.Tensor:
            padded = torch.arange(self.longest, device=self.device) >= self._lengths()[:, None]
            return padded[:, None].expand(-1, heads, -1).flatten().nonzero().flatten()

        return self.once(("padding", heads), make)

    def back(self, heads: int, before: bool) -> torch.Tensor:
        """The way back: for every row (segment tokens * heads), its index in the order of `places`."""

        def make() -> torch.Tensor:
            skip = self.prefix if before else 0
            columns = self.longest + skip
            parts = [
                (torch.arange(length, device=self.device)[:, None] + skip)
                + (index * heads + torch.arange(heads, device=self.device)) * columns
                for index, length in enumerate(self.lengths)
            ]
            return torch.cat(parts).flatten()

        return self.once(("back", heads, before), make)

    def visible(self, window: int | None) -> "Visible":
        """What its tokens see. With a `window`, themselves and the ``window - 1`` tokens before; None: all before."""
        return self.once(("visible", window), lambda: Visible(self._lengths(), self.prefix, self.longest, window))

    def _lengths(self) -> torch.Tensor:
        return torch.tensor(self.lengths, device=self.device)


@dataclass
class Visible(Once):
    """What the rows of padded segments see, whose columns are the shared prefix and then the segment's own tokens.

    Attributes:
        lengths: (segments,), int64: tokens of each.
        prefix: tokens of the shared prefix.
        longest: to so many tokens each segment is padded.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.
    """

    lengths: torch.Tensor
    prefix: int
    longest: int
    window: int | None

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, (segments, longest, prefix + longest): 0 where a token may look."""

        def make() -> torch.Tensor:
            device = self.lengths.device
            positions = torch.arange(self.prefix + self.longest, device=device)
            real = torch.arange(self.longest, device=device) < self.lengths[:, None]
            seen = causal(positions[self.prefix :], positions, self.window).expand(len(real), -1, -1).clone()
            seen[:, :, self.prefix :] &= real[:, None, :]
            seen[:, :, self.prefix] |= ~real  # a padded place sees something, so that its softmax is a number
            return additive(seen, dtype)

        return self.once(("bias", dtype), make)


def _alike(lengths: Sequence[int]) -> bool:
    """Whether segments of these lengths are padded to one, or else computed apart."""
    return max(lengths) <= 2 * _LONGEST or min(lengths) >= _ALIKE * max(lengths)


def causal(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which of the positions `keys` each of the positions `queries` sees, (queries, keys): those up to its own.

    With a `window`, no more than the last so many of them.
    """
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `visible`, else a very negative number."""
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
    left = sum(length - prefix for length in lengths)
    count = max(1, -(-left // max(1, budget - prefix)))
    packs: list[list[int]] = []
    while order:
        # Equal shares of what is left: a small last pack would waste the machine.
        share = left / max(1, count - len(packs))
        pack: list[int] = []
        size = 0
        for index in order:
            more = lengths[index] - prefix
            full = prefix + size + more > budget or size + more / 2 > share or len(pack) == most
            if pack and full:
                break
            pack.append(index)
            size += more
        packs.append(pack)
        order, left = order[len(pack) :], left - size
    return packs


padded_size = rounded
