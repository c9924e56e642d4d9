import pytest
import torch
from op_helpers import assert_like_formula
from transformers.models.llama import modeling_llama

from llm_adapters.ops.rotary import apply_rotary_pos_emb


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 10), (9, 64)])
def test_it_is_that_of_llama(dtype: torch.dtype, num_heads: int, head_dim: int, dense: bool) -> None:
    """Of queries as projections leave them, heads within tokens, and of others."""
    q, k = (torch.randn(2, 5, heads, head_dim).to(dtype).transpose(1, 2) for heads in (num_heads, 1))
    cos, sin = (torch.randn(2, 5, head_dim).to(dtype) for _ in range(2))
    if not dense:
        q, k = q.contiguous(), k.contiguous()

    def mine(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.cat(apply_rotary_pos_emb(q, k, cos, sin), 1)

    def theirs(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.cat(modeling_llama.apply_rotary_pos_emb(q, k, cos.double(), sin.double()), 1)

    assert_like_formula(mine, theirs, q, k, roundings=2)


def test_a_part_of_each_head_is_rotated(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 3, 5, 16).to(dtype), torch.randn(1, 1, 5, 16).to(dtype)
    cos, sin = (torch.randn(1, 5, 4).to(dtype) for _ in range(2))
    parts = apply_rotary_pos_emb(q[..., :4], k[..., :4], cos, sin)
    for found, given, part in zip(apply_rotary_pos_emb(q, k, cos, sin), (q, k), parts, strict=True):
        assert torch.equal(found, torch.cat((part, given[..., 4:]), -1))
