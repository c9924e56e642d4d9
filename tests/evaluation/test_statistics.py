import itertools
import math
import random

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.evaluation.statistics import compare, mcnemar, mean_interval, pass_at_k, spread, wilson


# Newcombe, "Two-sided confidence intervals for the single proportion: comparison of seven methods", Statistics in
# Medicine 17 (1998), table I, method 3 (score method without continuity correction), 95 %.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    # Symmetric: so many right is so many wrong from the other side.
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low))


def test_wilson_of_another_confidence_is_the_root_of_its_definition():
    low, high = wilson(31, 200, confidence=0.99)
    z = 2.5758293035489  # the normal quantile at 0.995
    for end in (low, high):
        assert abs(31 / 200 - end) == pytest.approx(z * (end * (1 - end) / 200) ** 0.5)


@pytest.mark.parametrize(("correct", "total"), [(3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(correct, total):
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(correct, total)


# By hand, 2 · sum of C(n, k) for k <= min, over 2^n:
# n=10, min=1: 2 (1 + 10) / 1024; n=5, min=0: 2 / 32; n=15, min=3: 2 (1 + 15 + 105 + 455) / 32768
@pytest.mark.parametrize(
    ("first", "second", "p"), [(1, 9, 0.021484375), (0, 5, 0.0625), (12, 3, 0.03515625), (5, 5, 1.0), (0, 0, 1.0)]
)
def test_mcnemar_gives_the_binomial_tail(first, second, p):
    assert mcnemar(first, second) == p
    assert mcnemar(second, first) == p


def test_mcnemar_of_many_questions_stays_exact():
    # The normal approximation with continuity correction: z = (|b - c| - 1) / sqrt(b + c) = 99 / sqrt(5000) = 1.4001,
    # two-sided 0.1615; the exact value is this close to it for so many.
    assert mcnemar(2450, 2550) == pytest.approx(0.1615, abs=5e-4)


def test_compare_counts_what_flipped():
    comparison = compare([True, True, False, False, True], [True, False, True, True, True])
    assert (comparison.total, comparison.gained, comparison.lost) == (5, 2, 1)
    assert (comparison.first, comparison.second) == (0.6, 0.8)
    assert comparison.difference == pytest.approx(0.2)
    assert comparison.to_dict()["p_value"] == 1.0  # 2 (1 + 3) / 8


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_compare_refuses_what_cannot_be_paired(first, second):
    with pytest.raises(RequestError, match="same questions"):
        compare(first, second)


def test_spread_of_seeds():
    several = spread([0.2, 0.4, 0.9])
    # mean 0.5; squared deviations 0.09 + 0.01 + 0.16 = 0.26, over n - 1 = 2
    assert (several.count, several.least, several.most) == (3, 0.2, 0.9)
    assert several.mean == pytest.approx(0.5)
    assert several.deviation == pytest.approx(0.13**0.5)
    assert spread([0.3]).deviation is None
    with pytest.raises(RequestError, match="no values"):
        spread([])


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one():
    for count in range(1, 7):
        for correct in range(count + 1):
            for k in range(1, count + 1):
                choices = list(itertools.combinations([True] * correct + [False] * (count - correct), k))
                assert pass_at_k(count, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_stays_exact_for_many_samples():
    # 1 - C(1900, 100) / C(2000, 100), with whole numbers.
    assert pass_at_k(2000, 100, 100) == pytest.approx(1 - math.comb(1900, 100) / math.comb(2000, 100), rel=1e-12)
    for count, correct, k in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(count, correct, k)


def test_the_interval_of_a_mean_of_zeros_and_ones_is_wilsons():
    for right, wrong in ((3, 7), (0, 5), (5, 0), (81, 182)):
        expected = wilson(right, right + wrong)
        assert mean_interval([1.0] * right + [0.0] * wrong) == pytest.approx(expected)
        assert mean_interval([1.0] * right + [0.0] * wrong, most=1000) == pytest.approx(expected)


def test_the_interval_of_a_mean_is_about_that_of_resampling():
    choose = random.Random(0)
    values = [choose.betavariate(0.6, 1.2) for _ in range(300)]
    means = sorted(sum(choose.choices(values, k=300)) / 300 for _ in range(4000))
    assert mean_interval(values) == pytest.approx((means[100], means[3900]), abs=0.004)


def test_the_interval_of_a_mean_holds_its_level():
    """Of pass@1 from 4 samples of each of 60 questions, whose chances differ."""
    choose, inside = random.Random(1), 0
    for _ in range(1000):
        chances = [choose.betavariate(0.5, 1.0) for _ in range(60)]
        values = [sum(choose.random() < chance for _ in range(4)) / 4 for chance in chances]
        low, high = mean_interval(values, most=240)
        inside += low <= 1 / 3 <= high
    assert 930 <= inside <= 970  # 950 expected, with a standard deviation of 7


def test_the_interval_of_equal_values_counts_no_more_outputs_than_there_are():
    assert mean_interval([0.5] * 10, most=40) == pytest.approx(wilson(20, 40))
    assert mean_interval([], most=40) == (0.0, 1.0)
