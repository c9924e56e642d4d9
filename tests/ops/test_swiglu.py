import pytest
import torch
from op_helpers import assert_like_formula, with_gradients
from torch.nn import functional

from llm_adapters.ops.swiglu import swiglu, swiglu_lora


def formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


@pytest.mark.parametrize("shape", [(1,), (3, 5), (70, 100)])
def test_it_is_the_formula(dtype: torch.dtype, shape: tuple) -> None:
    """Two roundings, as the model's own rounds the activation."""
    gate, up = 20 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    assert_like_formula(swiglu, formula, gate, up, roundings=2)


def test_a_gate_far_from_zero_overflows_nowhere(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -200.0, 200.0, 1e30]).to(dtype)
    out, d_gate, _ = with_gradients(swiglu, gate, torch.ones_like(gate))
    assert torch.equal(out[2:], gate[2:])
    assert out[:2].abs().max() < 1e-6
    assert d_gate.isfinite().all()


@pytest.mark.parametrize("sizes", [(64, 96, 5), (33, 40, 4)])
def test_with_the_lora_that_follows(dtype: torch.dtype, sizes: tuple) -> None:
    width, out, rank = sizes
    gate, up, weight = (torch.randn(shape).to(dtype) for shape in ((2, 70, width), (2, 70, width), (out, width)))
    a, b, bias = torch.randn(rank, width), torch.randn(out, rank), torch.randn(out).to(dtype)

    def exact(gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = formula(gate, up)
        return x @ weight.double().t() + bias.double() + 0.5 * x @ a.t() @ b.t()

    mine = lambda gate, up, a, b: swiglu_lora(gate, up, weight, bias, a, b, 0.5, 0.0)  # noqa: E731
    assert_like_formula(mine, exact, gate, up, a, b, roundings=4)
