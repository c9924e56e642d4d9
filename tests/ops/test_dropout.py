"""Dropout by a hash has the distribution of dropout by coins; backend and reference drop the same entries."""

from typing import Any

import pytest
import torch
from fast_path_helpers import adapted, examples, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llm_adapters.fast_paths import FastPaths
from llm_adapters.ops import backends, dropout
from llm_adapters.training.collator import Collator


def dropped(count: int, p: float) -> torch.Tensor:
    ones = torch.ones(count)
    return dropout.apply(ones, dropout.sample_mask(ones, p), p) == 0


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5])
def test_shares_are_those_of_independent_draws(p: float) -> None:
    torch.manual_seed(0)
    count = 2_000_000
    first, second = dropped(count, p), dropped(count, p)
    for seen, expected in (
        (first, p),
        (first[1:] & first[:-1], p * p),  # neighbours
        (first[64:] & first[:-64], p * p),
        (first & second, p * p),  # another draw is another one
        (first[1:] & second[:-1], p * p),
        (first[::4096], p),  # the first places are as likely as any
    ):
        error = (expected * (1 - expected) / len(seen)) ** 0.5
        assert abs(seen.double().mean().item() - expected) < 5 * error


def test_a_place_is_dropped_in_a_share_of_the_draws() -> None:
    torch.manual_seed(0)
    hits = torch.stack([dropped(3, 0.3) for _ in range(5000)]).double().mean(0)
    assert (hits - 0.3).abs().max() < 0.035


@given(st.integers(1, 300), st.floats(0.001, 0.999), st.integers(0, 2**63 - 2))
def test_backend_and_reference_drop_the_same_entries(count: int, p: float, seed: int) -> None:
    x, mask = torch.ones(count), torch.tensor(seed)
    before = backends.disabled
    try:
        backends.disabled = False
        found = dropout.apply(x, mask, p)
        backends.disabled = True
        assert torch.equal(found, dropout.apply(x, mask, p))
    finally:
        backends.disabled = before


def test_the_draw_follows_torchs_seed(dtype: torch.dtype) -> None:
    x, masks = torch.randn(50, 30).to(dtype), []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(dropout.apply(x, dropout.sample_mask(x, 0.2), 0.2))
    assert torch.equal(*masks)


def test_what_is_kept_is_scaled_and_added_alike(dtype: torch.dtype) -> None:
    x = torch.randn(70, 30).to(dtype)
    seed = dropout.sample_mask(x, 0.2)
    keep = dropout.keep_mask(x, seed, 0.2)
    assert 0.7 < keep.double().mean() < 0.9
    assert torch.equal(dropout.apply(x, seed, 0.2), x.masked_fill(~keep, 0))
    assert torch.equal(dropout.apply(x, seed, 0.2, 1.25), (x * 1.25).masked_fill(~keep, 0))
    assert torch.equal(dropout.apply(x, seed, 0.2, 2), (x * 2.0).masked_fill(~keep, 0))  # an int, too
    out = x.clone()
    dropout.add_(out, x, seed, 0.2)
    assert torch.equal(out, torch.where(keep, x + x, x))


@pytest.mark.parametrize("p", [0, 1, -0.1])
def test_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        dropout.sample_mask(torch.ones(3), p)


def test_the_gradient_is_dropped_at_the_same_places() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 40, requires_grad=True)
    out = dropout.sparse_dropout(x, 0.3)
    out.sum().backward()
    assert torch.equal(out == 0, x.grad == 0)
    torch.testing.assert_close(out[out != 0], (x / 0.7)[out != 0])
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


def test_seeds_are_drawn_together_where_that_is_asked_for() -> None:
    x, calls = torch.ones(3), []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append("randint" in str(func))
            return func(*args, **(kwargs or {}))

    def seeds(count: int) -> list[int]:
        torch.manual_seed(4)
        return [int(dropout.sample_mask(x, 0.2)) for _ in range(count)]

    with Draws():
        assert len(set(seeds(7))) == 7
        assert sum(calls) == 7
        calls.clear()
        with dropout.seeds_drawn_together():
            found = seeds(300)
        assert sum(calls) == 2
    assert len(set(found)) == 300
    with dropout.seeds_drawn_together():
        assert seeds(300) == found  # torch's seed decides
        with pytest.raises(RuntimeError), dropout.seeds_drawn_together():
            raise RuntimeError("an error inside")
        assert dropout.sample_mask(x, 0.2) not in found  # those outside go on
    assert seeds(1) == seeds(1)
