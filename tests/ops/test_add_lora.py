import pytest
import torch
from op_helpers import assert_close, with_gradients

from llm_adapters.ops import dropout
from llm_adapters.ops.add_lora import add_lora


@pytest.mark.parametrize(("rows", "width", "out", "rank"), [(70, 32, 64, 2), (211, 96, 32, 33), (5, 40, 33, 2)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_beside_any_layer(dtype: torch.dtype, rows: int, width: int, out: int, rank: int, p: float) -> None:
    """Against the formula, with the entries dropped that the seed says."""
    base, x = torch.randn(1, rows, out).to(dtype), torch.randn(1, rows, width).to(dtype)
    a, b = torch.randn(width, rank + 1).t()[:rank], torch.randn(out, rank)  # A as PEFT's SVD leaves it
    torch.manual_seed(7)
    keep = dropout.keep_mask(x, dropout.sample_mask(x[0], p), p) / (1 - p) if p else torch.ones(rows, width)
    torch.manual_seed(7)
    found = with_gradients(lambda base, x, a, b: add_lora(base, x, a, b, 0.5, p), base, x, a, b)

    def formula(base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return base + 0.5 * (keep.double() * x) @ a.t() @ b.t()

    expected = with_gradients(formula, *(part.double() for part in (base, x, a, b)))
    for mine, exact in zip(found, expected, strict=True):
        # Two products, and what is between them, are rounded; the gradients of float32 masters in x's precision too.
        assert_close(mine, exact, 3, dtype)


def test_what_it_is_added_to_is_left_alone(dtype: torch.dtype) -> None:
    base, x = torch.randn(3, 8).to(dtype), torch.randn(3, 4).to(dtype)
    before = base.clone()
    found = add_lora(base, x, torch.randn(2, 4), torch.randn(8, 2), 1.0, 0.0)
    assert torch.equal(base, before)
    assert not torch.equal(found, before)
