"""Private interfaces of transformers."""

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

    from torch import nn

ROTARY_FUNCTION = "apply_rotary_pos_emb"


def attention_implementation(module: "nn.Module") -> str:
    """Name of the attention that a model or one of its attention blocks runs (``"eager"``, ``"sdpa"``, ...)."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"


def modelling_module(model: "nn.Module") -> ModuleType:
    """The module of transformers that defines the model's family."""
    module = inspect.getmodule(type(model))
    assert module is not None
    return module


def attention_is_replaceable(model: "nn.Module") -> bool:
    """True where the family looks its attention up by name, so that a registered one can take its place."""
    return hasattr(modelling_module(model), "ALL_ATTENTION_FUNCTIONS")


def attention_entries(function: Any, eager: bool = False) -> "list[tuple[dict[str, Any], Any]]":
    """Mappings of the process in which an attention is looked up by name, each with the value to put there.

    They are `AttentionInterface.register`'s and `AttentionMaskInterface.register`'s, which take nothing back; the masks
    are SDPA's, or those of eager attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    masks = eager_mask if eager else sdpa_mask
    return [(AttentionInterface._global_mapping, function), (AttentionMaskInterface._global_mapping, masks)]


def sdpa_attention(module: "nn.Module", *tensors: Any, **kwargs: Any) -> Any:
    """Attention as transformers computes it with torch's `scaled_dot_product_attention`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *tensors, **kwargs)


def eager_attention(module: "nn.Module", *tensors: Any, **kwargs: Any) -> Any:
    """Attention as the modelling file of `module` computes it, in plain torch, with all that the family has."""
    return modelling_module(module).eager_attention_forward(module, *tensors, **kwargs)


def rotary_function(model: "nn.Module") -> Any:
    """The family's `apply_rotary_pos_emb(q, k, cos, sin, ...)`; None where it has none with these arguments."""
    function = getattr(modelling_module(model), ROTARY_FUNCTION, None)
    if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    return function


def is_conv1d(module: "nn.Module") -> bool:
    """True for transformers' `Conv1D`, a linear layer whose weight is stored transposed: (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def forget_adapters(model: "nn.Module") -> None:
    """Take back that the model says it has adapters, which transformers notes before it tries to add one."""
    vars(model).pop("_hf_peft_config_loaded", None)


def pin_clock(chat_template: str, now: "datetime") -> None:
    """Make a chat template's `strftime_now` tell one date, in this process, instead of today's."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    _compile_jinja_template(chat_template).globals["strftime_now"] = now.strftime


def recomputes_activations(model: "nn.Module") -> bool:
    """Whether activations of `model` are computed again in the backward pass (activation checkpointing)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
