"""Torch's variable-length attention for tests without a GPU: its signature and contract, nothing read on the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from llm_adapters.ops import backends
from llm_adapters.ops.cuda import attention


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """See torch.nn.attention.varlen. NaN where a length is above its maximum; keys in no segment have NaN gradients, as
    those of the flash functions have any."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k)
    assert window_size[1] == 0, "causal"
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    assert query.shape[1:] == key.shape[1:]
    place_q, segment_q, length_q = _places(cu_seq_q, len(query))
    place_k, segment_k, length_k = _places(cu_seq_k, len(key))
    last = place_q + (length_k - length_q)[segment_q]  # the queries are the last ones of their keys
    seen = (segment_q[:, None] == segment_k) & (place_k <= last[:, None])
    if window_size[0] >= 0:
        seen &= place_k >= last[:, None] - window_size[0]
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    probs = torch.softmax(scores.masked_fill(~seen, -1e30), -1).masked_fill(~seen, 0)
    outside = torch.arange(len(key)) >= cu_seq_k[-1]
    value = value + torch.zeros_like(value).masked_fill(outside[:, None, None], torch.nan).detach()
    out = torch.einsum("hqk,khd->qhd", probs, value.masked_fill(outside[:, None, None], 0))
    too_long = (length_q > max_q).any() | (length_k > max_k).any() | (cu_seq_q[-1] != len(query))
    return out.masked_fill(too_long, torch.nan)


def _places(ends: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The place of each row in its segment, the segment's number, and all segments' lengths."""
    rows = torch.arange(count)
    segment = torch.searchsorted(ends[1:].contiguous(), rows, right=True)
    segment = segment.clamp_max(len(ends) - 2)
    return rows - ends[segment], segment, ends.diff()


@contextmanager
def packed_attention_as_on_cuda() -> Iterator[None]:
    """Have packs attended to by the CUDA backend's function, and all else computed by the references, inside."""
    backend = SimpleNamespace(
        packed_attention=attention.packed_attention,
        supports=lambda name, *arguments: True,
        unsupported_reason=lambda dtype: None,
        has_fast_linear=lambda weight: False,
    )
    with (
        mock.patch.object(attention, "varlen_attn", varlen_attn),
        mock.patch.object(backends, "_module", return_value=backend),
        mock.patch.object(backends, "disabled", False),
    ):
        yield
