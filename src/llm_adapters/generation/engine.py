"""The generation engine: continuous batching over the slots of one cache.

The prefix that all prompts share is computed once, by each adapter that there is. Every forward then computes the next
tokens of each answer in the making and the whole prompts of those that begin, in one row (see
`llm_adapters.ops.kv_cache`): an answer that ends makes room for the next question in the same moment.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from llm_adapters.fast_paths.session import FastPaths, differs, learned_prefix, probe_sequences
from llm_adapters.generation.decoding import Beams, Greedy, Search
from llm_adapters.ops.kv_cache import PAGE, Decoded, PagedCache, Step
from llm_adapters.ops.packing import Pack, common_prefix
from llm_adapters.ops.sizes import padded_size

_ROWS = 16  # tokens are computed in such numbers (see `ops.sizes`)
PROMPT_TOKENS = 1024  # of new prompts in one forward: more makes no product faster, and answers wait for it

# (index of the prompt, the tokens of its answer, the one that ends it included)
Ended = list[tuple[int, list[int]]]


class Engine:
    """Answers prompts with an accelerated model, once.

    Args:
        fast_paths: the model's, on and frozen, with `packs`.
        prompts: token ids, none empty; of an adapter's, the longest are answered first.
        ends: the tokens that end an answer.
        max_new_tokens: the longest answer.
        num_beams: 1 for greedy decoding.
        slots: how many answers are in the making at a time.
        routes: for each prompt the number of its adapter among those that the `fast_paths` was given.
    """

    def __init__(
        self,
        fast_paths: FastPaths,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        slots: int,
        routes: Sequence[int] | None = None,
    ) -> None:
        self.fast_paths, self.device = fast_paths, fast_paths.base.device
        with torch.no_grad():
            learned = learned_prefix(fast_paths.model)
        # A learned prefix takes the places of so many tokens that all prompts begin with, and that are never computed.
        self.learned = learned[0][0].shape[1] if learned else 0
        self.limit = max_new_tokens
        self.prompts = [[0] * self.learned + list(prompt) for prompt in prompts]
        self.groups = min(slots, len(prompts))
        self.search: Search = (
            Greedy(self.groups, max_new_tokens, ends, self.device)
            if num_beams == 1
            else Beams(self.groups, num_beams, max_new_tokens, ends, self.device)
        )
        self.prefix = max(self.learned, common_prefix(self.prompts))
        longest = max(map(len, self.prompts)) - self.prefix + max_new_tokens
        self.cache = PagedCache(self.groups * num_beams, longest, self.device)
        for layer, (keys, values) in enumerate(learned):
            self.cache.keep_prefix(layer, keys, values)
        if (routes is None) != (fast_paths.route is None):
            raise ValueError("routes are for an fast_paths of several adapters, and needed for it")
        self.routes = list(routes) if routes is not None else [0] * len(prompts)
        # Of each adapter; the next one is the last.
        self.waiting: dict[int, list[int]] = {route: [] for route in sorted(set(self.routes))}
        for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            self.waiting[self.routes[index]].append(index)
        self.owners: dict[int, int] = {}  # of each group in use, the prompt
        # The lengths of these prompts, and their adapters.
        self.lengths, self.adapters = torch.zeros(2, self.groups, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def run(self, on_token: Callable[[int, int], None] | None = None) -> Iterator[Ended]:
        """Answer everything; yields the answers that end, whenever some do.

        Args:
            on_token: for greedy decoding, called with the index of a prompt and each token of its answer.
        """
        for route in range(self.fast_paths.adapter_count) if self.prefix > self.learned else ():
            prefix = Pack.of([self.prompts[0][: self.prefix]], self.learned, self.device)
            self._forward([], prefix, None, route)
        told: dict[int, int] = {}
        while any(self.waiting.values()) or self.owners:
            going = sorted(self.owners, key=lambda group: (self.routes[self.owners[group]], group))
            fed = self.search.feed(torch.tensor(going, device=self.device)) if going else []
            fresh, route = self._admit()
            *advanced, begun = self._forward(fed, *self._new(fresh), route)
            for (groups, tokens), logits in zip(fed, advanced, strict=True):
                self._advance(groups, tokens, logits)
            if fresh:
                self._begin(fresh, begun, route)
            if on_token is not None:
                for group, owner in self.owners.items():
                    answer = self.search.answer(group)
                    for token in answer[told.get(owner, 0) :]:
                        on_token(owner, token)
                    told[owner] = len(answer)
            if ended := self._collect():
                yield ended
            if not any(self.waiting.values()):
                self.cache.compact()

    # --- a step

    def _admit(self) -> tuple[list[int], int]:
        """Give waiting prompts of one adapter, that with the most of them, to free groups; returns these, and it."""
        fresh: list[int] = []
        route = max(self.waiting, key=lambda route: len(self.waiting[route]))
        waiting, room = self.waiting[route], PROMPT_TOKENS
        for group in (group for group in range(self.groups) if group not in self.owners):
            if not waiting or (fresh and room < len(self.prompts[waiting[-1]]) - self.prefix):
                break
            self.owners[group] = waiting.pop()
            room -= len(self.prompts[self.owners[group]]) - self.prefix
            fresh.append(group)
        return fresh, route

    def _new(self, fresh: list[int]) -> tuple[Pack | None, list[int] | None]:
        """The prompts of the `fresh` groups, and the slots for them."""
        if not fresh:
            return None, None
        pack = Pack.of([self.prompts[self.owners[group]] for group in fresh], self.prefix, self.device)
        slots = [group * self.search.width for group in fresh]
        for slot, length in zip(slots, pack.lengths, strict=True):
            self.cache.reserve(slot, length)
        return pack, slots

    def _forward(
        self,
        fed: list[tuple[torch.Tensor, torch.Tensor]],
        pack: Pack | None,
        slots: list[int] | None,
        route: int,
    ) -> list[torch.Tensor]:
        """The logits that follow the tokens of each part of `fed`, and those that follow the prompts of `pack`, which
        are of the adapter `route`."""
        count = sum(tokens.numel() for _, tokens in fed)
        fillers = (
            padded_size(count, _ROWS) - count
        )  # all in the first part, which has the fewest tokens beside each other
        decoded = []
        for groups, tokens in fed:
            decoded.append(self._decoded(groups, tokens.shape[1], fillers // tokens.shape[1]))
            fillers = 0
        tokens = [
            nn.functional.pad(tokens, (0, 0, 0, len(part.slots) - len(tokens))).flatten()
            for (_, tokens), part in zip(fed, decoded, strict=True)
        ]
        row = torch.cat([torch.zeros(0, dtype=torch.int64, device=self.device), *tokens])
        logits = self.fast_paths.logits(Step(self.cache, decoded, pack, slots, route), row)
        *parts, prompts = logits.split([*map(len, tokens), len(logits) - len(row)])
        found = [
            part.view(-1, tokens.shape[1], part.shape[-1])[: len(tokens)]
            for part, (_, tokens) in zip(parts, fed, strict=True)
        ]
        return [*found, prompts]

    def _decoded(self, groups: torch.Tensor, beside: int, fillers: int) -> Decoded:
        """So many neighbouring tokens of all slots of these `groups`, from the last one that their answers have."""
        width = self.search.width
        last = (self.lengths + self.limit)[groups, None] - 2  # what follows the last token of an answer, nobody reads
        at = (self.lengths + self.search.count)[groups, None] - 1 + torch.arange(beside, device=self.device)
        alive, at = (part.repeat_interleave(width, 0) for part in (at <= last, at.minimum(last)))
        slots = self._slots(groups).flatten()
        pages = (at[:, -1] - self.prefix) // PAGE
        for slot, page in zip(slots.tolist(), pages.tolist(), strict=True):
            self.cache.reserve(slot, page * PAGE + 1)
        return Decoded(
            nn.functional.pad(slots, (0, fillers), value=-1),
            nn.functional.pad(at, (0, 0, 0, fillers)),
            nn.functional.pad(alive, (0, 0, 0, fillers)),
            nn.functional.pad(self.adapters[groups].repeat_interleave(width), (0, fillers)),
        )

    def _slots(self, groups: torch.Tensor) -> torch.Tensor:
        """(groups, width)."""
        width = self.search.width
        return groups[:, None] * width + torch.arange(width, device=self.device)

    def _advance(self, groups: torch.Tensor, fed: torch.Tensor, logits: torch.Tensor) -> None:
        parents = self.search.advance(groups, fed, logits)
        if parents is None:
            return
        slots = self._slots(groups)
        source = slots.gather(1, parents)
        moved = source != slots
        if moved.any():
            # A group's beams share its prompt.
            first = int((self.lengths[groups[moved.any(1)]].min() - self.prefix) // PAGE)
            self.cache.copy(source[moved], slots[moved], first)

    def _begin(self, fresh: list[int], logits: torch.Tensor, route: int) -> None:
        groups = torch.tensor(fresh, device=self.device)
        sizes = [len(self.prompts[self.owners[group]]) for group in fresh]
        self.lengths[groups], self.adapters[groups] = torch.tensor(sizes, device=self.device), route
        self.search.begin(groups, logits)
        width = self.search.width
        for beam in range(1, width):
            for group, size in zip(fresh, sizes, strict=True):
                self.cache.reserve(group * width + beam, size - self.prefix)
            self.cache.copy(groups * width, groups * width + beam)

    def _collect(self) -> Ended:
        """The answers that have ended, whose groups are free again."""
        found: Ended = []
        used = list(self.owners)
        ended_ones = self.search.finished(torch.tensor(used, device=self.device)).tolist()
        for group, ended in zip(used, ended_ones, strict=True):
            if ended:
                found.append((self.owners.pop(group), self.search.answer(group)))
                for slot in range(group * self.search.width, (group + 1) * self.search.width):
                    self.cache.release(slot)
        return found


@torch.inference_mode()
def why_not(fast_paths: FastPaths) -> str | None:
    """Why the engine cannot be used; None where it can, which is tried: some tokens by pieces against all at once."""
    if not fast_paths.packs:
        return fast_paths.report["packing"]
    some, adapters = probe_sequences(fast_paths.base), fast_paths.adapter_count
    sequences = [some[slot % len(some)] for slot in range(max(len(some), adapters))]
    prefix, steps = 2, (1, 2)  # so many tokens beside each other
    device = fast_paths.base.device
    cache = PagedCache(len(sequences), max(map(len, sequences)), device)
    slots = torch.arange(len(sequences), device=device)
    found: dict[int, torch.Tensor] = {}
    try:
        for adapter in range(adapters):
            mine = list(range(adapter, len(sequences), adapters))
            shared = Pack.of([sequences[0][:prefix]], device=device)
            fast_paths.logits(Step(cache, (), shared, None, adapter), slots[:0])
            pack = Pack.of([sequences[slot][: -sum(steps)] for slot in mine], prefix, device)
            for slot in mine:
                cache.reserve(slot, len(sequences[slot]) - prefix)
            logits = fast_paths.logits(Step(cache, (), pack, mine, adapter), slots[:0])
            found |= dict(zip(mine, logits[:, None], strict=True))
        ends = torch.tensor([list(range(len(sequence) - sum(steps), len(sequence))) for sequence in sequences])
        tokens = torch.tensor([sequence[-sum(steps) :] for sequence in sequences])
        for at, part in zip(ends.to(device).split(steps, 1), tokens.to(device).split(steps, 1), strict=True):
            decoded = Decoded(slots, at, at >= 0, slots % adapters)
            logits = fast_paths.logits(Step(cache, [decoded]), part.flatten()).view(*at.shape, -1)
            found = {slot: torch.cat((found[slot], rows)) for slot, rows in enumerate(logits)}
        for slot, sequence in enumerate(sequences):
            ids = torch.tensor([sequence], device=device)
            fast_paths.all_by(slot % adapters, len(sequence))
            expected = fast_paths.base(input_ids=ids, use_cache=False).logits[0, -1 - sum(steps) :]
            if refused := differs(found[slot], expected):
                return refused
    except Exception as error:  # families differ in more ways than can be listed
        return f"its forward does not take slots ({type(error).__name__})"
    return None
