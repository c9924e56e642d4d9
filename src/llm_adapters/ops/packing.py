"""Packs: several sequences laid end to end in one row, without padding, their common beginning stored once.

A segment (what is left of one sequence) sees the shared prefix and itself, nothing else, and its positions go on from
the prefix, so that every token gets exactly what it would get in a sequence of its own.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from llm_adapters.ops.sizes import padded_size

_TOKENS, _SEQLEN = 32, 16  # steps of sizes, see `sizes`
_ALIKE = 0.7  # of the longest in a bucket, the least that a segment may have: a round number, not a measured one


class Cached:
    """An object that makes once what every layer asks it for."""

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make` when `key` was first asked for."""
        kept = vars(self).setdefault("_kept", {})
        if key not in kept:
            kept[key] = make()
        return kept[key]


@dataclass
class Pack(Cached):
    """One row of tokens: the shared prefix, then the segments, then padding that sees nothing and that nobody sees.

    Tensors that attention needs besides are made once, on the pack's device, when they are first asked for.

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
        """Lay `sequences` end to end, the first `prefix` tokens of all of them, which must be the same, once.

        Raises:
            ValueError: a sequence has no token beside the prefix.
        """
        lengths = tuple(len(sequence) - prefix for sequence in sequences)
        if min(lengths) < 1:
            raise ValueError(f"a sequence of {prefix + min(lengths)} tokens has none beside a prefix of {prefix}")
        row = [*sequences[0][:prefix], *(token for sequence in sequences for token in sequence[prefix:])]
        positions = [*range(prefix), *(position for length in lengths for position in range(prefix, prefix + length))]
        padding = [0] * (padded_size(len(row), _TOKENS) - len(row))
        row, positions = row + padding, positions + padding
        return cls(to_device([row], device), to_device([positions], device), prefix, lengths)

    @property
    def tokens(self) -> int:
        """Tokens that are computed, the padding counted."""
        return self.input_ids.shape[1]

    @property
    def end(self) -> int:
        """The place in the row where the padding begins."""
        return self.prefix + sum(self.lengths)

    @property
    def shares_prefix(self) -> bool:
        """Whether the segments begin with a shared prefix."""
        return self.prefix > 0

    @property
    def starts(self) -> list[int]:
        """The place in the row where each segment begins."""
        return [*itertools.accumulate(self.lengths[:-1], initial=self.prefix)]

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """(2 + segments,), int32: the places where the prefix (the first of them) and the segments begin and end."""

        def make() -> torch.Tensor:
            ends = itertools.accumulate(self.lengths, initial=self.prefix)
            return to_device([0, *ends], self.input_ids.device, torch.int32)

        return self.cached("cu_seqlens", make)

    @property
    def varlen(self) -> "VarlenIndex":
        """The segments as functions for variable lengths take them: the prefix, each segment, the padding."""

        def make() -> VarlenIndex:
            padding = self.tokens - self.end
            own = [size for size in (self.prefix, *self.lengths, padding) if size]
            seen = [self.prefix] * bool(self.prefix) + [self.prefix + size for size in self.lengths]
            seen += [padding] * bool(padding)
            rows = [*range(self.prefix)]
            for start, size in zip(self.starts, self.lengths, strict=True):
                rows += [*range(self.prefix), *range(start, start + size)]
            rows += range(self.end, self.tokens)
            device = self.input_ids.device
            return VarlenIndex(
                to_device([*itertools.accumulate(own, initial=0)], device, torch.int32),
                to_device([*itertools.accumulate(seen, initial=0)], device, torch.int32),
                to_device(rows, device),
                max(own),
                max(seen),
            )

        return self.cached("varlen", make)

    @property
    def buckets(self) -> tuple["LengthBucket", ...]:
        """The segments in runs of neighbours of about the same length, for attention that pads."""

        def make() -> tuple[LengthBucket, ...]:
            runs: list[list[int]] = []
            for length in self.lengths:
                if runs and _alike([*runs[-1], length]):
                    runs[-1].append(length)
                else:
                    runs.append([length])
            buckets: list[LengthBucket] = []
            for run in runs:
                start = buckets[-1].end if buckets else self.prefix
                buckets.append(LengthBucket(self.prefix, start, tuple(run), self.input_ids.device))
            return tuple(buckets)

        return self.cached("buckets", make)

    def causal_mask(self, window: int | None) -> "CausalMask":
        """The mask of the shared prefix, as of one segment."""

        def make() -> CausalMask:
            return CausalMask(torch.tensor([self.prefix], device=self.input_ids.device), 0, self.prefix, window)

        return self.cached(("causal mask", window), make)


class VarlenIndex(NamedTuple):
    """Places of the segments of a pack among its queries and among the keys that they see.

    Attributes:
        cu_seqlens_q: (segments + 1,), int32: where each segment's queries begin and end in the row.
        cu_seqlens_k: likewise where its keys do among the rows of `key_index`.
        key_index: (keys,), int64: the row of each key, the prefix again before every segment.
        max_seqlen_q: queries of the longest segment.
        max_seqlen_k: keys of the longest segment.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_index: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass
