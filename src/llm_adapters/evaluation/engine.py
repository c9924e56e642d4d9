"""The generation engine: continuous batching over the slots of one cache.

The prefix that all prompts share is computed once. Every forward then computes a token of each answer in the making and
the whole prompts of those that begin, in one row (see `llm_adapters.acceleration.pages`): an answer that ends makes
room for the next question in the same moment.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from llm_adapters.acceleration.model import Acceleration, differs, learned_prefix, probe_sequences
from llm_adapters.acceleration.packing import Pack, common_prefix, rounded
from llm_adapters.acceleration.pages import PAGE, PagedCache, Step
from llm_adapters.evaluation.search import Beams, Greedy, Search

_ROWS = 16  # tokens are computed in such numbers (see `packing.rounded`)
PROMPT_TOKENS = 1024  # of new prompts in one forward: more makes no product faster, and answers wait for it

# (index of the prompt, the tokens of its answer, the one that ends it included)
Ended = list[tuple[int, list[int]]]


class Engine:
    """Answers prompts with an accelerated model, once.

    Args:
        acceleration: the model's, on and frozen, with `packs`.
        prompts: token ids, none empty; the longest are answered first.
        ends: the tokens that end an answer.
        max_new_tokens: the longest answer.
        num_beams: 1 for greedy decoding.
        slots: how many answers are in the making at a time.
    """

    def __init__(
        self,
        acceleration: Acceleration,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        slots: int,
    ) -> None:
        self.acceleration, self.device = acceleration, acceleration.base.device
        with torch.no_grad():
            learned = learned_prefix(acceleration.model)
        # A learned prefix takes the places of so many tokens that all prompts begin with, and that are never computed.
        self.learned = learned[0][0].shape[1] if learned else 0
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
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the next one is the last
        self.owners: list[int | None] = []  # the prompt of each group in use
        self.lengths = torch.full((self.groups,), self.prefix, device=self.device)  # of these prompts

    @torch.inference_mode()
    def run(self, on_token: Callable[[int, int], None] | None = None) -> Iterator[Ended]:
        """Answer everything; yields the answers that end, whenever some do.

        Args:
            on_token: for greedy decoding, called with the index of a prompt and each token of its answer.
        """
        if self.prefix > self.learned:
            self._forward(Pack.of([self.prompts[0][: self.prefix]], self.learned, self.device), None, 0)
        while self.waiting or self.owners:
            decoded = len(self.owners)
            fresh = self._admit()
            logits = self._prompts_and_tokens(fresh, decoded)
            if decoded:
                self._advance(decoded, logits[: decoded * self.search.width], fresh)
            if fresh:
                self._begin(fresh, logits[-len(fresh) :])
            if on_token is not None:
                for group, owner in enumerate(self.owners):
                    if owner is not None:
                        on_token(owner, self.search.answer(group)[-1])
            if ended := self._collect():
                yield ended
            if not self.waiting:
                self._close_up()

    # --- a step

    def _admit(self) -> list[int]:
        """Give waiting prompts to free groups; returns these groups."""
        free = [group for group, owner in enumerate(self.owners) if owner is None]
        free += range(len(self.owners), self.groups)
        fresh: list[int] = []
        room = PROMPT_TOKENS
        for group in free:
            if not self.waiting or (fresh and room < len(self.prompts[self.waiting[-1]]) - self.prefix):
                break
            index = self.waiting.pop()
            room -= len(self.prompts[index]) - self.prefix
            if group == len(self.owners):
                self.owners.append(index)
            else:
                self.owners[group] = index
            fresh.append(group)
        return fresh

    def _prompts_and_tokens(self, fresh: list[int], decoded: int) -> torch.Tensor:
        """The logits that follow the last tokens of the first `decoded` groups (and more), and the `fresh` prompts."""
        pack = slots = None
        if fresh:
            prompts = [self.prompts[index] for group in fresh if (index := self.owners[group]) is not None]
            pack = Pack.of(prompts, self.prefix, self.device)
            slots = [group * self.search.width for group in fresh]
            for slot, length in zip(slots, pack.lengths, strict=True):
                self.cache.reserve(slot, length)
        return self._forward(pack, slots, decoded, set(fresh))

    def _forward(
        self, pack: Pack | None, slots: list[int] | None, decoded: int, fresh: Collection[int] = ()
    ) -> torch.Tensor:
        width = self.search.width
        at = self.lengths[:decoded] + self.search.count[:decoded] - 1
        alive = [self.owners[group] is not None and group not in fresh for group in range(decoded)]
        # A page for those whose last one is full.
        for group in ((at - self.prefix) % PAGE == 0).nonzero().flatten().tolist():
            if alive[group]:
                for slot in range(group * width, (group + 1) * width):
                    self.cache.reserve(slot, int(at[group]) - self.prefix + 1)
        more = rounded(decoded * width, _ROWS) - decoded * width if decoded else 0
        rows = at.repeat_interleave(width), torch.tensor(alive, device=self.device).repeat_interleave(width)
        at, living = (torch.cat((part, part.new_zeros(more))) for part in rows)
        tokens = self.search.feed(decoded)
        step = Step(self.cache, at, living.bool(), pack, slots)
        return self.acceleration.logits(step, torch.cat((tokens, tokens.new_zeros(more))))

    def _advance(self, decoded: int, logits: torch.Tensor, fresh: list[int]) -> None:
        parents = self.search.advance(decoded, logits)
        if parents is None:
            return
        width = self.search.width
        slots = torch.arange(decoded * width, device=self.device)
        source = (torch.arange(decoded, device=self.device)[:, None] * width + parents).flatten()
        changed = source != slots
        free = [group for group in range(decoded) if group in fresh or self.owners[group] is None]
        changed.view(decoded, width)[free] = False
        moved = changed.nonzero().flatten()
        if len(moved):
            # A group's beams share its prompt.
            first = int((self.lengths[moved // width].min() - self.prefix) // PAGE)
            self.cache.copy(source[moved], moved, first)

    def _begin(self, fresh: list[int], logits: torch.Tensor) -> None:
        groups = torch.tensor(fresh, device=self.device)
        sizes = [len(self.prompts[index]) for group in fresh if (index := self.owners[group]) is not None]
        self.lengths[groups] = torch.tensor(sizes, device=self.device)
        self.search.begin(groups, logits)
        width = self.search.width
        for beam in range(1, width):
            for group, size in zip(fresh, sizes, strict=True):
                self.cache.reserve(group * width + beam, size - self.prefix)
            self.cache.copy(groups * width, groups * width + beam)

    def _collect(self) -> Ended:
        """The answers that have ended, whose groups are free again."""
        found: Ended = []
        for group in self.search.finished(len(self.owners)).nonzero().flatten().tolist():
            owner = self.owners[group]
            if owner is not None:
                found.append((owner, self.search.answer(group)))
                self.owners[group] = None
                for slot in range(group * self.search.width, (group + 1) * self.search.width):
                    self.cache.release(slot)
        free = [group for group, owner in enumerate(self.owners) if owner is None]
        if free:
            self.lengths[free], self.search.count[free] = self.prefix, 1
        return found

    def _close_up(self) -> None:
        """Nothing waits any more: let the last groups take the free places, so that no row computes for nothing."""
        width = self.search.width
        while None in self.owners:
            last = len(self.owners) - 1
            group = self.owners.index(None)
            if group < last and self.owners[last] is not None:
                for beam in range(width):
                    self.cache.hand_over(last * width + beam, group * width + beam)
                self.search.move(last, group)
                self.lengths[group], self.owners[group] = self.lengths[last], self.owners[last]
            self.owners.pop()
        self.cache.compact()


@torch.inference_mode()
def why_not(acceleration: Acceleration) -> str | None:
    """Why the engine cannot be used; None where it can, which is tried: tokens one by one against the whole at once."""
    if not acceleration.packs:
        return acceleration.report["packing"]
    sequences = probe_sequences(acceleration.base)
    prefix, last = 3, 2
    device = acceleration.base.device
    cache = PagedCache(len(sequences), max(map(len, sequences)), device)
    none, nobody = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.bool, device=device)
    slots = list(range(len(sequences)))
    try:
        shared = Pack.of([sequences[0][:prefix]], device=device)
        acceleration.logits(Step(cache, none, nobody, shared), none)
        pack = Pack.of([sequence[:-last] for sequence in sequences], prefix, device)
        for slot in slots:
            cache.reserve(slot, len(sequences[slot]) - prefix)
        found = [acceleration.logits(Step(cache, none, nobody, pack, slots), none)]
        for back in range(last, 0, -1):
            at = torch.tensor([len(sequence) - back for sequence in sequences], device=device)
            tokens = torch.tensor([sequence[-back] for sequence in sequences], device=device)
            found.append(acceleration.logits(Step(cache, at, at >= 0), tokens))
        for sequence, rows in zip(sequences, torch.stack(found, 1), strict=True):
            ids = torch.tensor([sequence], device=device)
            expected = acceleration.base(input_ids=ids, use_cache=False).logits[0, -1 - last :]
            if refused := differs(rows, expected):
                return refused
    except Exception as error:  # families differ in more ways than can be listed
        return f"its forward does not take slots ({type(error).__name__})"
    return None
