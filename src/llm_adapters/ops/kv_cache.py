"""Generation's paged key-value cache: block tables, storage, and what one forward computes.

One forward takes the next tokens of each running sequence, and whole prompts of those that begin (prefills). All are in
one row, as in a pack, so that every layer's matrix products are as large as they can be; only attention tells them
apart (see `paged_attention`). Keys and values go into the cache here, and the model needs no cache of its own.

A block holds the keys and values of `BLOCK_SIZE` neighbouring tokens of one sequence (Kwon et al. 2023, section 4). The
prefix that all prompts share is stored once for each adapter, outside the blocks. With blocks of 64 tokens, and two
sequences of 100 and 150 tokens after the shared prefix:

    block_table         block   keys, values of a layer        block_owner   block_index
    seq 0:  1  4  0         0   NULL_BLOCK: padding writes here         -1             0
    seq 1:  2  3  5         1   seq 0, tokens   0 ..  63                 0             0
                            2   seq 1, tokens   0 ..  63                 1             0
                            3   seq 1, tokens  64 .. 127                 1             1
                            4   seq 0, tokens  64 ..  99                 0             1
                            5   seq 1, tokens 128 .. 149                 1             2
                            6   free                                    -1
                            8   <- num_used_blocks: all in use are below, a round number
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llm_adapters.ops.backends import function
from llm_adapters.ops.packing import Cached, Pack
from llm_adapters.ops.sizes import padded_size

BLOCK_SIZE = 64
BLOCK_STEP = 32  # blocks are multiplied in such numbers (see `sizes.padded_size`)
NULL_BLOCK = 0  # the block of no sequence, for what is computed and dropped


class PagedCache:
    """Keys and values of the running sequences. It grows, and never shrinks.

    Args:
        num_seqs: sequences at a time.
        max_seq_len: tokens of the longest sequence, without the shared prefix.
        device: of the model.

    Attributes:
        prefix: tokens of the prefix that all sequences share; 0 until it is stored.
        block_table: (sequences, blocks), int64: the blocks of each sequence in order, `NULL_BLOCK` for none.
        block_owner: (blocks,), int64: the sequence that each block belongs to, -1 for none.
        block_index: (blocks,), int64: the place of each block among those of its sequence.
        num_used_blocks: all blocks in use are below; a round number.
        layers: for each layer its keys and its values, (blocks, key-value heads, BLOCK_SIZE, head_dim).
    """

    def __init__(self, num_seqs: int, max_seq_len: int, device: torch.device) -> None:
        self.prefix, self.num_used_blocks = 0, 1
        self.block_table = torch.full((0, 0), NULL_BLOCK, device=device)
        self.block_owner = torch.full((1,), -1, device=device)
        self.block_index = torch.zeros_like(self.block_owner)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._held: list[list[int]] = []
        self._free: list[int] = []  # a heap
        self._prefixes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._stacked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.grow(num_seqs, max_seq_len, num_seqs * num_blocks(max_seq_len))

    def grow(self, num_seqs: int, max_seq_len: int, blocks: int) -> None:
        """Make room for so many sequences, of at most so many tokens, that have so many blocks together.

        What has to grow becomes at least twice as large, so that many small requests for more cost little.
        """
        rows, columns = self.block_table.shape
        if num_seqs > rows or num_blocks(max_seq_len) > columns:
            more_rows = _enlarged(rows, num_seqs) - rows
            more_columns = _enlarged(columns, num_blocks(max_seq_len)) - columns
            self.block_table = nn.functional.pad(self.block_table, (0, more_columns, 0, more_rows), value=NULL_BLOCK)
            self._held += [[] for _ in range(more_rows)]
        capacity = len(self.block_owner)
        if 1 + blocks <= capacity:
            return
        larger = padded_size(1 + blocks if capacity == 1 else _enlarged(capacity, 1 + blocks), BLOCK_STEP)
        self._free += range(capacity, larger)  # the highest numbers come last: still a heap
        self.block_owner = nn.functional.pad(self.block_owner, (0, larger - capacity), value=-1)
        self.block_index = nn.functional.pad(self.block_index, (0, larger - capacity))
        for layer, old in self.layers.items():
            new = tuple(part.new_empty(larger, *part.shape[1:]) for part in old)
            for to, part in zip(new, old, strict=True):
                to[: self.num_used_blocks] = part[: self.num_used_blocks]
            self.layers[layer] = new[0], new[1]

    @property
    def num_bytes(self) -> int:
        """Memory that the blocks of all layers have."""
        return sum(part.nbytes for pair in self.layers.values() for part in pair)

    def blocks_of(self, seq: int) -> list[int]:
        """The blocks of `seq`, in their order."""
        return self._held[seq]

    def reserve(self, seq: int, tokens: int) -> None:
        """Let `seq` have blocks for so many tokens, the shared prefix not counted."""
        held, before = self._held[seq], self.num_used_blocks
        while len(held) < num_blocks(tokens):
            block = heapq.heappop(self._free)
            self.block_table[seq, len(held)], self.block_owner[block], self.block_index[block] = block, seq, len(held)
            held.append(block)
            self.num_used_blocks = max(self.num_used_blocks, padded_size(block + 1, BLOCK_STEP))
        if self.num_used_blocks > before:
            for layer in self.layers.values():
                for part in layer:
                    part[before : self.num_used_blocks] = 0

    def release(self, seq: int) -> None:
        """Take back all blocks of `seq`."""
        for block in self._held[seq]:
            heapq.heappush(self._free, block)
            self.block_owner[block] = -1
        self.block_table[seq] = NULL_BLOCK
        self._held[seq] = []

    def copy(self, source: torch.Tensor, target: torch.Tensor, first: int = 0) -> None:
        """Copy what the sequences `source` hold to the sequences `target`, which have as many blocks.

        Args:
            source: (count,), int64.
            target: (count,), int64.
            first: the blocks before this one are the same already.
        """
        blocks = self.block_table[source, first:].flatten(), self.block_table[target, first:].flatten()
        self._move(*(part[blocks[1] != NULL_BLOCK] for part in blocks))

    def compact(self) -> None:
        """Move blocks down where many below the highest one are free."""
        used = sum(map(len, self._held))
        if self.num_used_blocks <= padded_size(used + 1 + used // 8, BLOCK_STEP):
            return
        owner_of = {block: (seq, index) for seq, held in enumerate(self._held) for index, block in enumerate(held)}
        highest = sorted((block for block in owner_of if block > used), reverse=True)
        lowest = [heapq.heappop(self._free) for _ in highest]
        source, target = (torch.tensor(p, dtype=torch.int64, device=self.block_table.device) for p in (highest, lowest))
        self._move(source, target)
        owner, index = self.block_owner[source], self.block_index[source]
        self.block_owner[target], self.block_index[target], self.block_table[owner, index] = owner, index, target
        self.block_owner[source] = -1
        for old, new in zip(highest, lowest, strict=True):
            seq, place = owner_of[old]
            self._held[seq][place] = new
            heapq.heappush(self._free, old)
        self.num_used_blocks = padded_size(used + 1, BLOCK_STEP)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for layer in self.layers.values():
            for part in layer:
                part[target] = part[source]

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks of a layer, made for keys and values like these where there are none yet.

        They begin as zeros: what no sequence has filled is read, and weighted with nothing.
        """
        if index not in self.layers:
            capacity, used = len(self.block_owner), self.num_used_blocks
            keys, values = (part.new_empty(capacity, len(part), BLOCK_SIZE, part.shape[-1]) for part in (key, value))
            keys[:used] = values[:used] = 0
            self.layers[index] = keys, values
        return self.layers[index]

    def clear_prefix(self) -> None:
        """Forget the shared prefix of all adapters."""
        self.prefix = 0
        self._prefixes.clear()
        self._stacked.clear()

    def keep_prefix(self, index: int, key: torch.Tensor, value: torch.Tensor, adapter: int = 0) -> None:
        """Store the shared prefix of a layer by one adapter: keys and values, (key-value heads, prefix, head_dim)."""
        self.prefix = key.shape[1]
        self._prefixes[index, adapter] = key.contiguous(), value.contiguous()
        self._stacked.pop(index, None)

    def prefix_of(self, index: int, adapter: int = 0) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values as `keep_prefix` was given them; None where there is no prefix."""
        return self._prefixes.get((index, adapter))

    def prefixes_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same of all adapters, (adapters, key-value heads, prefix, head_dim)."""
        if index not in self._stacked and (index, 0) in self._prefixes:
            own = [pair for (layer, _), pair in sorted(self._prefixes.items()) if layer == index]
            keys, values = zip(*own, strict=True)
            self._stacked[index] = torch.stack(keys), torch.stack(values)
            for adapter, pair in enumerate(zip(*self._stacked[index], strict=True)):
                self._prefixes[index, adapter] = pair  # so that they are in memory once
        return self._stacked.get(index)


