"""The CUDA backend's functions, by the names that `ops.backends` asks for."""

from collections.abc import Callable
from typing import Any

import torch

from llm_adapters.ops.cuda.attention import packed_attention, supports_packed_attention
from llm_adapters.ops.cuda.elementwise import (
    cross_entropy_,
    dropout,
    dropout_add_,
    rms_norm,
    rms_norm_backward,
    rotary,
    supports_rms_norm,
    supports_rotary,
    swiglu,
    swiglu_backward,
)
from llm_adapters.ops.cuda.lora import (
    grad_weight,
    linear_lora,
    lora_weights,
    supports_grad_weight,
    supports_linear_lora,
)

__all__ = [
    "cross_entropy_",
    "dropout",
    "dropout_add_",
    "grad_weight",
    "has_fast_linear",
    "linear_lora",
    "lora_weights",
    "packed_attention",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "supports",
    "swiglu",
    "swiglu_backward",
    "unsupported_reason",
]

_PREDICATES: dict[str, Callable[..., bool]] = {
    "grad_weight": supports_grad_weight,
    "linear_lora": supports_linear_lora,
    "packed_attention": supports_packed_attention,
    "rms_norm": supports_rms_norm,
    "rotary": supports_rotary,
}


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """The reason why there are no functions for this precision; None where there are."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"there are none for {str(dtype).removeprefix('torch.')}"
    return None


def supports(name: str, *arguments: Any) -> bool:
    """True if the function `name` takes these arguments, which are those of the operator that asks."""
    predicate = _PREDICATES.get(name)
    return predicate is None or predicate(*arguments)


def has_fast_linear(weight: torch.Tensor) -> bool:
    """False: nothing is faster than torch's own product here."""
    return False
