"""Draws have softmax's distribution, from the tokens that transformers keeps, and depend on nothing else."""

import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llm_adapters.ops.sampling import filtered, gumbel, sampled_scores, scaled

DRAWS = 40_000
LEAST_P = 1e-4  # of a true hypothesis, one test of ten thousand is below


def number(value):
    return torch.tensor([[value]])


def draw(logits, seeds, steps, temperature=1.0, top_k=None, top_p=None):
    options = {} if top_k is None else {"top_k": number(top_k), "top_p": number(top_p).double()}
    shape = torch.broadcast_shapes(seeds.shape[:-1], steps.shape[:-1])
    return sampled_scores(logits.expand(*shape, -1), seeds, steps, number(temperature), **options).argmax(-1)


def some_logits(vocabulary=12, spread=1.5, seed=0):
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def p_value(tokens, probabilities):
    """Of the chi-square test that `tokens` have `probabilities`."""
    expected = probabilities.double() * len(tokens)
    counts = tokens.bincount(minlength=len(probabilities))
    assert counts[expected == 0].sum() == 0
    rare = expected < 5  # counted together
    if rare.any():
        counts, expected = (torch.cat((part[~rare], part[rare].sum()[None])) for part in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return stats.chisquare(counts.numpy(), (expected / expected.sum() * len(tokens)).numpy()).pvalue


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("over", ["seeds", "steps"])
def test_tokens_are_drawn_with_softmaxs_probabilities(over, temperature):
    logits, many = some_logits(), torch.arange(DRAWS)[:, None]
    seeds, steps = (many, number(3)) if over == "seeds" else (number(3), many)
    assert p_value(draw(logits, seeds, steps, temperature), (logits / temperature).softmax(-1)) > LEAST_P


def test_a_wrong_distribution_would_be_found():
    logits, many = some_logits(), torch.arange(DRAWS)[:, None]
    assert p_value(draw(logits, many, number(3), 1.05), logits.softmax(-1)) < LEAST_P


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.8), (7, 0.7)])
def test_of_the_tokens_that_are_kept_too(top_k, top_p):
    logits, many = some_logits(), torch.arange(DRAWS)[:, None]
    kept = by_transformers(logits[None], 0.9, top_k, top_p)[0]
    assert p_value(draw(logits, many, number(0), 0.9, top_k, top_p), kept.softmax(-1)) > LEAST_P


def by_transformers(logits, temperature, top_k, top_p):
    """Scores of transformers' own processors, in the order of its `generate`."""
    processors = [TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList(processors)(torch.zeros(len(logits), 1, dtype=torch.int64), logits)


def test_the_kept_tokens_are_those_of_transformers():
    """Rows of different requests at once: each as it is by itself."""
    cases = [(t, k, p) for t in (0.3, 1.0, 3.0) for k in (0, 1, 2, 10, 500) for p in (0.001, 0.3, 0.9, 0.999, 1.0)]
    for seed in range(3):
        logits = some_logits(len(cases) * 300, 3.0, seed).view(len(cases), 300)
        temperature, top_k, top_p = (torch.tensor(part)[:, None] for part in zip(*cases, strict=True))
        found = filtered(scaled(logits, temperature), top_k, top_p.double())
        for row, case in enumerate(cases):
            expected = by_transformers(logits[row : row + 1], *case)[0]
            assert torch.equal(found[row].isinf(), expected.isinf()), case
            torch.testing.assert_close(found[row].softmax(-1), expected.softmax(-1))


def test_of_equal_logits_top_k_keeps_all_that_transformers_keeps():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = filtered(logits, number(2), number(1.0).double()).isfinite()
    assert kept.tolist() == by_transformers(logits, 1.0, 2, 1.0).isfinite().tolist()
    assert kept.sum() == 4


def test_draws_are_independent():
    """Of the place in the answer, of the seed next to it, of another token's."""
    logits, many = some_logits(6), torch.arange(DRAWS)[:, None]
    first, other = draw(logits, number(3), many), draw(logits, number(4), many)
    for one, two in ((first[:-1], first[1:]), (first[:-7], first[7:]), (first, other)):
        table = (one * 6 + two).bincount(minlength=36).view(6, 6)
        assert stats.chi2_contingency(table.numpy()).pvalue > LEAST_P


def test_noise_is_gumbels():
    noise = gumbel(number(7), torch.arange(50)[:, None], 1000)
    assert noise.isfinite().all()
    assert stats.kstest(noise.flatten().double().numpy(), "gumbel_r").pvalue > LEAST_P
    assert noise.unique().numel() > 49_850  # of 2^24 floats some are met twice


def test_a_draw_depends_on_nothing_around_it():
    logits = torch.stack([some_logits(400, seed=seed) for seed in range(5)])
    seeds, steps = torch.tensor([[5], [2**62], [0], [5], [9]]), torch.tensor([[0], [3], [4], [1], [2**33]])
    temperature, top_k = torch.tensor([[1.0], [0.2], [2.0], [1.0], [0.7]]), torch.tensor([[0], [3], [0], [50], [0]])
    top_p = torch.tensor([[1.0], [1.0], [0.5], [0.9], [1.0]]).double()
    together = sampled_scores(logits, seeds, steps, temperature, top_k, top_p)
    for row in range(5):
        one = slice(row, row + 1)
        alone = sampled_scores(logits[one], seeds[one], steps[one], temperature[one], top_k[one], top_p[one])
        assert torch.equal(alone[0].isinf(), together[row].isinf())
        torch.testing.assert_close(alone[0], together[row])
        assert alone.argmax() == together[row].argmax()
    # Filters that keep all are no filters.
    torch.testing.assert_close(together[:1], sampled_scores(logits[:1], seeds[:1], steps[:1], temperature[:1]))


def test_no_temperature_is_too_small_or_large_and_nan_stays():
    logits = some_logits(50, 100.0)
    for temperature in (1e-5, 1e-30, 1e-60):
        assert draw(logits, number(1), number(0), temperature)[0] == logits.argmax()
    logits[4] = -torch.inf
    for temperature in (1e30, 1e60):  # all alike but what is impossible
        seen = draw(logits, torch.arange(2000)[:, None], number(0), temperature).bincount(minlength=50)
        assert seen[4] == 0
        assert stats.chisquare(seen[seen > 0].numpy()).pvalue > LEAST_P
        assert (seen > 0).sum() == 49
    logits[3] = torch.nan
    assert sampled_scores(logits[None], number(1), number(0), number(1.0)).max().isnan()
    options = number(5), number(0.5).double()
    assert sampled_scores(logits[None], number(1), number(0), number(1.0), *options).max().isnan()
