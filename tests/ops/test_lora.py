import pytest
import torch
from op_helpers import assert_close, with_gradients

from llm_adapters.ops import dropout
from llm_adapters.ops.lora import LoraStack, lora_linear


@pytest.mark.parametrize(("rows", "width", "out", "rank"), [(70, 32, 64, 2), (211, 96, 32, 33), (5, 40, 33, 2)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_in_training(dtype: torch.dtype, rows: int, width: int, out: int, rank: int, p: float) -> None:
    """Against the formula, with the entries dropped that the seed says; odd sizes take torch's products."""
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, width), (out, width), (out,)))
    a, b = torch.randn(width, rank + 1).t()[:rank], torch.randn(out, rank)  # A as PEFT's SVD leaves it
    torch.manual_seed(7)
    keep = dropout.keep_mask(x, dropout.sample_mask(x, p), p) / (1 - p) if p else torch.ones(rows, width)
    torch.manual_seed(7)
    found = with_gradients(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.5, p), x, a, b)

    def formula(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x @ weight.double().t() + bias.double() + 0.5 * (keep.double() * x) @ a.t() @ b.t()

    expected = with_gradients(formula, *(part.double() for part in (x, a, b)))
    for mine, exact in zip(found, expected, strict=True):
        # Two products, and what is between them, are rounded; the gradients of float32 masters in x's precision too.
        assert_close(mine, exact, 3, dtype)


def test_without_a_gradient_of_x(dtype: torch.dtype) -> None:
    """The first layer's input has none."""
    x, weight = torch.randn(70, 32).to(dtype), torch.randn(64, 32).to(dtype)
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    found = torch.autograd.grad(lora_linear(x, weight, None, a, b, 2, 0.0).sum(), (a, b))
    both = torch.autograd.grad(lora_linear(x.clone().requires_grad_(), weight, None, a, b, 2.0, 0.0).sum(), (a, b))
    for one, other in zip(found, both, strict=True):
        assert_close(one, other.double(), 3, dtype)


@pytest.mark.parametrize("known", ["ids", "ids and runs", "one adapter"])
@pytest.mark.parametrize(
    ("rows", "width", "out", "ranks"), [(1, 5, 3, (2,)), (9, 64, 40, (8, 33)), (70, 33, 64, (64, 4))]
)
def test_in_generation_each_row_has_its_adapter(
    dtype: torch.dtype, rows: int, width: int, out: int, ranks: tuple, known: str
) -> None:
    """Adapters 0, 2, 3, ... have a LoRA here, adapter 1 has none, and -1 is no adapter."""
    numbers = [0, *range(2, len(ranks) + 1)]
    pairs = {n: (torch.randn(rank, width), torch.randn(out, rank)) for n, rank in zip(numbers, ranks, strict=True)}
    x, base = torch.randn(1, rows, width).to(dtype), torch.randn(1, rows, out).to(dtype)
    ids = torch.arange(rows) // 3 % (len(ranks) + 2) - 1
    if known == "one adapter":
        ids = torch.zeros(rows, dtype=torch.int64)
    runs = [(int(n), slice(row, row + 1)) for row, n in enumerate(ids) if n >= 0]
    found = base.clone()
    with torch.inference_mode():
        stack = LoraStack(pairs, len(ranks) + 1, torch.empty(out, width, dtype=dtype))
        told = {"ids": (ids,), "ids and runs": (ids, runs), "one adapter": ()}[known]
        assert stack.add_(found, x, *told) is found
    for row in range(rows):
        expected = base[0, row].double()
        if int(ids[row]) in pairs:
            a, b = (part.to(dtype).double() for part in pairs[int(ids[row])])
            expected = expected + (x[0, row].double() @ a.t()).to(dtype).double() @ b.t()
        assert_close(found[0, row], expected, 2)
    assert torch.equal(found[0, ids < 0], base[0, ids < 0])
