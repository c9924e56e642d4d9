"""Adapters that do nothing."""

from typing import Any

import peft
import pytest
import torch
from tiny import tiny_model

from llm_adapters import methods
from llm_adapters.errors import RequestError
from llm_adapters.models.untrained import check_trained, does_nothing

# Methods that start as the identity, and those that never are it.
STARTS = ["series", "parallel", "lora", "dora", "rslora", "ia3", "vera", "oft", "boft", "loha", "lokr", "hira"]
NEVER = ["prefix", "prompt", "p-tuning", "mam"]


def inserted(method: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny_model("llama", dtype=dtype)
    return peft.get_peft_model(model, methods.adapter_config(method, model, **options)).eval()


def move(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", STARTS)
def test_an_untrained_adapter_does_nothing_and_a_trained_one_does(method: str) -> None:
    model = inserted(method)
    assert does_nothing(model)
    with pytest.raises(RequestError, match=r"the adapter 'mine' does nothing.*--allow-untrained"):
        check_trained(model, "mine")
    move(model)
    check_trained(model, "mine")


@pytest.mark.parametrize("method", NEVER)
def test_tokens_before_the_sequence_always_do_something(method: str) -> None:
    assert not does_nothing(inserted(method, **({"bottleneck_size": 4} if method == "mam" else {})))


@pytest.mark.parametrize("method", ["series", "lora"])
def test_half_precision_is_told_by_the_weights_however_small_they_are(method: str) -> None:
    model = inserted(method, torch.bfloat16)
    assert does_nothing(model)
    for name, parameter in model.named_parameters():
        if ("lora_B" in name or "bottleneck_up" in name) and ".1." in name:
            parameter.data[0, 0] = 1e-30  # of no effect on a bfloat16's logits
    assert not does_nothing(model)


def test_a_factor_of_zero_and_weights_of_zero() -> None:
    model = inserted("lora", lora_alpha=0, init_lora_weights=False)
    assert does_nothing(model)
    model = inserted("series", use_bias=True)
    move(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert does_nothing(model)


def test_a_bare_model_is_no_untrained_adapter() -> None:
    check_trained(tiny_model("llama"), "None")


def test_a_module_trained_beside_an_adapter_counts() -> None:
    model = inserted("lora", modules_to_save=["lm_head"])
    assert does_nothing(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1
    assert not does_nothing(model)
