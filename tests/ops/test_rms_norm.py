import pytest
import torch
from op_helpers import assert_like_formula
from torch.nn import functional

from llm_adapters.ops.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(1, 3), (3, 7), (2, 5, 33), (130, 576)])
def test_it_is_torchs_in_float64(dtype: torch.dtype, shape: tuple) -> None:
    """Two roundings, as transformers' norms round before they multiply by the weight; the gradient reads the result."""
    x, weight = torch.randn(shape).to(dtype), (0.5 + torch.rand(shape[-1])).to(dtype)
    assert_like_formula(
        lambda x: rms_norm(x, weight, 1e-5),
        lambda x: functional.rms_norm(x, shape[-1:], weight.double(), 1e-5),
        x,
        roundings=2,
    )


def test_a_view_with_gaps(dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 20).to(dtype), torch.rand(10).to(dtype)
    assert torch.equal(rms_norm(x[:, ::2], weight, 1e-5), rms_norm(x[:, ::2].contiguous(), weight, 1e-5))
