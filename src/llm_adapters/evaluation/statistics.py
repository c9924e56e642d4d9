"""Certainty of scores: the interval of one, the paired test of two, the spread of several. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev

from llm_adapters.errors import RequestError


def wilson(correct: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927; no continuity correction).

    With p = correct / total and z the normal quantile, the p' for which |p - p'| <= z sqrt(p'(1 - p') / total). Unlike
    p ± z·sqrt(p(1 - p)/n) it holds its level for few questions and near 0 and 1.

    Args:
        correct: questions that were right; no whole number where `total` is an effective number of questions.
        total: all questions.
        confidence: the level, 0.95 for a 95 % interval.

    Returns:
        The interval's two ends, within 0 to 1; (0, 1) for no questions.

    Raises:
        ValueError: unless ``0 <= correct <= total`` and ``0 < confidence < 1``.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is not a proportion")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, spread = correct / total, z * z / total
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    # At the ends rounding would leave the interval a hair beside the score itself.
    return (0.0 if correct == 0 else max(0.0, centre - half)), (1.0 if correct == total else min(1.0, centre + half))


def mean_interval(values: Sequence[float], most: float = math.inf, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of values from 0 to 1: Wilson's, with the effective number of values.

    So many questions that are either right or wrong would have the mean's variance: n p(1 - p) / s² (Franco et al.
    2019, *Comparative study of confidence intervals for proportions in complex sample surveys*). For values that are 0
    and 1 alone that is `wilson` itself.

    Args:
        values: one for each question, 0 to 1.
        most: the largest effective number, for values that happen to be alike: how many outputs they come from.
        confidence: the level, 0.95 for a 95 % interval.

    Returns:
        The interval's two ends, within 0 to 1; (0, 1) for no values.
    """
    if not values:
        return 0.0, 1.0
    count, mean = len(values), fmean(values)
    variance, binary = fmean([(value - mean) ** 2 for value in values]), mean * (1 - mean)
    effective = float(count) if binary <= 0 else min(count * binary / variance if variance else most, most)
    return wilson(min(max(mean, 0.0), 1.0) * effective, effective, confidence)


def pass_at_k(count: int, correct: int, k: int) -> float:
    """Probability that one of `k` samples is right, estimated without bias from more (Chen et al. 2021, equation 1).

    1 - C(count - correct, k) / C(count, k), as a product, which stays exact for many samples.

    Args:
        count: samples of a question.
        correct: those that are right.
        k: samples that are looked at.

    Raises:
        ValueError: unless ``0 <= correct <= count`` and ``1 <= k <= count``.
    """
    if not (0 <= correct <= count and 1 <= k <= count):
        raise ValueError(f"pass@{k} of {correct} right among {count}")
    if count - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / rank for rank in range(count - correct + 1, count + 1))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (McNemar 1947), 0 to 1.

    If neither measurement is better, each question that only one got right falls on either side with probability one
    half: p = 2 P(X <= min) for X ~ B(n, 1/2), at most 1. Nothing is approximated, so few questions are no problem.

    Args:
        only_first: questions that were right in the first measurement alone.
        only_second: questions that were right in the second alone.

    Raises:
        ValueError: a negative count.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts cannot be negative: {only_first}, {only_second}")
    flips = only_first + only_second
    tail, term = 0, 1
    for k in range(min(only_first, only_second) + 1):
        tail += term  # C(flips, k), each from the one before: thousands of them from scratch take seconds
        term = term * (flips - k) // (k + 1)
    return min(1.0, 2 * tail / 2**flips)


@dataclass(frozen=True)
class Comparison:
    """Two measurements of the same questions.

    Attributes:
        total: the number of questions.
        first: accuracy of the first measurement.
        second: accuracy of the second.
        gained: questions that only the second got right.
        lost: questions that only the first got right.
    """

    total: int
    first: float
    second: float
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        """Accuracy of the second minus accuracy of the first, -1 to 1."""
        return (self.gained - self.lost) / self.total

    @property
    def p_value(self) -> float:
        """Exact two-sided p-value of McNemar's test."""
        return mcnemar(self.lost, self.gained)

    def to_dict(self) -> dict[str, object]:
        """JSON document."""
        return asdict(self) | {"difference": self.difference, "p_value": self.p_value}


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Compare two measurements question by question.

    Args:
        first: for each question, True where the first measurement got it right.
        second: the same of the second.

    Raises:
        RequestError: they are not of the same length, or empty.
    """
    if len(first) != len(second) or not first:
        raise RequestError(f"only the same questions can be compared: {len(first)} here, {len(second)} there.")
    pairs = list(zip(first, second, strict=True))
    return Comparison(
        total=len(pairs),
        first=sum(first) / len(pairs),
        second=sum(second) / len(pairs),
        gained=sum(b and not a for a, b in pairs),
        lost=sum(a and not b for a, b in pairs),
    )


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        count: how many there are.
        mean: their mean.
        deviation: the sample's standard deviation, None for a single one.
        least: the lowest.
        most: the highest.
    """

    count: int
    mean: float
    deviation: float | None
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of one measurement with several seeds.

    Args:
        values: the measurement with each seed.

    Raises:
        RequestError: there are no values.
    """
    if not values:
        raise RequestError("no values to take the mean of.")
    deviation = stdev(values) if len(values) > 1 else None
    return Spread(len(values), fmean(values), deviation, min(values), max(values))
