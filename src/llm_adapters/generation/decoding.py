"""Decoding strategies: the choice of the next tokens, greedy or by beam search, for every request that is running.

A request has a slot: one sequence for greedy decoding, `num_beams` sequences for beam search.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from llm_adapters.errors import WorkError
from llm_adapters.generation.sampling_params import SamplingParams

NUM_SPECULATIVE_TOKENS = 3  # draft tokens that are proposed at a time
NGRAM_SIZE = 3  # so many last tokens of an answer must occur in it before, for drafts to be proposed
MAX_SPECULATIVE_BATCH = 64  # answers; more keep the machine busy as it is, and wrong drafts cost what right ones save
_NEVER = -1e9  # the score of what must not be chosen


class DecodingStrategy(Protocol):
    """A way to choose tokens, as the engine uses it.

    Attributes:
        num_beams: sequences of a slot.
        num_tokens: tokens that have been generated in each slot.
    """

    num_beams: int
    num_tokens: list[int]

    def grow(self, num_slots: int, max_new_tokens: int) -> None:
        """Make room for so many slots, and answers of so many tokens."""

    def begin(
        self, slots: list[int], limits: list[int], sampling: Sequence[SamplingParams | None], logits: torch.Tensor
    ) -> None:
        """Take new requests.

        Args:
            slots: theirs.
            limits: the most new tokens of each.
            sampling: what each says about sampling, if anything; beam search has no use for it.
            logits: (slots, vocabulary), what follows their prompts.
        """

    def propose(self, slots: list[int]) -> list[tuple[list[int], torch.Tensor]]:
        """Input tokens of the next forward: the last token of each sequence, and draft tokens that may follow.

        Returns:
            Some of the slots and their tokens, (slots * num_beams, query tokens), for each number of query tokens.
        """

    def advance(self, slots: list[int], input_tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
        """Verify drafts and append at least one more token.

        Args:
            slots: as `propose` returned them.
            input_tokens: as `propose` returned them.
            logits: (slots * num_beams, query tokens, vocabulary), what follows each of the tokens.

        Returns:
            The beam of its slot that each beam goes on from, (slots, num_beams); None where each goes on from itself.
        """

    def take(self, slots: list[int]) -> list[tuple[list[int], bool]]:
        """New tokens of each slot's answer since they were last taken, and True if that is its end.

        Beam search has an answer only when it ends. The stop token that ends an answer is one of its tokens.
        """


class Greedy:
    """Greedy decoding: always the most probable token.

    An answer whose last tokens occur in it before is likely to go on as it did then. Where few requests are running,
    what followed then is computed in the same forward as a draft, and kept as far as it is what the model says: the
    answer is the same, and there sooner (speculative decoding, Leviathan et al. 2023; the draft model is n-gram lookup
    in the answer).

    Args:
        stop_token_ids: the tokens that end an answer.
        device: of the model.
    """

    num_beams = 1

    def __init__(self, stop_token_ids: Sequence[int], device: torch.device) -> None:
        self._stop_token_ids = torch.tensor(list(stop_token_ids), device=device)
        self._stops = frozenset(stop_token_ids)
        # Of each slot; what is behind its `num_tokens` is of drafts that were wrong, or of a request before.
        self._tokens = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.num_tokens: list[int] = []
        self._limits: list[int] = []
        self._new: list[list[int]] = []

    def grow(self, num_slots: int, max_new_tokens: int) -> None:
        """See `DecodingStrategy`."""
        more = num_slots - len(self.num_tokens)
        # Drafts may go over the limit, and are written before they are cut there.
        self._tokens = _grown(self._tokens, num_slots, max_new_tokens + NUM_SPECULATIVE_TOKENS)
        self.num_tokens += [0] * more
        self._limits += [0] * more
        self._new += [[] for _ in range(more)]

    def begin(
        self, slots: list[int], limits: list[int], sampling: Sequence[SamplingParams | None], logits: torch.Tensor
    ) -> None:
        """See `DecodingStrategy`."""
        for slot, limit in zip(slots, limits, strict=True):
            self.num_tokens[slot], self._limits[slot], self._new[slot] = 0, limit, []
        self.advance(slots, self._tokens.new_zeros(len(slots), 1), logits[:, None])

    def propose(self, slots: list[int]) -> list[tuple[list[int], torch.Tensor]]:
        """See `DecodingStrategy`."""
        rows, counts = self._rows(slots)
        if len(slots) > MAX_SPECULATIVE_BATCH:
            return [(slots, self._tokens[rows, counts - 1])]
        tokens = self._tokens[rows[:, 0]]
        period = _ngram_period(tokens, [self.num_tokens[slot] for slot in slots])
        # Drafts: from the place after the n-gram's occurrence on, again from there where it reaches the last token.
        ahead = torch.arange(NUM_SPECULATIVE_TOKENS + 1, device=tokens.device)
        at = torch.where(period > 0, counts - 1 - period + ahead % period.clamp(min=1), counts - 1)
        at[:, 0] = counts[:, 0] - 1
        input_tokens, repeats = tokens.gather(1, at), (period[:, 0] > 0).tolist()
        parts = []
        for drafted, num_query_tokens in ((False, 1), (True, NUM_SPECULATIVE_TOKENS + 1)):
            chosen = [row for row, repeated in enumerate(repeats) if repeated == drafted]
            if chosen:
                parts.append(([slots[row] for row in chosen], input_tokens[chosen, :num_query_tokens]))
        return parts

    def advance(self, slots: list[int], input_tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """See `DecodingStrategy`."""
        rows, counts = self._rows(slots)
        best, chosen = self._scores(slots, counts, logits).max(-1)
        require_numbers(best)
        # A token counts if all drafts before it are what the model chose, and none of them ended the answer.
        stops = torch.isin(chosen, self._stop_token_ids)
        rejected = (input_tokens[:, 1:] != chosen[:, :-1]) | stops[:, :-1]
        num_accepted = 1 + (rejected.cumsum(1) == 0).sum(1, keepdim=True)
        self._tokens[rows, counts + torch.arange(chosen.shape[1], device=chosen.device)] = chosen
        # The one wait for the device in a step: the host must know which answers end.
        for slot, (accepted, *tokens) in zip(slots, torch.cat((num_accepted, chosen), 1).tolist(), strict=True):
            tokens = tokens[: min(accepted, self._limits[slot] - self.num_tokens[slot])]
            self.num_tokens[slot] += len(tokens)
            self._new[slot] += tokens

    def take(self, slots: list[int]) -> list[tuple[list[int], bool]]:
        """See `DecodingStrategy`."""
        found = []
        for slot in slots:
            tokens, self._new[slot] = self._new[slot], []
            stopped = bool(tokens) and tokens[-1] in self._stops
            found.append((tokens, stopped or self.num_tokens[slot] >= self._limits[slot]))
        return found

    def _scores(self, slots: list[int], counts: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Scores whose largest is the next token.

        Args:
            slots: the slots.
            counts: tokens of each, (slots, 1).
            logits: (slots, query tokens, vocabulary), what follows each of neighbouring tokens.
        """
        return logits

    def _rows(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and their numbers of tokens on the device, (slots, 1) each."""
        pairs = [(slot, self.num_tokens[slot]) for slot in slots]
        rows, counts = torch.tensor(pairs, device=self._tokens.device).split(1, 1)
        return rows, counts


def _ngram_period(tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Distance from the last `NGRAM_SIZE` tokens of each answer back to the nearest place where they occur, 0 for none.

    Args:
        tokens: (answers, limit), int64.
        counts: tokens of each answer.

    Returns:
        (answers, 1), int64.
    """
    count = torch.tensor(counts, device=tokens.device)[:, None]
    most = max(counts)
    if most <= NGRAM_SIZE:
        return torch.zeros_like(count)
    last = torch.arange(NGRAM_SIZE, device=tokens.device) - NGRAM_SIZE
    recent = tokens.gather(1, (count + last).clamp(min=0))
    same = (tokens[:, :most].unfold(1, NGRAM_SIZE, 1) == recent[:, None]).all(-1)
    starts = torch.arange(same.shape[1], device=tokens.device)
    nearest = torch.where(same & (starts < count - NGRAM_SIZE), starts, -1).amax(1, keepdim=True)
    return torch.where(nearest >= 0, count - NGRAM_SIZE - nearest, 0)


class BeamSearch:
    """Beam search as in transformers' `generate`, with length penalty 1 and without early stopping.

    A request ends when the best of its open beams, at its mean log-probability, could not enter the finished ones any
    more.

    Args:
        num_beams: open beams, and finished ones, of each slot.
        stop_token_ids: the tokens that end an answer.
        device: of the model.
    """

    def __init__(self, num_beams: int, stop_token_ids: Sequence[int], device: torch.device) -> None:
        self.num_beams, self._device = num_beams, device
        self._stop_token_ids = torch.tensor(list(stop_token_ids), device=device)
        # So many candidates that as many as there are beams go on whatever ends.
        self._num_candidates = max(2, 1 + len(self._stop_token_ids)) * num_beams
        self.num_tokens: list[int] = []
        self._limits: list[int] = []
        self._tokens = torch.zeros(0, num_beams, 0, dtype=torch.int64, device=device)
        self._scores = torch.zeros(0, num_beams, device=device)
        self._done_tokens = torch.zeros_like(self._tokens)
        self._done_lengths = torch.zeros(0, num_beams, dtype=torch.int64, device=device)
        self._done_scores = torch.zeros_like(self._scores)
        self._done = torch.zeros(0, num_beams, dtype=torch.bool, device=device)
        self._ended = torch.zeros(0, dtype=torch.bool, device=device)

    def grow(self, num_slots: int, max_new_tokens: int) -> None:
        """See `DecodingStrategy`."""
        more = num_slots - len(self.num_tokens)
        self.num_tokens += [0] * more
        self._limits += [0] * more
        for name in ("_tokens", "_done_tokens"):
            setattr(self, name, _grown(getattr(self, name), num_slots, self.num_beams, max_new_tokens))
        for name in ("_scores", "_done_lengths", "_done_scores", "_done", "_ended"):
            setattr(self, name, _grown(getattr(self, name), num_slots))

    def begin(
        self, slots: list[int], limits: list[int], sampling: Sequence[SamplingParams | None], logits: torch.Tensor
    ) -> None:
        """See `DecodingStrategy`."""
        for slot, limit in zip(slots, limits, strict=True):
            self.num_tokens[slot], self._limits[slot] = 0, limit
        rows = torch.tensor(slots, device=self._device)
        self._scores[rows] = _NEVER  # all beams begin alike: only one may have children
        self._scores[rows, 0] = 0.0
        self._done_scores[rows] = _NEVER
        self._done[rows] = False
        self._extend(slots, logits.repeat_interleave(self.num_beams, 0))

    def propose(self, slots: list[int]) -> list[tuple[list[int], torch.Tensor]]:
        """See `DecodingStrategy`."""
        last = torch.tensor([self.num_tokens[slot] - 1 for slot in slots], device=self._device)
        rows = torch.tensor(slots, device=self._device)
        return [(slots, self._tokens[rows, :, last].view(-1, 1))]

    def advance(self, slots: list[int], input_tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See `DecodingStrategy`."""
        return self._extend(slots, logits[:, 0])

    def take(self, slots: list[int]) -> list[tuple[list[int], bool]]:
        """See `DecodingStrategy`."""
        rows = torch.tensor(slots, device=self._device)
        found: list[tuple[list[int], bool]] = []
        for slot, ended in zip(slots, self._ended[rows].tolist(), strict=True):
            length = int(self._done_lengths[slot, 0]) if ended else 0
            found.append((self._done_tokens[slot, 0, :length].tolist(), ended))
        return found

    def _extend(self, slots: list[int], logits: torch.Tensor) -> torch.Tensor:
        """One more token for each slot's beams.

        Args:
            slots: the slots.
            logits: (slots * num_beams, vocabulary).

        Returns:
            The beam that each beam goes on from, (slots, num_beams).
        """
        rows = torch.tensor(slots, device=self._device)
        sizes = [(self.num_tokens[slot], self._limits[slot]) for slot in slots]
        count, limit = torch.tensor(sizes, device=self._device).split(1, 1)
        # Candidates: the best continuations of each beam, and the best of these of each slot.
        among = min(self._num_candidates, logits.shape[-1])
        logits = logits.float()
        best, words = logits.topk(among)
        require_numbers(best)
        best = best - logits.logsumexp(-1, keepdim=True)
        best = (best.view(len(slots), self.num_beams, among) + self._scores[rows, :, None]).flatten(1)
        scores, at = best.topk(self._num_candidates)
        parents, chosen = at // among, words.view(len(slots), -1).gather(1, at)
        tokens = _gather(self._tokens[rows], parents)
        tokens.scatter_(2, count[:, :, None].expand(-1, self._num_candidates, 1), chosen[:, :, None])
        stops = torch.isin(chosen, self._stop_token_ids) | (count + 1 >= limit)

        # Open beams: the best candidates that do not end.
        open_scores, kept = (scores + stops * _NEVER).topk(self.num_beams)
        self._tokens[rows], self._scores[rows] = _gather(tokens, kept), open_scores

        # Finished beams: the best of those before and of what ends among the first `num_beams` candidates.
        first = torch.arange(self._num_candidates, device=logits.device) < self.num_beams
        ends = stops & first
        ended = scores / (count + 1) + ~ends * _NEVER
        merged = torch.cat((self._done_scores[rows], ended), 1)
        self._done_scores[rows], best_done = merged.topk(self.num_beams)
        lengths = torch.cat((self._done_lengths[rows], (count + 1).expand_as(chosen)), 1)
        self._done_tokens[rows] = _gather(torch.cat((self._done_tokens[rows], tokens), 1), best_done)
        self._done_lengths[rows] = lengths.gather(1, best_done)
        self._done[rows] = torch.cat((self._done[rows], ends), 1).gather(1, best_done)

        worst = torch.where(self._done[rows], self._done_scores[rows].amin(1, keepdim=True), _NEVER)
        hopeful = (open_scores[:, :1] / (count + 1) > worst).any(1)
        self._ended[rows] = ~hopeful | stops.all(1)
        for slot in slots:
            self.num_tokens[slot] += 1
        return parents.gather(1, kept)


def _gather(values: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """(slots, beams, tokens), (slots, chosen) -> (slots, chosen, tokens)."""
    return values.gather(1, beams[:, :, None].expand(-1, -1, values.shape[2]))


def _grown(values: torch.Tensor, *sizes: int) -> torch.Tensor:
    """`values` in a tensor whose first dimensions have at least these sizes; zeros are added."""
    shape = [*map(max, values.shape, sizes), *values.shape[len(sizes) :]]
    if shape == list(values.shape):
        return values
    larger = values.new_zeros(shape)
    larger[tuple(map(slice, values.shape))] = values
    return larger


def require_numbers(scores: torch.Tensor) -> None:
    """Raise `WorkError` where one of `scores` is not a number."""
    if scores.isnan().any():
        raise WorkError("the model's logits are not numbers (NaN). Try dtype float32; else its weights are damaged.")
