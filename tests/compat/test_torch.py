"""The private interfaces of torch that are used are there, each by its name, and do what they are used for."""

import pytest
import torch
from torch.nn import functional

from llm_adapters.compat import torch as compat
from llm_adapters.errors import WorkError


@pytest.mark.parametrize("name", compat.PRIVATE)
def test_it_is_there(name: str) -> None:
    assert compat.missing_reason(name) is None


def test_one_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_softmax_backward_data")
    with pytest.raises(WorkError, match=r"no torch\._softmax_backward_data, which the gradient of attention's softmax"):
        compat.softmax_backward(torch.ones(2, 3), torch.ones(2, 3))


def gradient(function, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    x, grad, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    expected = gradient(lambda x: torch.softmax(x, -1), x, grad)
    torch.testing.assert_close(compat.softmax_backward(grad, torch.softmax(x, -1)), expected)
    torch.testing.assert_close(compat.silu_backward(grad, x), gradient(functional.silu, x, grad))
    mean = x.mean(-1, keepdim=True)
    inverse_std = ((x - mean).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = gradient(lambda x: functional.layer_norm(x, (8,), weight, eps=1e-5), x, grad)
    torch.testing.assert_close(compat.layer_norm_input_grad(grad, x, mean, inverse_std, weight), expected)


def test_prepacked_weights_multiply() -> None:
    if reason := compat.prepack_unsupported_reason():
        pytest.skip(reason)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    linear, blocks = compat.prepacked_linear(), compat.prepack(weight, 64)
    expected = functional.linear(x, weight).float()
    for found, wanted in (
        (linear(x, blocks, None, "none", [], ""), expected),
        (linear(x, blocks, None, "swish", [], ""), functional.silu(expected)),
        (linear.binary(x, torch.full((3, 96), 2.0).bfloat16(), blocks, None, "mul"), 2 * expected),
    ):
        torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
