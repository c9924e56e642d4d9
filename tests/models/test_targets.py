"""Names of parts of a model, of which each has to be that of some part."""

import re
from typing import Any

import peft
import pytest
from tiny import FAMILIES, tiny_model

from llm_adapters import BottleneckConfig, methods
from llm_adapters.models.targets import unmatched

LORA = peft.LoraConfig
NOWHERE = "no module of LlamaForCausalLM that gets an adapter"
BEYOND = "nothing in such a layer gets an adapter"


def found(config: Any, family: str = "llama", **sizes: int) -> str:
    asked = type(config)(**{key: value for key, value in config.to_dict().items() if key not in _NOT_GIVEN})
    return "; ".join(unmatched(peft.get_peft_model(tiny_model(family, **sizes), config), asked))


_NOT_GIVEN = {"peft_type", "auto_mapping", "peft_version"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LORA(target_modules=["q_proj", "query"]), f"target_modules has 'query', which is the name of {NOWHERE}"),
        (LORA(target_modules=["down_proj", "donw_proj"]), "near it are down_proj"),
        (peft.LoKrConfig(target_modules=["q_proj", "layers.7.v_proj"]), "'layers.7.v_proj'"),
        (peft.VeraConfig(target_modules=["q_proj", "o_prj"]), "near it are .*o_proj"),
        (peft.IA3Config(target_modules=["k_proj", "up"], feedforward_modules=["up"]), "feedforward_modules has 'up'"),
        (LORA(target_modules=["q_proj"], modules_to_save=["lm_head", "head2"]), "modules_to_save has 'head2'"),
        (LORA(target_modules=["q_proj"], exclude_modules=["model.layers.0.self_attn.q_proj", "x"]), "has 'x'"),
        (LORA(target_modules=["q_proj"], layers_to_transform=[0, 2]), f"layers_to_transform has 2, and {BEYOND}"),
        (peft.OFTConfig(target_modules=["q_proj"], layers_to_transform=[1, -1]), "layers_to_transform has -1"),
        (LORA(target_modules=["q_proj"], rank_pattern={"k_proj": 2}), f"rank_pattern has 'k_proj', .*{NOWHERE}"),
        (peft.LoHaConfig(target_modules=["q_proj"], alpha_pattern={"q_proj": 2, "v": 1}), "alpha_pattern has 'v'"),
        (BottleneckConfig(modules_to_save=["lm_head"]), ""),
        (LORA(target_modules="all-linear"), ""),
        (LORA(target_modules=r".*\.1\..*q_proj"), ""),
        (LORA(target_modules=["q_proj"], modules_to_save=["head"]), ""),  # PEFT takes any ending there
        (LORA(target_modules=["q_proj"], task_type="SEQ_CLS"), ""),
        (LORA(), ""),
        (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), ""),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_told(config: Any, told: str) -> None:
    assert re.search(told, found(config)) if told else found(config) == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "ia3", "series", "vera"])
def test_what_the_rows_name_is_there(method: str, family: str) -> None:
    assert found(methods.adapter_config(method, tiny_model(family)), family) == ""


@pytest.mark.filterwarnings("ignore")
def test_a_long_list_that_peft_shortens() -> None:
    linears = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{name}" for layer in range(3) for name in linears]
    assert found(peft.LoraConfig(target_modules=names), num_hidden_layers=3) == ""
    told = found(peft.LoraConfig(target_modules=[*names, "model.layers.3.mlp"]), num_hidden_layers=3)
    assert "'model.layers.3.mlp'" in told
