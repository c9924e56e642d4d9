"""How the next tokens are chosen: greedy, or beam search. Both keep, for every group of slots, one question's answer.

A group is one slot for greedy decoding, and `width` slots, a beam each, for beam search.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from llm_adapters.errors import WorkError

GUESSES = 3  # tokens that are guessed at a time
REPEATED = 3  # of an answer's tokens must stand in it twice for guessing
FEW = 64  # answers: for more the machine is busy as it is, and guesses that are wrong cost what right ones save
_NEVER = -1e9  # the score of what must not be chosen


class Search(Protocol):
    """What the engine asks of a way to choose tokens.

    Attributes:
        width: slots of a group.
        count: (groups,), int64: tokens that each group's answers in the making have.
    """

    width: int
    count: torch.Tensor

    def feed(self, groups: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What to compute for these `groups`: the last tokens of each, and some that may follow.

        Returns:
            Some of the groups, (some,), and their tokens, (some * width, tokens); a pair for each number of tokens.
        """

    def begin(self, groups: torch.Tensor, logits: torch.Tensor) -> None:
        """New questions in these `groups`; `logits` (groups, vocabulary) follow their prompts."""

    def advance(self, groups: torch.Tensor, fed: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
        """At least one more token for these `groups`.

        Args:
            groups: as `feed` returned them.
            fed: the tokens, as `feed` returned them.
            logits: (groups * width, tokens, vocabulary), what follows each of the tokens.

        Returns:
            Where slots change places, (groups, width): which slot of its group each one goes on from.
        """

    def finished(self, groups: torch.Tensor) -> torch.Tensor:
        """Which of these `groups` have their answer, (groups,), bool."""

    def answer(self, group: int) -> list[int]:
        """The tokens of a finished group, with the one that ends them if there is one."""


class Greedy:
    """Always the most probable token.

    An answer whose last tokens stand in it a second time is likely to go on as it did before. Where few answers are in
    the making, what followed is computed in the same step as a guess, and kept as far as it is what the model says: the
    answer is the same, and there sooner (speculative decoding, Leviathan et al. 2023; the draft is the answer).
    """

    width = 1

    def __init__(self, groups: int, limit: int, ends: Sequence[int], device: torch.device) -> None:
        self.limit, self.ends = limit, torch.tensor(list(ends), device=device)
        self.count = torch.zeros(groups, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(groups, limit, dtype=torch.int64, device=device)
        self.ended = torch.zeros(groups, dtype=torch.bool, device=device)

    def feed(self, groups: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See `Search`."""
        tokens, count = self.tokens[groups], self.count[groups, None]
        period = _period(tokens, count) if len(groups) <= FEW else torch.zeros_like(count)
        # As many as are computed, or may follow; in an answer that repeats itself, those of the times before.
        steps = torch.arange(GUESSES + 1, device=groups.device)
        at = torch.where(period > 0, count - 1 - period + steps % period.clamp(min=1), count - 1)
        at[:, 0] = count[:, 0] - 1
        fed, repeats = tokens.gather(1, at), period[:, 0] > 0
        parts = (groups[~repeats], fed[~repeats, :1]), (groups[repeats], fed[repeats])
        return [part for part in parts if len(part[0])]

    def begin(self, groups: torch.Tensor, logits: torch.Tensor) -> None:
        """See `Search`."""
        self.count[groups] = 0
        self.advance(groups, self.tokens[groups, :1], logits[:, None])

    def advance(self, groups: torch.Tensor, fed: torch.Tensor, logits: torch.Tensor) -> None:
        """See `Search`."""
        best, chosen = logits.max(-1)
        require_numbers(best)
        count = self.count[groups]
        # A token follows from right guesses only, no token follows an end, and there is a limit.
        wrong, ends = fed[:, 1:] != chosen[:, :-1], torch.isin(chosen, self.ends)
        follows = torch.cat((torch.zeros_like(ends[:, :1]), wrong | ends[:, :-1]), 1).cumsum(1) == 0
        at = count[:, None] + torch.arange(fed.shape[1], device=groups.device)
        follows &= at < self.limit
        rows = groups[:, None].expand_as(at)
        self.tokens[rows[follows], at[follows]] = chosen[follows]
        self.count[groups] = count + follows.sum(1)
        self.ended[groups] = (ends & follows).any(1) | (self.count[groups] >= self.limit)

    def finished(self, groups: torch.Tensor) -> torch.Tensor:
        """See `Search`."""
        return self.ended[groups]

    def answer(self, group: int) -> list[int]:
        """See `Search`."""
        return self.tokens[group, : int(self.count[group])].tolist()


def _period(tokens: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """How far back the last `REPEATED` of `count` tokens stand a second time, the nearest; 0 where they do not.

    Args:
        tokens: (answers, limit).
        count: (answers, 1).
    """
    most = int(count.max())
    if most <= REPEATED:
        return torch.zeros_like(count)
    last = torch.arange(REPEATED, device=tokens.device) - REPEATED
    recent = tokens.gather(1, (count + last).clamp(min=0))
    same = (tokens[:, :most].unfold(1, REPEATED, 1) == recent[:, None]).all(-1)
    starts = torch.arange(same.shape[1], device=tokens.device)
    nearest = torch.where(same & (starts < count - REPEATED), starts, -1).amax(1, keepdim=True)
    return torch.where(nearest >= 0, count - REPEATED - nearest, 0)


class Beams:
    """Beam search as in transformers' `generate`, with length penalty 1 and without early stopping.

    A question ends when the best of its unfinished beams, at its mean log-probability, could not enter the finished
    ones any more.
    """

    def __init__(self, groups: int, width: int, limit: int, ends: Sequence[int], device: torch.device) -> None:
        self.width, self.limit, self.ends = width, limit, torch.tensor(list(ends), device=device)
        # So many candidates that as many as there are beams go on whatever ends.
        self.candidates = max(2, 1 + len(self.ends)) * width
        self.count = torch.zeros(groups, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(groups, width, limit, dtype=torch.int64, device=device)
        self.scores = torch.zeros(groups, width, device=device)
        self.done_tokens = torch.zeros_like(self.tokens)
        self.done_lengths = torch.zeros(groups, width, dtype=torch.int64, device=device)
        self.done_scores = torch.zeros_like(self.scores)
        self.done = torch.zeros(groups, width, dtype=torch.bool, device=device)
        self.ended = torch.zeros(groups, dtype=torch.bool, device=device)

    def feed(self, groups: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See `Search`."""
        last = (self.count[groups, None, None] - 1).expand(-1, self.width, 1)
        return [(groups, self.tokens[groups].gather(2, last).flatten(0, 1))]

    def begin(self, groups: torch.Tensor, logits: torch.Tensor) -> None:
        """See `Search`."""
        self.count[groups] = 0
        self.scores[groups] = _NEVER  # all beams begin alike: only one may have children
        self.scores[groups, 0] = 0.0
        self.done_scores[groups] = _NEVER
        self.done[groups] = False
        self._extend(groups, logits.repeat_interleave(self.width, 0))

    def advance(self, groups: torch.Tensor, fed: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See `Search`."""
        return self._extend(groups, logits[:, 0])

    def finished(self, groups: torch.Tensor) -> torch.Tensor:
        """See `Search`."""
        return self.ended[groups]

    def answer(self, group: int) -> list[int]:
        """See `Search`."""
        return self.done_tokens[group, 0, : int(self.done_lengths[group, 0])].tolist()

    def _extend(self, groups: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """One more token for `groups`; returns (groups, width), the beam that each beam goes on from."""
        count = self.count[groups, None]
        among = min(self.candidates, logits.shape[-1])
        logits = logits.float()
        best, words = logits.topk(among)
        require_numbers(best)
        best = best - logits.logsumexp(-1, keepdim=True)
        best = (best.view(len(groups), self.width, among) + self.scores[groups, :, None]).flatten(1)
        scores, at = best.topk(self.candidates)
        parents, chosen = at // among, words.view(len(groups), -1).gather(1, at)
        tokens = _gather(self.tokens[groups], parents)
        tokens.scatter_(2, count[:, :, None].expand(-1, self.candidates, 1), chosen[:, :, None])
        stops = torch.isin(chosen, self.ends) | (count + 1 >= self.limit)

        open_scores, kept = (scores + stops * _NEVER).topk(self.width)
        self.tokens[groups], self.scores[groups] = _gather(tokens, kept), open_scores

        first = torch.arange(self.candidates, device=logits.device) < self.width
        ends = stops & first
        ended = scores / (count + 1) + ~ends * _NEVER
        merged = torch.cat((self.done_scores[groups], ended), 1)
        self.done_scores[groups], best_done = merged.topk(self.width)
        lengths = torch.cat((self.done_lengths[groups], (count + 1).expand_as(chosen)), 1)
        self.done_tokens[groups] = _gather(torch.cat((self.done_tokens[groups], tokens), 1), best_done)
        self.done_lengths[groups] = lengths.gather(1, best_done)
        self.done[groups] = torch.cat((self.done[groups], ends), 1).gather(1, best_done)

        self.count[groups] += 1
        worst = torch.where(self.done[groups], self.done_scores[groups].amin(1, keepdim=True), _NEVER)
        hopeful = (open_scores[:, :1] / (count + 1) > worst).any(1)
        self.ended[groups] = ~hopeful | stops.all(1)
        return parents.gather(1, kept)


def _gather(values: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """(groups, beams, tokens), (groups, chosen) -> (groups, chosen, tokens)."""
    return values.gather(1, beams[:, :, None].expand(-1, -1, values.shape[2]))


def require_numbers(scores: torch.Tensor) -> None:
    """Raise `WorkError` where one of `scores` is not a number."""
    if scores.isnan().any():
        raise WorkError("the model's logits are not numbers (NaN). Try dtype float32; else its weights are damaged.")
