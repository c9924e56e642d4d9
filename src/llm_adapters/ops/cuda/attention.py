"""Attention of packs by torch's own variable-length function (flash attention), which has its own backward pass."""

import inspect
from typing import Any

import torch

from llm_adapters.ops.packing import Pack

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()


def supports_packed_attention(query: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
    """True in half precision, for the head sizes of flash attention, and for windows where this torch takes them."""
    if varlen_attn is None or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = query.shape[-1]
    return head_dim == value.shape[-1] and head_dim % 8 == 0 and head_dim <= 256 and "window_size" in _PARAMETERS


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: float, window: int | None
) -> torch.Tensor:
    """See `ops.varlen_attention.varlen_attention`; with a gradient.

    The queries of a segment are the last rows of their keys, the shared prefix and the segment, so that the causal mask
    ends at the diagonal of both.
    """
    num_heads, num_kv_heads = len(query), len(key)
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    index = pack.varlen
    if pack.shares_prefix:
        key, value = (part.index_select(0, index.key_index) for part in (key, value))
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if num_heads != num_kv_heads:
        if "enable_gqa" in _PARAMETERS:
            options["enable_gqa"] = True
        else:
            key, value = (part.repeat_interleave(num_heads // num_kv_heads, 1) for part in (key, value))
    parts = (part.contiguous() for part in (query, key, value))
    return varlen_attn(
        *parts, index.cu_seqlens_q, index.cu_seqlens_k, index.max_seqlen_q, index.max_seqlen_k, **options
    )
