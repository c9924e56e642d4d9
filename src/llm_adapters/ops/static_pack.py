"""Packs of round sizes with nothing of a single pack on the host: what is captured for one is replayed for all others.

Sizes are rounded by a rule that knows the pack alone, so that a run that is resumed rounds as the first one did.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch

from llm_adapters.ops.cross_entropy import IGNORE_INDEX
from llm_adapters.ops.packing import Pack, VarlenIndex, to_device
from llm_adapters.ops.sizes import round_up

_STEP = 128  # tokens; larger packs are rounded to a sixteenth of the power of two below them
_LABELS, _SEGMENTS = 8, 32  # labels come in eighths of the tokens; segments in thirty-seconds


class StaticSizes(NamedTuple):
    """All that may differ between two packs and is no value in a tensor.

    Attributes:
        tokens: of the row, with at least one of padding.
        keys: of all segments, the shared prefix again before each; as many as `tokens` where none is shared.
        segments: the prefix, the padding and empty ones among them.
        labels: with those that are ignored.
        max_seqlen_q: at least the tokens of the longest segment.
        max_seqlen_k: at least the keys that it sees.
    """

    tokens: int
    keys: int
    segments: int
    labels: int
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, pack: Pack, labels: int) -> "StaticSizes":
        """The sizes to which a pack with so many labels is rounded."""
        tokens = _rounded(pack.end + 1)
        repeated = _rounded(pack.prefix * len(pack.lengths))
        # The padding's length changes with every pack: its bound is taken, so that the longest segment decides.
        longest_q = max(pack.prefix, pack.max_seqlen, _step(tokens))
        longest_k = max(pack.prefix + pack.max_seqlen, _step(tokens) + (_step(repeated) if repeated else 0))
        return cls(
            tokens,
            tokens + repeated,
            round_up(len(pack.lengths) + 2, max(16, tokens // _SEGMENTS)),
            round_up(max(labels, 1), tokens // _LABELS),
            _power_of_two(longest_q),
            _power_of_two(longest_k),
        )


class StaticPack(Pack):
    """A pack whose tensors stay where they are and are filled with one pack after the other.

    It has what a `Pack` has as far as that is a tensor or a size; asked for more (``prefix``, ``lengths``), it raises
    AttributeError. The padding is a segment of its own, which takes the keys that are left over too; empty segments
    follow.

    Args:
        sizes: its sizes.
        device: where its tensors are.
    """

    def __init__(self, sizes: StaticSizes, device: torch.device | str | None = None) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.input_ids, self.position_ids = zeros(1, sizes.tokens), zeros(1, sizes.tokens)
        cu_seqlens_q, cu_seqlens_k = (zeros(sizes.segments + 1, dtype=torch.int32) for _ in range(2))
        index = VarlenIndex(cu_seqlens_q, cu_seqlens_k, zeros(sizes.keys), sizes.max_seqlen_q, sizes.max_seqlen_k)
        self.cached("varlen", lambda: index)
        self._shares_prefix = sizes.keys > sizes.tokens

    @property
    def shares_prefix(self) -> bool:
        """Whether the segments begin with a shared prefix."""
        return self._shares_prefix

    def fill(self, pack: Pack) -> None:
        """Take over `pack`, which `StaticSizes.of` rounds to this one's sizes; the host waits for nothing."""
        end, prefix = pack.end, pack.prefix
        for own, other in ((self.input_ids, pack.input_ids), (self.position_ids, pack.position_ids)):
            own[:, :end].copy_(other[:, :end])
            own[:, end:].zero_()
        cu_seqlens_q, cu_seqlens_k, key_index = self.varlen[:3]
        padding = self.tokens - end
        rows = [*range(prefix)] if prefix else []
        for start, length in zip(pack.starts, pack.lengths, strict=True):
            rows += [*range(prefix), *range(start, start + length)]
        # Spread over the padding, as their gradients are added up there.
        left_over = len(key_index) - len(rows)
        rows += [end + i % padding for i in range(left_over)]
        first = [prefix] * bool(prefix)
        empty = [0] * (len(cu_seqlens_q) - 2 - len(first) - len(pack.lengths))
        own_lengths = [*first, *pack.lengths, padding, *empty]
        seen_lengths = [*first, *(prefix + length for length in pack.lengths), left_over, *empty]
        for tensor, values in (
            (cu_seqlens_q, [*accumulate(own_lengths, initial=0)]),
            (cu_seqlens_k, [*accumulate(seen_lengths, initial=0)]),
            (key_index, rows),
        ):
            tensor.copy_(to_device(values, tensor.device, tensor.dtype))

    def fill_labels(
        self, own: tuple[torch.Tensor, torch.Tensor], places: torch.Tensor, targets: torch.Tensor, end: int
    ) -> None:
        """Fill `own`, places and targets of all labels, with those of a pack that ends at `end`; the rest is ignored.

        Args:
            own: (labels,), int64, both.
            places: (fewer labels,), int64, in the row.
            targets: likewise.
            end: where the pack's padding begins.
        """
        count, padding = len(places), self.tokens - end
        own[0][:count].copy_(places)
        own[1][:count].copy_(targets)
        rest = [end + i % padding for i in range(len(own[0]) - count)]
        own[0][count:].copy_(to_device(rest, own[0].device, torch.int64))
        own[1][count:].fill_(IGNORE_INDEX)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a pack of round sizes has no {name}: that would be read on the host")


def _step(size: int) -> int:
    return max(_STEP, (1 << size.bit_length() - 1) // 16)


def _rounded(size: int) -> int:
    return round_up(size, _step(size)) if size else 0


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
