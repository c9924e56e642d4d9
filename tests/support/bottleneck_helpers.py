"""Helpers of the tests of the bottleneck method: its variants, and adapted tiny models."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny import VOCAB, tiny_model
from torch import nn
from torch.nn import functional

from llm_adapters import BottleneckConfig

SIZE = 6
VARIED = ("llama", "bloom", "gptj", "gpt2", "opt", "falcon", "gemma2", "mixtral")  # one of each kind of layer

# The projections of the paper's code: before on the way in, after on the way out, parallel on one of attention.
_LLAMA_LINEARS = ("mlp.up_proj", "mlp.down_proj", "self_attn.v_proj")
_LINEARS = {
    "bloom": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.query_key_value"),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.query_key_value"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.query_key_value"),
    "gptj": ("mlp.fc_in", "mlp.fc_out", "attn.v_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj", "attn.c_attn"),
    "gpt_neo": ("mlp.c_fc", "mlp.c_proj", "attention.v_proj"),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj", "self_attn.v_proj"),
    "mpt": ("ffn.up_proj", "ffn.down_proj", "attn.Wqkv"),
    "opt": ("fc1", "fc2", "self_attn.v_proj"),
    "phi": ("mlp.fc1", "mlp.fc2", "self_attn.v_proj"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.qkv_proj"),
    "glm": ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.v_proj"),
    "glm4": ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.v_proj"),
    # the experts are no linears
    "mixtral": ("self_attn.q_proj", "self_attn.o_proj", "self_attn.v_proj"),
    "qwen3_moe": ("self_attn.q_proj", "self_attn.o_proj", "self_attn.v_proj"),
    "olmoe": ("self_attn.q_proj", "self_attn.o_proj", "self_attn.v_proj"),
}
METHODS = ("series", "parallel", "both-learned", "linears")


def config_of(method: str, family: str, **more: Any) -> BottleneckConfig:
    """The four variants that the matrix runs through."""
    options: dict[str, Any] = {
        "series": {"insertion": "series"},
        "parallel": {"insertion": "parallel", "scaling": 2.0},
        "both-learned": {"placement": ["attention", "mlp"], "scaling": "learned", "use_bias": True},
        "linears": {
            "insertion": dict(zip(_LINEARS.get(family, _LLAMA_LINEARS), ("before", "after", "parallel"), strict=True)),
            "non_linearity": "relu",
        },
    }[method]
    return BottleneckConfig(**({"bottleneck_size": SIZE, "task_type": "CAUSAL_LM"} | options | more))


@cache
def plain(family: str) -> Any:
    """The base model, shared: never change it."""
    return tiny_model(family)


def fresh(family: str) -> Any:
    """A copy of the base model."""
    return copy.deepcopy(plain(family))


def perturb(model: nn.Module, adapter: str = "default") -> None:
    """Move every parameter of an adapter away from its start."""
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name and f".{adapter}" in name.partition("bottleneck_")[2]:
            nn.init.normal_(parameter, std=0.3)


def adapted(family: str, method: str, **more: Any) -> PeftModel:
    """A copy of the base model with a perturbed adapter called ``default``."""
    model = get_peft_model(fresh(family), config_of(method, family, **more))
    perturb(model)
    return model.eval()


def with_adapters(family: str, methods: dict[str, str]) -> PeftModel:
    """A copy of the base model with a perturbed adapter for each name; the first one is active."""
    model: Any = None
    for name, method in methods.items():
        if model is None:
            model = get_peft_model(fresh(family), config_of(method, family), adapter_name=name)
        else:
            model.add_adapter(name, config_of(method, family))
        perturb(model, name)
    return model.eval()


def ids(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones: (batch, length)."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must not change when something is refused: tensors, classes, what is trained, and hooks."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "trained": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
        "hooks": {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()},
        "adapters": sorted(getattr(model, "peft_config", {})),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for part in ("classes", "trained", "hooks", "adapters"):
        assert after[part] == before[part], part
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name


LLAMA_LIKE = ("model.layers", "self_attn", "mlp")
GPT_LIKE = ("transformer.h", "attn", "mlp")
BLOCKS = {
    "bloom": ("transformer.h", "self_attention", "mlp"),
    "falcon": ("transformer.h", "self_attention", "mlp"),
    "gptj": GPT_LIKE,
    "gpt2": GPT_LIKE,
    "gpt_neo": GPT_LIKE,
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "mpt": ("transformer.blocks", "attn", "ffn"),
    "opt": ("model.decoder.layers", "self_attn", ("fc1", "fc2")),
}
RESIDUAL_INSIDE = {("bloom", "attention"), ("bloom", "mlp"), ("mpt", "mlp")}

Delta = Callable[[torch.Tensor], torch.Tensor]

OUTPUT_INSIDE = {
    ("bloom", "attention"): ".dense",
    ("bloom", "mlp"): ".dense_4h_to_h",
    ("mpt", "mlp"): ".down_proj",
}


def delta_of(
    model: PeftModel, module: str, activation: Delta = torch.tanh, scale: float = 1.0, name: str = "default"
) -> Delta:
    """The formula of the paper with the weights that `model` has at `module`."""
    state = model.state_dict()

    def get(what: str) -> torch.Tensor | None:
        return state.get(f"base_model.model.{module}.bottleneck_{what}")

    down, up = get(f"down.{name}.weight"), get(f"up.{name}.weight")
    learned = get(f"scale.{name}")
    factor = scale if learned is None else learned.item()

    def delta(h: torch.Tensor) -> torch.Tensor:
        narrow = activation(functional.linear(h, down, get(f"down.{name}.bias")))
        return factor * functional.linear(narrow, up, get(f"up.{name}.bias"))

    assert down is not None, f"no adapter at {module}"
    return delta
