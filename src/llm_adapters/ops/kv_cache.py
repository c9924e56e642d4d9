"""Generation's key-value cache, in pages, and the attention of tokens over it.

One forward takes the next tokens of each answer that is being generated, and whole prompts of those that begin. All lie
in one row, as in a pack, so that every layer's matrix products are as large as they can be; only attention tells them
apart. Keys and values go into the cache here, and the model needs no cache of its own.

A page holds the keys and values of so many neighbouring tokens of one sequence, and belongs to one slot (Kwon et al.
2023, section 4). Attention multiplies all pages in use at once, where they lie: two batched products, whatever the
lengths. The prefix that all prompts share is kept once for each adapter, and is one product for all its rows. With
kernels (CPU), the attention of each answer reads its pages once instead, and writes nothing but the result.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_adapters.ops.backends import function
from llm_adapters.ops.packing import Cached, Pack, additive
from llm_adapters.ops.sizes import padded_size

PAGE = 64
_STEP = 32  # pages are multiplied in such numbers (see `sizes`)
_NOWHERE = 0  # a page that belongs to nobody, for what is computed and dropped


class PagedCache:
    """Keys and values of the sequences that are being generated.

    Args:
        slots: number of sequences at a time.
        longest: tokens of the longest sequence, without the shared prefix.
        device: of the model.

    Attributes:
        prefix: tokens of the prefix that all sequences share; 0 until it is stored.
        table: (slots, pages), int64: the pages of each slot in their order, `_NOWHERE` where there is none.
        owner, rank: (pages,), int64: the slot that each page belongs to, -1 for none, and which of its pages it is.
        top: all pages in use are below; a round number.
    """

    def __init__(self, slots: int, longest: int, device: torch.device) -> None:
        self.most = -(-longest // PAGE)
        self.prefix, self.top = 0, 1
        self.table = torch.full((slots, self.most), _NOWHERE, device=device)
        self.owner = torch.full((padded_size(1 + slots * self.most, _STEP),), -1, device=device)
        self.rank = torch.zeros_like(self.owner)
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._free = list(range(1, 1 + slots * self.most))  # a heap, and sorted
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._prefixes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._stacked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # --- pages

    def reserve(self, slot: int, tokens: int) -> None:
        """Let `slot` have pages for so many tokens, the shared prefix not counted."""
        held, before = self._held[slot], self.top
        while len(held) * PAGE < tokens:
            page = heapq.heappop(self._free)
            self.table[slot, len(held)], self.owner[page], self.rank[page] = page, slot, len(held)
            held.append(page)
            self.top = max(self.top, padded_size(page + 1, _STEP))
        if self.top > before:
            for layer in self._layers.values():
                for part in layer:
                    part[before : self.top] = 0

    def release(self, slot: int) -> None:
        """Take back all pages of `slot`."""
        for page in self._held[slot]:
            heapq.heappush(self._free, page)
            self.owner[page] = -1
        self.table[slot] = _NOWHERE
        self._held[slot] = []

    def copy(self, source: torch.Tensor, target: torch.Tensor, first: int = 0) -> None:
        """Copy what the slots `source` hold from page `first` on to the slots `target`, which have as many pages."""
        pages = self.table[source, first:].flatten(), self.table[target, first:].flatten()
        self._move(*(part[pages[1] != _NOWHERE] for part in pages))

    def compact(self) -> None:
        """Move pages down where many below the highest one are free."""
        used = sum(map(len, self._held))
        if self.top <= padded_size(used + 1 + used // 8, _STEP):
            return
        highest = [p for p in range(self.top - 1, used, -1) if self.owner[p] >= 0]
        lowest = [heapq.heappop(self._free) for _ in highest]
        source, target = (torch.tensor(p, dtype=torch.int64, device=self.table.device) for p in (highest, lowest))
        self._move(source, target)
        owner, rank = self.owner[source], self.rank[source]
        self.owner[target], self.rank[target], self.table[owner, rank] = owner, rank, target
        self.owner[source] = -1
        for old, new, slot, at in zip(highest, lowest, owner.tolist(), rank.tolist(), strict=True):
            self._held[slot][at] = new
            heapq.heappush(self._free, old)
        self.top = padded_size(used + 1, _STEP)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for layer in self._layers.values():
            for part in layer:
                part[target] = part[source]

    # --- keys and values

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages of a layer, twice (pages, key-value heads, PAGE, width), in the shape of the first ones seen.

        They begin as zeros: what no sequence has filled is read, and weighted with nothing.
        """
        if index not in self._layers:
            keys, values = (part.new_empty(len(self.owner), len(part), PAGE, part.shape[-1]) for part in (key, value))
            keys[: self.top] = values[: self.top] = 0
            self._layers[index] = keys, values
        return self._layers[index]

    def keep_prefix(self, index: int, key: torch.Tensor, value: torch.Tensor, adapter: int = 0) -> None:
        """Store a layer's keys and values of the shared prefix, (key-value heads, prefix, width), by this adapter."""
        self.prefix = key.shape[1]
        self._prefixes[index, adapter] = key.contiguous(), value.contiguous()
        self._stacked.pop(index, None)

    def prefix_of(self, index: int, adapter: int = 0) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `keep_prefix` was given; None where there is no prefix."""
        return self._prefixes.get((index, adapter))

    def prefixes_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same of all adapters, (adapters, key-value heads, prefix, width)."""
        if index not in self._stacked and (index, 0) in self._prefixes:
            own = [pair for (layer, _), pair in sorted(self._prefixes.items()) if layer == index]
            keys, values = zip(*own, strict=True)
            self._stacked[index] = torch.stack(keys), torch.stack(values)
            for adapter, pair in enumerate(zip(*self._stacked[index], strict=True)):
                self._prefixes[index, adapter] = pair  # so that they are there once
        return self._stacked.get(index)


