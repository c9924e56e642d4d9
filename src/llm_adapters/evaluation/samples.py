"""Several sampled answers to one question: their majority vote, and how often one of k is right (pass@k)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_adapters.evaluation.statistics import mean_interval, pass_at_k, wilson
from llm_adapters.tasks.answers import is_correct


@dataclass(frozen=True)
class Sample:
    """One of several answers to a question; the attributes are as of a `Record`."""

    output: str
    extracted: float | str | None
    correct: bool
    finished: bool
    tokens: int


def vote(answers: Sequence[float | str | None], kind: str, protocol: str = "default") -> int:
    """Majority vote (self-consistency, Wang et al. 2022): the most frequent answer, of equally frequent ones the first.

    Args:
        answers: as `llm_adapters.tasks.answers.extract` reads them; None, where there is none, has no vote.
        kind: the kind of answer: answers are the same where `is_correct` says so.
        protocol: as for `is_correct`.

    Returns:
        The place of the first of the answers that won; 0 where there is no answer at all.
    """
    votes: dict[int, int] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            alike = (first for first in votes if is_correct(answer, str(answers[first]), kind, protocol))
            first = next(alike, place)
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=votes.__getitem__, default=0)  # of the largest the first, in the order of their places


def sampled_scores(samples: Sequence[Sequence[Sample]], voted: Sequence[bool]) -> dict[str, Any]:
    """Scores of questions that have been answered several times.

    Args:
        samples: of each question, as many of each.
        voted: True for the questions whose majority vote is right.

    Returns:
        ``samples`` (their number), ``pass@k`` for k = 1, 2, 4, ... and that number, each with ``accuracy`` and
        ``interval``, and ``majority`` with ``correct`` and ``total`` too. Intervals are of 95 %, over questions.
    """
    count, total = len(samples[0]), len(samples)
    right = [sum(sample.correct for sample in each) for each in samples]
    scores: dict[str, Any] = {"samples": count}
    for k in sorted({count, *(2**power for power in range(count.bit_length()))}):
        values = [pass_at_k(count, correct, k) for correct in right]
        interval = mean_interval(values, most=total * count)
        scores[f"pass@{k}"] = {"accuracy": sum(values) / total, "interval": list(interval)}
    interval = wilson(sum(voted), total)
    scores["majority"] = {
        "accuracy": sum(voted) / total,
        "interval": list(interval),
        "correct": sum(voted),
        "total": total,
    }
    return scores


def is_score(name: str) -> bool:
    """Tell if `name` is one of the keys that `sampled_scores` gives."""
    return name in ("samples", "majority") or name.startswith("pass@")