class LengthBucket(Cached):
    """Neighbouring segments of a pack that attention pads to one length.

    Attributes:
        prefix: tokens of the pack's shared prefix.
        start: the place in the row where the first segment begins.
        lengths: tokens of each segment.
        device: of the pack.
    """

    prefix: int
    start: int
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def end(self) -> int:
        """The place in the row where the last segment ends."""
        return self.start + sum(self.lengths)

    @property
    def padded_length(self) -> int:
        """Tokens to which attention pads every segment."""
        return padded_size(max(self.lengths), _SEQLEN)

    def gather_index(self, heads: int, groups: int, with_prefix: bool) -> torch.Tensor:
        """The row (of tokens * heads) in each padded place, in the order (segments, groups, heads of each, ...).

        Args:
            heads: heads in each group.
            groups: groups of heads.
            with_prefix: each segment begins with the shared prefix.

        Returns:
            (segments * groups * heads * ([prefix +] padded_length),), int64; padding points at a real token.
        """

        def make() -> torch.Tensor:
            lengths = self._lengths()[:, None]
            starts = self.start + lengths.cumsum(0) - lengths
            own = torch.arange(self.padded_length, device=self.device)
            own = starts + torch.where(own < lengths, own, 0)
            if with_prefix:
                first = torch.arange(self.prefix, device=self.device).expand(len(self.lengths), -1)
                own = torch.cat((first, own), 1)
            head = torch.arange(groups * heads, device=self.device)[:, None]
            return (own[:, None] * (groups * heads) + head).flatten()

        return self.cached(("gather index", heads, groups, with_prefix), make)

    def padding(self, heads: int) -> torch.Tensor:
        """Boolean mask of the places of `gather_index` (without the prefix): True where they are padding."""

        def make() -> torch.Tensor:
            padded = torch.arange(self.padded_length, device=self.device) >= self._lengths()[:, None]
            return padded[:, None].expand(-1, heads, -1).flatten()

        return self.cached(("padding", heads), make)

    def scatter_index(self, heads: int, with_prefix: bool) -> torch.Tensor:
        """The way back: for every row (segment tokens * heads), its place in the order of `gather_index`."""

        def make() -> torch.Tensor:
            skip = self.prefix if with_prefix else 0
            columns = self.padded_length + skip
            parts = [
                (torch.arange(length, device=self.device)[:, None] + skip)
                + (index * heads + torch.arange(heads, device=self.device)) * columns
                for index, length in enumerate(self.lengths)
            ]
            return torch.cat(parts).flatten()

        return self.cached(("scatter index", heads, with_prefix), make)

    def causal_mask(self, window: int | None) -> "CausalMask":
        """The mask of its segments. With a `window` a token sees itself and the ``window - 1`` tokens before it."""
        mask = lambda: CausalMask(self._lengths(), self.prefix, self.padded_length, window)  # noqa: E731
        return self.cached(("causal mask", window), mask)

    def _lengths(self) -> torch.Tensor:
        return torch.tensor(self.lengths, device=self.device)


@dataclass
class CausalMask(Cached):
    """The causal mask of padded segments, whose columns are the shared prefix and then the segment's own tokens.

    Attributes:
        lengths: (segments,), int64: tokens of each.
        prefix: tokens of the shared prefix.
        padded_length: tokens to which each segment is padded.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.
    """

    lengths: torch.Tensor
    prefix: int
    padded_length: int
    window: int | None

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask, (segments, padded_length, prefix + padded_length): 0 where a token may look."""

        def make() -> torch.Tensor:
            device = self.lengths.device
            positions = torch.arange(self.prefix + self.padded_length, device=device)
            real = torch.arange(self.padded_length, device=device) < self.lengths[:, None]
            seen = causal(positions[self.prefix :], positions, self.window).expand(len(real), -1, -1).clone()
            seen[:, :, self.prefix :] &= real[:, None, :]
            seen[:, :, self.prefix] |= ~real  # a padded place sees something, so that its softmax is a number
            return additive(seen, dtype)

        return self.cached(("bias", dtype), make)


def to_device(values: Any, device: torch.device | str | None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make a tensor of (nested) lists on `device`, without waiting for what a GPU is computing."""
    tensor = torch.tensor(values, dtype=dtype)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _alike(lengths: Sequence[int]) -> bool:
    """True if segments of these lengths are padded to one, and not computed apart."""
    return max(lengths) <= 2 * _SEQLEN or min(lengths) >= _ALIKE * max(lengths)


def causal(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Boolean mask (queries, keys): True where a position of `queries` sees one of `keys`, those up to its own.

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
    """Number of tokens that all `sequences` begin with; at least one is left of each (0 for a single sequence)."""
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


def make_packs(
    lengths: Sequence[int], prefix: int, max_tokens: int, max_sequences: int | None = None
) -> list[list[int]]:
    """Cut sequences of these `lengths` into packs of about equal size and of neighbours in length.

    Args:
        lengths: tokens of each sequence, the prefix counted.
        prefix: tokens that all share and that a pack holds once.
        max_tokens: of a pack; a longer sequence gets a pack of its own.
        max_sequences: of a pack; None for no limit.

    Returns:
        For each pack the indices of its sequences, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    left = sum(length - prefix for length in lengths)
    count = max(1, -(-left // max(1, max_tokens - prefix)))
    packs: list[list[int]] = []
    while order:
        # Equal shares of what is left: a small last pack would waste the machine.
        share = left / max(1, count - len(packs))
        pack: list[int] = []
        size = 0
        for index in order:
            more = lengths[index] - prefix
            full = prefix + size + more > max_tokens or size + more / 2 > share or len(pack) == max_sequences
            if pack and full:
                break
            pack.append(index)
            size += more
        packs.append(pack)
        order, left = order[len(pack) :], left - size
    return packs
