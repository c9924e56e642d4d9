"""Attention of packs by torch's own variable-length function (flash attention), which has its own backward pass.

It knows no linear biases (ALiBi), but products are sums: a slope beside the entries of a query, and the position beside
those of a key, add slope * position to their product, which differs from slope * distance by what is the same for all
keys of a query, and so changes no softmax. Positions are split into two parts that half precision holds exactly; the
slopes are rounded once, which errs in proportion to the distance, as little as a rounded score does.
"""

import inspect
from typing import Any

import torch
from torch import nn

from llm_adapters.ops.packing import Pack
from llm_adapters.ops.padded_attention import Scores

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()
_UNIT = 8  # head sizes of flash attention are multiples
_SPLIT = 256  # bfloat16 holds the whole numbers up to it, and as many multiples of it


def supports_packed_attention(query: torch.Tensor, value: torch.Tensor, scores: Scores) -> bool:
    """True in half precision, for the head sizes of flash attention, and for windows where this torch takes them."""
    if varlen_attn is None or query.dtype not in (torch.bfloat16, torch.float16) or scores.softcap is not None:
        return False
    head_dim = query.shape[-1]
    largest = 256 if scores.alibi_slopes is None else 256 - _UNIT
    fits = head_dim == value.shape[-1] and head_dim % _UNIT == 0 and head_dim <= largest
    return fits and "window_size" in _PARAMETERS


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scores: Scores
) -> torch.Tensor:
    """See `ops.varlen_attention.varlen_attention`; with a gradient.

    The queries of a segment are the last rows of their keys, the shared prefix and the segment, so that the causal mask
    ends at the diagonal of both.
    """
    num_heads, num_kv_heads, head_dim = len(query), len(key), value.shape[-1]
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    if scores.alibi_slopes is not None:
        query, key, value = _with_alibi(query, key, value, pack, scores.alibi_slopes / scores.scale)
    index = pack.varlen
    if pack.shares_prefix:
        key, value = (part.index_select(0, index.key_index) for part in (key, value))
    window = -1 if scores.window is None else scores.window - 1
    options: dict[str, Any] = {"scale": scores.scale, "window_size": (window, 0)}
    if num_heads != num_kv_heads:
        if "enable_gqa" in _PARAMETERS:
            options["enable_gqa"] = True
        else:
            key, value = (part.repeat_interleave(num_heads // num_kv_heads, 1) for part in (key, value))
    parts = (part.contiguous() for part in (query, key, value))
    out = varlen_attn(*parts, index.cu_seqlens_q, index.cu_seqlens_k, index.max_seqlen_q, index.max_seqlen_k, **options)
    return out[..., :head_dim]


def _with_alibi(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, slopes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, (tokens, heads, head_dim) each, with `_UNIT` entries more.

    Args:
        query: the queries.
        key: the keys, of as many heads.
        value: the values, which get zeros, as all three have one head size.
        pack: the pack, whose positions are below 65,536.
        slopes: (heads,), float32, before the scale.
    """
    of_query = nn.functional.pad(torch.stack((slopes, slopes), -1), (0, _UNIT - 2)).to(query.dtype)
    positions = pack.position_ids[0]
    low = positions % _SPLIT
    of_key = nn.functional.pad(torch.stack((positions - low, low), -1), (0, _UNIT - 2)).to(key.dtype)
    tokens, num_heads, _ = key.shape
    return (
        torch.cat((query, of_query.expand(tokens, -1, -1)), -1),
        torch.cat((key, of_key[:, None].expand(-1, num_heads, -1)), -1),
        nn.functional.pad(value, (0, _UNIT)),
    )
