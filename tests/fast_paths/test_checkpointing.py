"""Activation checkpointing keeps packs and their shared prefix, and changes neither loss nor gradients."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_path_helpers import OPTIONS, adapted, assert_same, examples, gradients
from peft import get_peft_model
from quantized import quantised, save_wide

from llm_adapters import architectures, methods
from llm_adapters.fast_paths import ON, FastPaths
from llm_adapters.training.collator import Collator


def computed(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of a pack with a shared prefix, and how often its first layer was computed."""
    layer = architectures.decoder_layers(model.get_base_model())[1][0]
    calls: list[int] = []
    with FastPaths(model) as fast:
        assert fast.report["packing"] == fast.report["shared prefix"] == ON
        (micro,) = Collator(0, fast.packs).make_micro_batches(examples())
        assert micro.pack.prefix > 0
        norm = next(m for name, m in layer.named_modules() if "norm" in name or name.startswith("ln"))
        handle = norm.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(5)  # of dropout's masks
        loss = model(**micro.arguments())["loss"]
        found = gradients(model, loss)
        handle.remove()
    return loss.detach(), found, len(calls)


def compare(model: Any) -> None:
    model.train()
    loss, expected, once = computed(model)
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    again, found, twice = computed(model)
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_packs(family: str, method: str) -> None:
    dropout = "lora_dropout" if method == "lora" else "bottleneck_dropout"
    compare(adapted(family, method, **{dropout: 0.2}))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quantization")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", OPTIONS)
def test_packs_on_a_quantised_base(method: str, kind: str, tmp_path: Path) -> None:
    # What int8 rounds by is in float32 more than the trial takes for rounding: packs are off there.
    base = quantised(save_wide(tmp_path / "model"), kind, "float32" if kind == "nf4" else "bfloat16").model
    dropout = "lora_dropout" if method == "lora" else "bottleneck_dropout"
    options = OPTIONS[method] | {dropout: 0.2}
    compare(get_peft_model(base, methods.adapter_config(method, base, **options)))