def num_blocks(tokens: int) -> int:
    """Blocks that so many tokens fill."""
    return -(-tokens // BLOCK_SIZE)


def _enlarged(size: int, needed: int) -> int:
    """`size` where it is enough, else at least twice as much."""
    return size if needed <= size else max(needed, 2 * size)


@dataclass
class DecodeBatch(Cached):
    """Tokens that go on from what some sequences hold, as many neighbours of each.

    Numbers that are known on the host are kept there, so that nothing has to wait for the device.

    Attributes:
        seqs: the sequences, none twice; -1 for a row that only makes the number a round one.
        positions: (sequences, query tokens), int64.
        valid: (sequences, query tokens), bool: the tokens of a sequence; what the others compute is dropped.
        adapters: the number of each sequence's adapter.
    """

    seqs: tuple[int, ...]
    positions: torch.Tensor
    valid: torch.Tensor
    adapters: tuple[int, ...]

    @property
    def seq_ids(self) -> torch.Tensor:
        """`seqs` on the device, (sequences,), int64."""
        return self.cached("seq_ids", lambda: torch.tensor(self.seqs, device=self.positions.device))

    @property
    def adapter_ids(self) -> torch.Tensor:
        """`adapters` on the device, (sequences,), int64."""
        return self.cached("adapter_ids", lambda: torch.tensor(self.adapters, device=self.positions.device))

    def slot_mapping(self, cache: PagedCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset in it of every token, (sequences * query tokens,) int64 each."""
        own = torch.where(self.valid, self.positions - cache.prefix, 0)
        blocks = cache.block_table[self.seq_ids[:, None], own // BLOCK_SIZE].masked_fill(~self.valid, NULL_BLOCK)
        return blocks.flatten(), (own % BLOCK_SIZE).flatten()


@dataclass
class ForwardBatch(Cached):
    """The row that one forward computes: tokens that go on, and then new prompts.

    Attributes:
        cache: read and filled.
        decodes: the tokens that go on, in the order of the row.
        prefills: the new prompts, without the shared prefix; None for none.
        prefill_seqs: their sequences. None where the only prompt is the shared prefix itself, or what of it comes after
            a learned one.
        adapter: the number of the new prompts' adapter.
    """

    cache: PagedCache
    decodes: Sequence[DecodeBatch] = ()
    prefills: Pack | None = None
    prefill_seqs: Sequence[int] | None = None
    adapter: int = 0

    def adapters(self) -> torch.Tensor:
        """The adapter of each row, (tokens,), int64, on the host."""
        found = [torch.tensor(d.adapters).repeat_interleave(d.positions.shape[1]) for d in self.decodes]
        if self.prefills is not None:
            found.append(torch.full((self.prefills.tokens - self.prefills.prefix,), self.adapter))
        return torch.cat(found)

    def slot_mapping(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset in it of every token in the row, (tokens,) int64 each."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            cache, pack = self.cache, self.prefills
            found = [decode.slot_mapping(cache) for decode in self.decodes]
            if pack is not None and self.prefill_seqs is not None:
                own = pack.position_ids[0, pack.prefix : pack.end] - cache.prefix
                row = [seq for seq, size in zip(self.prefill_seqs, pack.lengths, strict=True) for _ in range(size)]
                padding = own.new_full((pack.tokens - pack.end,), NULL_BLOCK)
                blocks = cache.block_table[torch.tensor(row, device=own.device), own // BLOCK_SIZE]
                found += [(blocks, own % BLOCK_SIZE), (padding, torch.zeros_like(padding))]
            blocks, offsets = zip(*found, strict=True)
            return torch.cat(blocks), torch.cat(offsets)

        return self.cached("slot_mapping", make)


def store(layer: int, key: torch.Tensor, value: torch.Tensor, batch: ForwardBatch) -> None:
    """Put the row's keys and values, (key-value heads, tokens, head_dim), where they belong."""
    cache, pack = batch.cache, batch.prefills
    if pack is not None and batch.prefill_seqs is None:
        count = pack.end - pack.prefix
        computed = key[:, :count], value[:, :count]
        learned = cache.prefix_of(layer, batch.adapter)
        keys, values = (
            computed if learned is None else (torch.cat(pair, 1) for pair in zip(learned, computed, strict=True))
        )
        cache.keep_prefix(layer, keys, values, batch.adapter)
        return
    blocks, offsets = batch.slot_mapping()
    for stored, part in zip(cache.layer(layer, key, value), (key, value), strict=True):
        rows = part.transpose(0, 1)
        if kernel := function("store_kv", part):
            kernel(rows, stored, blocks, offsets)
        else:
            stored[blocks, :, offsets] = rows
