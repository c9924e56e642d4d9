"""The CPU backend: one typed function for each C function in csrc, in the modules that are named after its files.

Each checks shapes, allocates results and workspace, and calls C; `prototypes` checks precision, device and contiguity.
Inputs may be views with gaps, which are copied; what is changed in place (a name that ends in `_`) must be contiguous.
"""

from collections.abc import Callable
from typing import Any

import torch

from llm_adapters.ops.cpu.attention import (
    paged_attention,
    store_kv,
    supports_varlen_attention,
    varlen_attention,
    varlen_attention_backward,
)
from llm_adapters.ops.cpu.elementwise import (
    cross_entropy_,
    dropout,
    dropout_add_,
    masked_softmax_,
    rms_norm,
    rms_norm_backward,
    rotary,
    softmax_backward_,
    supports_rotary,
    swiglu,
    swiglu_backward,
)
from llm_adapters.ops.cpu.gemm import (
    grad_weight,
    has_fast_linear,
    linear,
    linear_lora,
    lora_add_,
    pack_lora,
    supports_linear,
    supports_linear_lora,
)
from llm_adapters.ops.cpu.prototypes import library

__all__ = [
    "cross_entropy_",
    "dropout",
    "dropout_add_",
    "grad_weight",
    "has_fast_linear",
    "linear",
    "linear_lora",
    "lora_add_",
    "masked_softmax_",
    "pack_lora",
    "paged_attention",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "softmax_backward_",
    "store_kv",
    "supports",
    "swiglu",
    "swiglu_backward",
    "unsupported_reason",
    "varlen_attention",
    "varlen_attention_backward",
]

_PREDICATES: dict[str, Callable[..., bool]] = {
    "linear": supports_linear,
    "grad_weight": supports_linear,
    "linear_lora": supports_linear_lora,
    "rotary": supports_rotary,
    "varlen_attention": supports_varlen_attention,
    "paged_attention": lambda query, keys, values: values.shape[-1] == query.shape[-1],
}


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """The reason why there are no functions for this precision on this machine; None where there are."""
    found = library(dtype)
    return found if isinstance(found, str) else None


def supports(name: str, *arguments: Any) -> bool:
    """True if the function `name` takes these arguments, which are those of the operator that asks."""
    predicate = _PREDICATES.get(name)
    return predicate is None or predicate(*arguments)