@dataclass
class Decoded(Cached):
    """Tokens that go on from what some slots hold, as many neighbours of each.

    Attributes:
        slots: (count,), int64, no slot twice; -1 for a row that only makes the number a round one.
        at: (count, width), int64: the position of each token.
        alive: (count, width), bool: which are of a sequence; what the others compute is dropped.
        adapters: (count,), int64: the number of each slot's adapter.
    """

    slots: torch.Tensor
    at: torch.Tensor
    alive: torch.Tensor
    adapters: torch.Tensor

    def places(self, cache: PagedCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and column of every token, (count * width,) int64 each."""
        own = torch.where(self.alive, self.at - cache.prefix, 0)
        pages = cache.table[self.slots[:, None], own // PAGE].masked_fill(~self.alive, _NOWHERE)
        return pages.flatten(), (own % PAGE).flatten()

    def seen(self, cache: PagedCache) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int]:
        """Which pages are looked at, for each of them whose it is and which of its pages, and the most pages of one.

        The pages are None for all below the cache's top, where most of them are of these slots. Those that nobody here
        sees belong to the row after the last.
        """

        def make() -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int]:
            count = len(self.slots)
            row_of = self.slots.new_full((len(cache.table) + 1,), count)
            row_of[self.slots] = torch.arange(count, device=self.slots.device)
            row_of[-1] = count  # of the rows that are no slot's, and of the pages that nobody owns
            owner, rank, chosen = row_of[cache.owner[: cache.top]], cache.rank[: cache.top], None
            mine = (owner < count).nonzero().flatten()
            if 2 * len(mine) < cache.top:
                more = mine.new_full((padded_size(len(mine), _STEP) - len(mine),), _NOWHERE)
                chosen = torch.cat((mine, more))
                owner, rank = owner[chosen], rank[chosen]
            rank = torch.where(owner < count, rank, 0)
            return chosen, owner, rank, int(rank.max()) + 1

        return self.cached("seen", make)

    def by_adapter(self) -> list[tuple[int, torch.Tensor]]:
        """The numbers of the adapters, and which slots are theirs."""
        return self.cached(
            "by adapter",
            lambda: [(int(n), (self.adapters == n).nonzero().flatten()) for n in self.adapters.unique()],
        )

    def bias(self, cache: PagedCache, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of the tokens, and of nobody's: (count + 1, 1, width, columns), 0 where a token
        may look. The columns are those of its pages in their order, and of the shared prefix.
        """

        def make() -> torch.Tensor:
            prefix, own = cache.prefix, self.seen(cache)[3] * PAGE
            columns = torch.arange(own + prefix, device=self.at.device)
            distance = self.at[..., None] - torch.where(columns < own, prefix + columns, columns - own)
            visible = distance >= 0
            if window is not None:
                visible &= distance < window
            visible[..., 0] |= ~self.alive  # one that is dropped sees something, so that its softmax is a number
            return additive(torch.cat((visible, visible.new_ones(1, *visible.shape[1:]))), dtype)[:, None]

        return self.cached(("bias", window, dtype), make)


@dataclass
class Step(Cached):
    """What one forward computes, in one row: tokens that go on, and then new prompts.

    Attributes:
        cache: what it reads and fills.
        decoded: the tokens that go on, in the order of the row.
        pack: the new prompts, without the shared prefix; None for none.
        slots: their slots. None where the only prompt is the shared prefix itself, or what of it comes after a learned
            one.
        adapter: the number of the new prompts' adapter.
    """

    cache: PagedCache
    decoded: Sequence[Decoded] = ()
    pack: Pack | None = None
    slots: Sequence[int] | None = None
    adapter: int = 0

    def adapters(self) -> torch.Tensor:
        """The adapter of each row, (tokens,), int64."""
        found = [decoded.adapters.repeat_interleave(decoded.at.shape[1]) for decoded in self.decoded]
        if self.pack is not None:
            found.append(torch.full_like(self.pack.input_ids[0, self.pack.prefix :], self.adapter))
        return torch.cat(found)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and column of every token in the row, (tokens,) int64 each."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            cache = self.cache
            found = [decoded.places(cache) for decoded in self.decoded]
            if self.pack is not None and self.slots is not None:
                device = self.pack.input_ids.device
                lengths = torch.tensor(self.pack.lengths, device=device)
                slots = torch.tensor(self.slots, device=device).repeat_interleave(lengths)
                own = self.pack.position_ids[0, self.pack.prefix : self.pack.end] - cache.prefix
                fillers = own.new_full((self.pack.tokens - self.pack.end,), _NOWHERE)
                found += [(cache.table[slots, own // PAGE], own % PAGE), (fillers, torch.zeros_like(fillers))]
            pages, columns = zip(*found, strict=True)
            return torch.cat(pages), torch.cat(columns)

        return self.cached("places", make)


def store(layer: int, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
    """Put the row's keys and values, (key-value heads, tokens, width), where they belong."""
    if step.pack is not None and step.slots is None:
        count = step.pack.end - step.pack.prefix
        more = key[:, :count], value[:, :count]
        learned = step.cache.prefix_of(layer, step.adapter)
        keys, values = more if learned is None else (torch.cat(pair, 1) for pair in zip(learned, more, strict=True))
        step.cache.keep_prefix(layer, keys, values, step.adapter)
        return
    pages, columns = step.places()
    for whole, part in zip(step.cache.layer(layer, key, value), (key, value), strict=True):
        rows = part.transpose(0, 1)
        if kernel := function("store_kv", part):
            kernel(rows, whole, pages, columns)
        else:
            whole[pages, :, columns] = rows


def decode(
    layer: int, query: torch.Tensor, cache: PagedCache, decoded: Decoded, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of tokens over what their slots hold, themselves included.

    Args:
        layer: which layer's keys and values.
        query: (heads, tokens, width).
        cache: where their keys and values are stored already.
        decoded: the tokens.
        scale: the factor on the scores.
        window: a token sees no more than so many tokens.

    Returns:
        (tokens, heads, width).
    """
    count, beside = decoded.at.shape
    heads, _, width = query.shape
    keys, values = cache.layer(layer, query, query)
    if kernel := function("paged_attention", query, keys, values):
        prefix_kv, rows = cache.prefixes_of(layer), query.transpose(0, 1)
        places = decoded.adapters, cache.table, decoded.slots, decoded.at
        return kernel(rows, keys, values, prefix_kv, *places, scale, window)
    chosen, owner, rank, pages = decoded.seen(cache)
    keys, values = (
        part[: cache.top] if chosen is None else part.index_select(0, chosen)
        for part in cache.layer(layer, query, query)
    )
    groups, prefix, columns = keys.shape[1], cache.prefix, pages * PAGE
    # Of each slot: heads, and of each head its tokens.
    queries = (query.unflatten(1, (count, beside)).transpose(0, 1) * scale).reshape(count, -1)
    bias = decoded.bias(cache, window, query.dtype)
    scores = queries.new_zeros(count + 1, heads * beside, bias.shape[-1])  # not every slot has all the pages
    own = scores[:, :, :columns].unflatten(-1, (pages, PAGE))

    asking = decoded.cached("asking", lambda: owner.clamp(max=count - 1))
    by_page = queries.index_select(0, asking).view(len(owner) * groups, -1, width)
    own[owner, :, rank] = torch.bmm(by_page, keys.flatten(0, 1).transpose(1, 2)).view(len(owner), -1, PAGE)
    prefixes = [(rows, p) for adapter, rows in decoded.by_adapter() if (p := cache.prefix_of(layer, adapter))]
    for rows, (their_keys, _) in prefixes:
        # (key-value heads, slots * heads of each * tokens, width)
        shared = queries[rows].view(len(rows), groups, -1, width).transpose(0, 1).reshape(groups, -1, width)
        found = torch.bmm(shared, their_keys.transpose(1, 2)).view(groups, len(rows), -1, prefix)
        scores[rows, :, columns:] = found.transpose(0, 1).flatten(1, 2)
    scores.unflatten(1, (heads, beside)).add_(bias)
    probabilities = torch.softmax(scores, -1)

    own = probabilities[:, :, :columns].unflatten(-1, (pages, PAGE))[owner, :, rank]
    parts = torch.bmm(own.reshape(len(owner) * groups, -1, PAGE), values.flatten(0, 1))
    by_slot = parts.new_zeros(count + 1, pages, queries.shape[1])
    by_slot[owner, rank] = parts.view(len(owner), -1)
    out = by_slot[:count].sum(1).view(count, groups, -1, width)
    for rows, (_, their_values) in prefixes:
        shared = probabilities[rows, :, columns:].unflatten(1, (groups, -1)).transpose(0, 1)
        found = torch.bmm(shared.reshape(groups, -1, prefix), their_values).view(groups, len(rows), -1, width)
        out[rows] += found.transpose(0, 1)
    return out.reshape(count, heads, beside, width).transpose(1, 2).reshape(-1, heads, width)
