"""Products with frozen weights against the same in float64, with the kernels where there are some and without."""

import pytest
import torch
from torch import nn

from llm_adapters.ops import dropout
from llm_adapters.ops import linear as products
from llm_adapters.ops.cpu import build as kernels

PRECISIONS = [torch.float32, torch.bfloat16]
ROOM = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # relative to the largest


@pytest.fixture(params=PRECISIONS, ids=["float32", "bfloat16"])
def kind(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


def assert_close(found: torch.Tensor, exact: torch.Tensor, room: float) -> None:
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().max() <= room * exact.abs().max()


# Whole strips and a rest, fewer rows than pay, many pieces; sizes that are the kernels', and others.
SIZES = [(140, 64, 96), (211, 96, 32), (3, 32, 32), (65, 32, 1024), (70, 40, 64), (70, 64, 33)]


@pytest.mark.parametrize("lying", ["across", "along", "with gaps"])
@pytest.mark.parametrize(("rows", "width", "out"), SIZES)
def test_product(kind: torch.dtype, rows: int, width: int, out: int, lying: str) -> None:
    x, bias = torch.randn(rows, width).to(kind), torch.randn(out).to(kind)
    weight = torch.randn(width, out).to(kind)
    given = {
        "across": weight.t().contiguous().t(),
        "along": weight,
        "with gaps": torch.stack((weight, weight), -1)[..., 0],
    }[lying]
    assert_close(products.product(x, given, bias), x.double() @ weight.double() + bias.double(), ROOM[kind])
    room = torch.full((rows, out), torch.nan, dtype=kind)
    assert products.product(x, given, None, room) is room
    assert_close(room, x.double() @ weight.double(), ROOM[kind])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rows", "rank", "width"), [(140, 32, 96), (67, 64, 32), (4099, 32, 64), (9, 32, 32), (70, 3, 33)]
)
def test_outer(kind: torch.dtype, rows: int, rank: int, width: int, p: float) -> None:
    left, x = torch.randn(rows, rank).to(kind), torch.randn(rows, width).to(kind)
    mask = dropout.drawn(x, p) if p else None
    seen = x if mask is None else dropout.drop(x, mask, p)
    found = products.outer(left, x, 0.5, mask, p)
    assert found.dtype == torch.float32
    assert_close(found, 0.5 * left.double().t() @ seen.double(), ROOM[kind])


def test_a_frozen_linear_layer(kind: torch.dtype) -> None:
    layer = nn.Linear(64, 96).to(kind).requires_grad_(False)
    kernel = kernels.of(layer.weight)
    assert products.takes(layer) == (kernel is not None and bool(kernel.strip))
    assert not products.takes(nn.Linear(64, 96).to(kind))  # it is trained
    assert not products.takes(nn.LayerNorm(64).requires_grad_(False))
    x = torch.randn(2, 70, 64).to(kind).requires_grad_()
    out = products.linear_forward(layer, layer.forward, x)
    grad = torch.randn(out.shape).to(kind)
    (d_x,) = torch.autograd.grad(out, x, grad)
    weight = layer.weight.double()
    assert_close(out.detach(), x.detach().double() @ weight.t() + layer.bias.double(), ROOM[kind])
    assert_close(d_x, grad.double() @ weight, ROOM[kind])
    with torch.no_grad():
        assert torch.equal(products.linear_forward(layer, layer.forward, x), out)
        with pytest.raises(RuntimeError):  # torch's own refusal: another precision is not this layer's
            products.linear_forward(layer, layer.forward, x.double())


def test_what_does_not_fit_is_refused() -> None:
    """By us, where a kernel would read beyond the end of a tensor."""
    torch.manual_seed(0)
    x, weight, factor = torch.randn(70, 64).bfloat16(), torch.randn(64, 96).bfloat16(), (torch.randn(64, 2), 1.0)
    for wrong in (
        lambda: products.product(x[:, :32], weight),
        lambda: products.product(x, weight, torch.zeros(32).bfloat16()),
        lambda: products.product(x, weight, None, torch.zeros(70, 64).bfloat16()),
        lambda: products.outer(x[:65], x, 1.0),
        lambda: products.product_with(
            x, weight, None, products.Added(factor, (torch.zeros(2, 64), 1.0), None, 0.0, products.BEFORE)
        ),
    ):
        with pytest.raises(ValueError, match=r"^(a product|an outer product|a LoRA) of \("):
            wrong()


def test_a_layer_that_is_trained_later_gets_its_gradient(kind: torch.dtype) -> None:
    layer = nn.Linear(64, 96).to(kind).requires_grad_(False)
    layer.weight.requires_grad_(True)
    x = torch.randn(70, 64).to(kind)
    products.linear_forward(layer, layer.forward, x).sum().backward()
    assert layer.weight.grad is not None


def test_results_may_be_changed_in_place_and_have_no_rows(kind: torch.dtype) -> None:
    """OLMo clamps its queries; an expert may get no token."""
    layer = nn.Linear(64, 96).to(kind).requires_grad_(False)
    out = products.linear_forward(layer, layer.forward, torch.randn(2, 600, 64).to(kind).requires_grad_())
    out.clamp_(-0.1, 0.1).sum().backward()
    none = torch.zeros(0, 64).to(kind).requires_grad_()
    found = products.linear_forward(layer, layer.forward, none)
    assert found.shape == (0, 96)
    found.sum().backward()
    assert none.grad is not None


def test_the_same_entries_are_dropped_whole_or_in_vectors() -> None:
    """The kernels have the hash twice: entry by entry, and for products 16 at a time."""
    torch.manual_seed(0)
    x = torch.ones(70, 64).bfloat16()
    mask = dropout.drawn(x, 0.3)
    added = products.Added((torch.eye(64), 1.0), (torch.eye(64), 1.0), mask, 0.3, products.BEFORE)
    zeros = torch.zeros(64, 64).bfloat16()
    expected = dropout.drop(x, mask, 0.3)
    assert torch.equal(products.product_with(x, zeros, None, added)[0], expected)
    assert torch.equal(products.product_with(x, zeros, None, added._replace(at=products.AFTER))[0], expected)


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    x, weight, left = (torch.randn(shape).bfloat16() for shape in ((300, 64), (64, 96), (300, 32)))
    if (kernel := kernels.of(x)) is None or not kernel.strip:
        pytest.skip("torch's own products may differ by rounding")
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                torch.cat((products.product(x, weight).float(), products.outer(left, x, 1.0).repeat(1, 2)[:, :96]))
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
