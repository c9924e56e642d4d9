"""Tests of `compat/peft.py`: after an upgrade of PEFT, the name of a failing test says what changed."""

import contextlib
import enum
import inspect
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from peft.utils import AuxiliaryTrainingWrapper
from tiny import HIDDEN, WIDTH, tiny_model
from torch import nn

from llm_adapters.compat import peft as compat

IDS = torch.arange(3, 15).reshape(2, 6)


def lora(**options: object) -> nn.Module:
    config = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return get_peft_model(tiny_model("llama"), config).eval()


def lora_layer(**options: object) -> nn.Module:
    return lora(**options).base_model.model.model.layers[0].mlp.down_proj


@pytest.mark.parametrize("member", [f"{c}.{name}" for c, members in compat.MEMBERS.items() for name in members])
def test_member(member: str) -> None:
    owner, name = member.split(".")
    found = inspect.signature(getattr(getattr(tuners_utils, owner), name)).parameters
    assert tuple(found) == compat.MEMBERS[owner][name]


@torch.no_grad()
def test_enable_peft_forward_hooks_is_asked_of_the_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @contextlib.contextmanager
    def hooks(tuner: nn.Module, *args: object, **kwargs: object) -> Iterator[None]:
        seen.append(kwargs.pop("adapter_names"))
        yield

    model = lora()
    monkeypatch.setattr(type(model.base_model), "_enable_peft_forward_hooks", hooks)
    model(input_ids=IDS, adapter_names=["default", compat.NO_ADAPTER])
    assert seen == [["default", compat.NO_ADAPTER]]


@pytest.mark.parametrize(
    "table", [PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING]
)
def test_the_three_tables_are_keyed_by_enumerations(table: dict) -> None:
    assert isinstance(table, dict)
    assert all(isinstance(key, str) and isinstance(key, enum.Enum) for key in table)
    assert {"LORA", "BOTTLENECK", "FUSION"} <= {key.value for key in table}


def test_config_classes() -> None:
    assert compat.config_classes()["LORA"] is LoraConfig


def test_get_in_out_features() -> None:
    assert compat.features(nn.Linear(3, 5)) == (3, 5)
    assert compat.features(nn.LayerNorm(3)) == (None, None)


def test_class_of_a_plain_lora_linear() -> None:
    layer = lora_layer()
    assert type(layer) is Linear
    assert compat.is_plain_lora_linear(layer)
    assert not compat.is_plain_lora_linear(layer.base_layer)


def test_lora_variant_and_lora_bias() -> None:
    assert compat.is_plain_lora_adapter(lora_layer(), "default")
    assert not compat.is_plain_lora_adapter(lora_layer(use_dora=True), "default")
    assert not compat.is_plain_lora_adapter(lora_layer(lora_bias=True), "default")


def test_attributes_of_a_lora_linear() -> None:
    layer = lora_layer(r=4, lora_alpha=8)
    assert layer.lora_A["default"].weight.shape == (4, WIDTH)
    assert layer.lora_B["default"].weight.shape == (HIDDEN, 4)
    assert layer.scaling["default"] == 2.0
    assert isinstance(layer.lora_dropout["default"], nn.Identity | nn.Dropout)
    assert (layer.merged, layer.disable_adapters, list(layer.active_adapters)) == (False, False, ["default"])


def test_active_adapter_and_adapters_of_a_module_copy() -> None:
    model = lora(modules_to_save=["lm_head"])
    (copy,) = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    assert (copy._active_adapter, copy._adapters) == ("default", {"default"})


@torch.no_grad()
def test_rows_are_routed_through_their_own_copies() -> None:
    model = lora(modules_to_save=["lm_head"])
    (copy,) = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    copy.modules_to_save["default"].weight.add_(1.0)
    hidden = torch.randn(2, 3, HIDDEN)
    with compat.routed_module_copies(model, ["default", compat.NO_ADAPTER]):
        mixed = copy(hidden)
    torch.testing.assert_close(mixed[:1], nn.functional.linear(hidden[:1], copy.modules_to_save["default"].weight))
    torch.testing.assert_close(mixed[1:], nn.functional.linear(hidden[1:], copy.original_module.weight))
    assert copy._active_adapter == "default"
    assert not copy._forward_pre_hooks


@torch.no_grad()
def test_no_adapter_is_the_name_for_none() -> None:
    model = lora()
    base = tiny_model("llama")(IDS).logits
    assert (model(IDS).logits - base).abs().max() > 1e-3
    torch.testing.assert_close(model(input_ids=IDS, adapter_names=[compat.NO_ADAPTER] * 2).logits, base)
