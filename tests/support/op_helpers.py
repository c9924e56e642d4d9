"""What the tests of operators share: precisions, tolerances, gradients."""

from collections.abc import Callable

import torch

PRECISIONS = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # relative to the largest: a bfloat16 has 8 bits


def assert_close(
    found: torch.Tensor, exact: torch.Tensor, roundings: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """`found` is `exact` (float64) but for so many roundings to its precision, relative to the largest entry.

    Args:
        found: of any shape.
        exact: of the same.
        roundings: how many.
        dtype: the precision in which it was computed; None for its own.
    """
    assert found.shape == exact.shape
    distance = (found.double() - exact.double()).abs().max()
    assert distance <= roundings * TOLERANCE[dtype or found.dtype] * exact.double().abs().max(), distance


def with_gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The result of `function`, and the gradients of a weighted sum of it, the same weights in every call."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def assert_like_formula(
    operator: Callable[..., torch.Tensor],
    formula: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
    roundings: float = 1.0,
) -> None:
    """`operator` and its gradients are those of `formula` in float64, to the precision of the first of the inputs."""
    expected = with_gradients(formula, *(x.double() for x in inputs))
    for found, exact in zip(with_gradients(operator, *inputs), expected, strict=True):
        assert_close(found, exact, roundings, inputs[0].dtype)
