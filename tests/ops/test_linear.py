"""Products with frozen weights against the same in float64, with the backend where there is one and without."""

import pytest
import torch
from op_helpers import assert_close

from llm_adapters.ops import backends, dropout
from llm_adapters.ops.linear import LoraBranch, frozen_linear, grad_weight, is_fast, linear, linear_lora

# Whole row tiles and a rest, fewer rows than pay, many column tiles; sizes that are the backend's, and others.
SIZES = [(140, 64, 96), (211, 96, 32), (3, 32, 32), (65, 32, 1024), (70, 40, 64), (70, 64, 33)]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "with gaps"])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SIZES)
def test_linear(dtype: torch.dtype, rows: int, in_features: int, out_features: int, layout: str) -> None:
    x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features).to(dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    given = {
        "contiguous": weight,
        "transposed": weight.t().contiguous().t(),
        "with gaps": torch.stack((weight, weight), -1)[..., 0],
    }[layout]
    exact = x.double() @ weight.double().t()
    assert_close(linear(x, given, bias), exact + bias.double())
    out = torch.full((rows, out_features), torch.nan, dtype=dtype)
    assert linear(x, given, None, out) is out
    assert_close(out, exact)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rows", "rank", "width"), [(140, 32, 96), (67, 64, 32), (4099, 32, 64), (9, 32, 32), (70, 3, 33)]
)
def test_grad_weight(dtype: torch.dtype, rows: int, rank: int, width: int, p: float) -> None:
    left, x = torch.randn(rows, rank).to(dtype), torch.randn(rows, width).to(dtype)
    seed = dropout.sample_mask(x, p) if p else None
    kept = x if seed is None else x.masked_fill(~dropout.keep_mask(x, seed, p), 0)
    found = grad_weight(left, x, 0.5, seed, p)
    assert found.dtype == torch.float32
    # The sum is float32's with a backend, and of x's precision without.
    assert_close(found, 0.5 * left.double().t() @ kept.double(), dtype=dtype)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_scale_may_be_an_int(dtype: torch.dtype, scale: int) -> None:
    """C would read the bits of an int as another number."""
    left, x = torch.randn(70, 32).to(dtype), torch.randn(70, 64).to(dtype)
    assert torch.equal(grad_weight(left, x, scale), grad_weight(left, x, float(scale)))


def test_is_fast_where_the_backend_has_products(dtype: torch.dtype, functions: str) -> None:
    if functions == "reference" or dtype == torch.float32:
        assert not is_fast(torch.ones(64, 96, dtype=dtype))


def test_a_frozen_linear_layer(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(96, 64).to(dtype), torch.randn(96).to(dtype)
    x = torch.randn(2, 70, 64).to(dtype).requires_grad_()
    out = frozen_linear(x, weight, bias)
    grad = torch.randn(out.shape).to(dtype)
    (d_x,) = torch.autograd.grad(out, x, grad)
    assert_close(out.detach(), x.detach().double() @ weight.double().t() + bias.double())
    assert_close(d_x, grad.double() @ weight.double())
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, weight, bias), out)


def test_results_may_be_changed_in_place_and_have_no_rows(dtype: torch.dtype) -> None:
    """OLMo clamps its queries; an expert may get no token."""
    weight = torch.randn(96, 64).to(dtype)
    out = frozen_linear(torch.randn(2, 600, 64).to(dtype).requires_grad_(), weight, None)
    out.clamp_(-0.1, 0.1).sum().backward()
    none = torch.zeros(0, 64).to(dtype).requires_grad_()
    found = frozen_linear(none, weight, None)
    assert found.shape == (0, 96)
    found.sum().backward()
    assert none.grad is not None


def test_what_does_not_fit_is_refused() -> None:
    """By us, where a backend would read beyond the end of a tensor."""
    torch.manual_seed(0)
    x, weight = torch.randn(70, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    branch = LoraBranch(torch.zeros(2, 64), torch.zeros(64, 2), 1.0, 1.0, None, 0.0, True)
    for wrong in (
        lambda: linear(x[:, :32], weight),
        lambda: linear(x, weight, torch.zeros(32).bfloat16()),
        lambda: linear(x, weight, None, torch.zeros(70, 64).bfloat16()),
        lambda: grad_weight(x[:65], x, 1.0),
        lambda: linear_lora(x, weight, None, branch),
    ):
        with pytest.raises(ValueError, match=r"^(a linear layer|a gradient|a LoRA) of \("):
            wrong()


def test_the_same_entries_are_dropped_whole_or_in_vectors() -> None:
    """A backend may have the hash twice: entry by entry, and for products 16 at a time."""
    torch.manual_seed(0)
    x = torch.ones(70, 64).bfloat16()
    seed = dropout.sample_mask(x, 0.3)
    branch = LoraBranch(torch.eye(64), torch.eye(64), 1.0, 1.0, seed, 0.3, True)
    zeros = torch.zeros(64, 64).bfloat16()
    expected = dropout.keep_mask(x, seed, 0.3).to(x.dtype)
    assert torch.equal(linear_lora(x, zeros, None, branch)[0], expected)
    assert torch.equal(linear_lora(x, zeros, None, branch._replace(drops_input=False))[0], expected)


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    x, weight, left = (torch.randn(shape).bfloat16() for shape in ((300, 64), (96, 64), (300, 32)))
    if backends.disabled or not is_fast(weight):
        pytest.skip("torch's own products may differ by rounding")
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.cat((linear(x, weight).float(), grad_weight(left, x, 1.0).repeat(1, 2)[:, :96])))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
