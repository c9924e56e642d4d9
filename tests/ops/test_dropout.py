"""Dropout by gaps has the distribution of dropout by coins."""

import pytest
import torch
from fast_path_helpers import adapted, examples, gradients
from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.fast_paths import FastPaths
from llm_adapters.fast_paths.layers import CheapDropout
from llm_adapters.ops.dropout import drop, dropped
from llm_adapters.training.collator import Collator


@given(st.integers(1, 3000), st.floats(0.001, 0.9), st.integers(0, 1000))
def test_indices_are_ascending_places(count: int, p: float, seed: int) -> None:
    torch.manual_seed(seed)
    found = dropped(count, p)
    assert found.dtype == torch.int32
    assert torch.equal(found, found.unique())
    if len(found):
        assert 0 <= found[0] <= found[-1] < count


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5])
def test_share_and_pairs_are_those_of_independent_draws(p: float) -> None:
    torch.manual_seed(0)
    count = 2_000_000
    hit = torch.zeros(count, dtype=torch.bool)
    hit[dropped(count, p)] = True
    for seen, expected in (
        (hit, p),
        (hit[1:] & hit[:-1], p * p),  # neighbours
        (hit[7:] & hit[:-7], p * p),
        (hit[0::1000], p),  # the first places are as likely as any
    ):
        error = (expected * (1 - expected) / len(seen)) ** 0.5
        assert abs(seen.double().mean().item() - expected) < 5 * error


def test_first_place_is_dropped_as_often_as_any() -> None:
    torch.manual_seed(0)
    hits = sum(int(len(found) > 0 and found[0] == 0) for found in (dropped(3, 0.3) for _ in range(5000)))
    assert abs(hits / 5000 - 0.3) < 0.035


def test_what_is_kept_is_scaled() -> None:
    values = torch.randn(4, 5)
    out = drop(values, torch.tensor([0, 7]), 0.2, 1 / 0.8)
    expected = values / 0.8
    expected[0, 0] = expected[1, 2] = 0
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("p", [0, 1, -0.1])
def test_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        dropped(3, p)


def test_the_gradient_is_dropped_at_the_same_places() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 40, requires_grad=True)
    out = CheapDropout.apply(x, 0.3)
    out.sum().backward()
    assert torch.equal(out == 0, x.grad == 0)
    assert 0.2 < (out == 0).double().mean() < 0.4


def test_lora_dropout_is_noise_around_the_same_gradient() -> None:
    """The mean over many draws comes near the gradient without dropout; torch's own dropout is the yardstick."""
    model = adapted("llama", "lora", lora_dropout=0.3).train()
    exact_model = adapted("llama", "lora").train()
    with FastPaths(exact_model):
        exact = gradients(exact_model, _packed(exact_model))
    name = next(n for n in exact if "layers.1" in n and "down_proj" in n and "lora_B" in n)

    def mean(forward: object) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.stack([gradients(model, forward(model))[name] for _ in range(150)]).mean(0)

    theirs = mean(_loss)
    with FastPaths(model):
        ours = mean(_packed)
    size = exact[name].norm()
    assert (ours - exact[name]).norm() / size < 2 * (theirs - exact[name]).norm() / size + 0.05


def _loss(model: object) -> torch.Tensor:
    from fast_path_helpers import plain_loss

    return plain_loss(model, examples(3))


def _packed(model: object) -> torch.Tensor:
    return sum(model(**micro.arguments())["loss"] for micro in Collator(0).make_micro_batches(examples(3)))
