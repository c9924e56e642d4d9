"""Tiny models with quantised weights, and the same with those weights restored."""

from pathlib import Path
from typing import Any

import torch
from tiny import save_tiny, tiny_tokenizer

from llm_adapters.models import LoadedModel, Quantization, load_base

# bitsandbytes quantises blocks of 64 weights.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


def save_wide(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """Write a tiny model whose layers are wide enough to be quantised."""
    return save_tiny(folder, family, **(WIDE | overrides))


def quantised(folder: Path, kind: str, dtype: str = "float32") -> LoadedModel:
    """The model in `folder` with quantised weights."""
    return load_base(folder, dtype=dtype, device="cpu", quantization=Quantization(kind))


def restored(folder: Path, kind: str) -> Any:
    """The model in `folder` in float32, its linear layers with the weights that quantisation leaves."""
    import bitsandbytes

    model = load_base(folder, dtype="float32", device="cpu").model
    modules = dict(quantised(folder, kind).model.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            other = modules[name]
            if isinstance(other, bitsandbytes.nn.Linear4bit):
                module.weight.copy_(
                    bitsandbytes.functional.dequantize_4bit(other.weight.data, other.weight.quant_state)
                )
            elif isinstance(other, bitsandbytes.nn.Linear8bitLt):
                module.weight.copy_(other.weight.data.float() * other.weight.SCB.float().view(-1, 1) / 127)
    return model


def ids(text: str = "Tom has 12 apples and buys 7 more. How many apples does Tom have now?") -> torch.Tensor:
    """A row of token ids."""
    return torch.tensor([tiny_tokenizer()(text)["input_ids"]])
