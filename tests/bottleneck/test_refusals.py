"""What is asked for wrongly is refused in a sentence, and nothing in the model has changed."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import adapted, assert_unchanged, config_of, fresh, ids, plain, snapshot, with_adapters
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from llm_adapters import BottleneckConfig
from llm_adapters.bottleneck import BottleneckLayer
from llm_adapters.bottleneck.model import _pending
from llm_adapters.errors import RequestError

IDS = ids(4)


def refused(match: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the `RequestError` that the call must raise: one or two sentences on one line."""
    with pytest.raises(RequestError, match=match) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 420
    return message


# --- values of the configuration

BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"insertion": "serial"}, "unknown insertion 'serial': choose one of series, after, before, parallel"),
    ({"insertion": None}, "unknown insertion 'None'"),
    ({"insertion": {}}, "insertion is an empty mapping"),
    ({"insertion": {"up_proj": "beside"}}, "unknown insertion 'beside'"),
    ({"insertion": {3: "before"}}, "insertion is .*a list of names"),
    ({"insertion": {"up_proj": "before"}, "target_modules": ["down_proj"]}, "leave target_modules out"),
    ({"insertion": "before"}, "insertion 'before' is for a linear layer"),
    ({"insertion": "after"}, "insertion 'after' is for a linear layer"),
    ({"placement": "ffn"}, "unknown placement 'ffn': choose one of attention, mlp"),
    ({"placement": ["mlp", "attn"]}, "unknown placement 'attn'"),
    ({"placement": []}, "placement is empty"),
    ({"placement": None}, "placement is None"),
    ({"placement": 3}, "placement is 3"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"target_modules": ""}, "target_modules is empty"),
    ({"target_modules": 3}, "target_modules is 3"),
    ({"target_modules": ["up_proj", None]}, "target_modules is .*None"),
    ({"target_modules": "(up_proj"}, r"target_modules is '\(up_proj', which is no regular expression"),
    ({"layers": []}, "layers is empty"),
    ({"layers": 1}, "layers is 1"),
    ({"layers": "01"}, "layers is '01'"),
    ({"layers": [0, "1"]}, "layers has '1'"),
    ({"layers": [True]}, "layers has True"),
    ({"layers": [0.5]}, r"layers has 0\.5"),
    ({"prefix_length": -1}, "prefix_length is -1: a whole number of at least 0"),
    ({"prefix_length": True}, "prefix_length is True"),
    ({"prefix_length": 2.5}, r"prefix_length is 2\.5"),
    ({"bottleneck_size": 0}, "bottleneck_size is 0: a whole number of at least 1 is allowed"),
    ({"bottleneck_size": -4}, "bottleneck_size is -4"),
    ({"bottleneck_size": 2.5}, r"bottleneck_size is 2\.5"),
    ({"bottleneck_size": "64"}, "bottleneck_size is '64'"),
    ({"bottleneck_size": True}, "bottleneck_size is True"),
    ({"non_linearity": "tahn"}, "unknown non_linearity 'tahn'.*Did you mean 'tanh'"),
    ({"non_linearity": None}, "unknown non_linearity 'None'"),
    ({"non_linearity": "prelu"}, "'prelu' has weights of its own"),
    ({"non_linearity": "xielu"}, "'xielu' has weights of its own"),
    ({"scaling": "learnt"}, "scaling is 'learnt': a finite number other than 0, or 'learned', is allowed"),
    ({"scaling": "2.0"}, "scaling is '2.0'"),
    ({"scaling": None}, "scaling is None"),
    ({"scaling": True}, "scaling is True"),
    ({"scaling": 0}, "scaling is 0"),
    ({"scaling": float("nan")}, "scaling is nan"),
    ({"scaling": float("inf")}, "scaling is inf"),
    ({"bottleneck_dropout": 1}, "bottleneck_dropout is 1"),
    ({"bottleneck_dropout": -0.1}, r"bottleneck_dropout is -0\.1"),
    ({"bottleneck_dropout": "0.1"}, r"bottleneck_dropout is '0\.1'"),
    ({"bottleneck_dropout": None}, "bottleneck_dropout is None"),
    ({"use_bias": "no"}, "use_bias is 'no'"),
    ({"init_weights": "xavier"}, "unknown init_weights 'xavier': choose one of False, True, identity, paper"),
    ({"init_weights": 0}, "unknown init_weights '0'"),
    ({"modules_to_save": [3]}, r"modules_to_save is \[3\]"),
]


@pytest.mark.parametrize(
    ("values", "message"), BAD_VALUES, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_values(values: dict[str, Any], message: str) -> None:
    refused(message, BottleneckConfig, **values)


def test_every_field_of_ours_is_covered() -> None:
    fields = (
        BottleneckConfig.__dataclass_fields__.keys()
        - super(BottleneckConfig, BottleneckConfig).__dataclass_fields__.keys()
    )
    assert fields == {field for values, _ in BAD_VALUES for field in values}


# --- targets

BAD_TARGETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing matches": (
        "llama",
        {"target_modules": ["upproj"]},
        "no module of LlamaForCausalLM matches the target upproj; its linear layers end in .*up_proj",
    ),
    "one of two matches nothing": ("llama", {"target_modules": ["up_proj", "c_fc"]}, "matches the target c_fc;"),
    "a mapping matches nothing": ("gpt2", {"insertion": {"fc_in": "before"}}, "matches the target fc_in"),
    "an expression matches nothing": ("llama", {"target_modules": "up_proj"}, "matches the target 'up_proj'"),
    "nothing in these layers": (
        "llama",
        {"target_modules": ["model.layers.0.mlp"], "layers": [1]},
        r"matches the target model\.layers\.0\.mlp",
    ),
    "inside each other": (
        "llama",
        {"target_modules": ["mlp", "up_proj"]},
        r"target model\.layers\.0\.mlp\.up_proj is inside target model\.layers\.0\.mlp:",
    ),
    "an expression for everything": (
        "llama",
        {"target_modules": ".*"},
        "an adapter goes on a linear layer|is inside",
    ),
    "an embedding": ("llama", {"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding"),
    "a list of layers": ("llama", {"target_modules": ["layers"]}, "layers is a ModuleList"),
    "a norm": ("llama", {"target_modules": ["input_layernorm"]}, "input_layernorm is a LlamaRMSNorm"),
    "an activation": ("llama", {"target_modules": ["act_fn"]}, "act_fn is a SiLU"),
    "a layer too many": ("llama", {"layers": [0, 2]}, "layer 2 does not exist: the model has 2 layers, 0 to 1"),
    "a layer too few": ("bloom", {"layers": [-3]}, "layer -3 does not exist"),
    "a layer too many for targets": ("opt", {"layers": [7], "target_modules": ["fc1"]}, "layer 7 does not exist"),
    "modules_to_save: unknown": ("llama", {"modules_to_save": ["lm_haed"]}, "modules_to_save has 'lm_haed'"),
    "modules_to_save: inside": ("llama", {"modules_to_save": ["up_proj"]}, r"matches model\.layers\.0\.mlp\.up_proj"),
    "modules_to_save: around": (
        "llama",
        {"modules_to_save": ["layers.0"]},
        r"matches model\.layers\.0, but .* gets an adapter",
    ),
    "modules_to_save: the same": ("opt", {"modules_to_save": ["fc2"]}, "fc2 gets an adapter"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_targets(case: str) -> None:
    family, options, message = BAD_TARGETS[case]
    base = fresh(family)
    before = snapshot(base)
    refused(message, get_peft_model, base, BottleneckConfig(**options))
    assert_unchanged(base, before)

    refused(message, base.add_adapter, BottleneckConfig(**options), "first")  # transformers' own
    assert_unchanged(base, before)
    assert not hasattr(base, "peft_config")
    base.add_adapter(config_of("series", family, placement="attention"), "first")  # and the next is not spoiled
    before = snapshot(base)
    refused(message, base.add_adapter, BottleneckConfig(**options), "second")
    assert_unchanged(base, before)
    assert list(base.peft_config) == ["first"]

    model = adapted(family, "series", placement="attention")
    expected = model(IDS).logits
    before = snapshot(model)
    refused(message, model.add_adapter, "second", BottleneckConfig(**options))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IDS).logits, expected)


def test_inside_another_adapter() -> None:
    model = adapted("llama", "series")
    before = snapshot(model)
    inside = "the inside of model.layers.0.mlp and its like belongs to another adapter of this model"
    refused(inside, model.add_adapter, "second", config_of("linears", "llama"))
    assert_unchanged(model, before)
    names = refused(inside, model.add_adapter, "second", BottleneckConfig(target_modules=["fc1"]))
    assert "end in down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj (" in names


def test_around_another_adapter() -> None:
    model = adapted("llama", "linears")
    before = snapshot(model)
    refused(
        "mlp holds up_proj, which another adapter of this model wraps",
        model.add_adapter,
        "second",
        config_of("series", "llama"),
    )
    assert_unchanged(model, before)


def test_a_model_that_bypasses_its_projections() -> None:
    base = tiny_model("bloom", slow_but_exact=True, pretraining_tp=2)
    before = snapshot(base)
    refused("slow_but_exact", get_peft_model, base, config_of("series", "bloom"))
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.b", "has a dot"),
        ("", "is empty"),
        ("mlp", "also that of a part of the model"),
        ("weight", "also that of a part of the model"),
        ("0", "also that of a part of the model"),
        ("__base__", "also that of a part of the model"),
    ],
)
def test_names_that_peft_would_confuse(name: str, message: str) -> None:
    base = fresh("llama")
    before = snapshot(base)
    refused(message, get_peft_model, base, config_of("series", "llama"), adapter_name=name)
    assert_unchanged(base, before)
    model = adapted("llama", "series")
    before = snapshot(model)
    refused(message, model.add_adapter, name, config_of("parallel", "llama"))
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["neck", "bottleneck", "down", "e", "bottleneck_down", "sp ace-1"])
def test_odd_names_save_and_load(name: str, tmp_path: Path) -> None:
    model = get_peft_model(fresh("llama"), config_of("both-learned", "llama"), adapter_name=name)
    model.add_adapter("other", config_of("both-learned", "llama"))
    for parameter in (p for n, p in model.named_parameters() if "bottleneck_" in n):
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    folder = tmp_path / name
    loaded = PeftModel.from_pretrained(fresh("llama"), folder, adapter_name=name)
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    plain_model = fresh("llama")
    plain_model.load_adapter(folder, adapter_name=name)
    assert torch.equal(plain_model(IDS).logits, loaded(IDS).logits)


def test_a_name_that_is_taken() -> None:
    model = adapted("llama", "series")
    before = snapshot(model)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", config_of("parallel", "llama"))
    assert_unchanged(model, before)


def test_a_failure_halfway_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    update = BottleneckLayer.update_layer
    calls = []

    def fail_at_the_second(self: Any, *args: Any) -> None:
        update(self, *args)
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory left")

    for start in (None, "parallel", "both-learned"):
        for family in ("opt", "llama"):
            model = fresh(family) if start is None else adapted(family, start, modules_to_save=["lm_head"])
            config = config_of("parallel", family, placement=["attention", "mlp"], modules_to_save=["lm_head"])
            before = snapshot(model)
            calls.clear()
            add = partial(get_peft_model, model, config) if start is None else partial(model.add_adapter, "two", config)
            with monkeypatch.context() as patch:
                patch.setattr(BottleneckLayer, "update_layer", fail_at_the_second)
                with pytest.raises(MemoryError):
                    add()
            assert_unchanged(model, before)


def test_long_target_lists_are_saved_as_given(tmp_path: Path) -> None:
    """PEFT shortens lists of twenty names and more, and then they would no longer match the insertion."""
    base = tiny_model("llama", num_hidden_layers=4)
    names = [f"model.layers.{i}.{p}" for i in range(4) for p in ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")] + [
        f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qkv"
    ]
    insertion = dict.fromkeys(names, "parallel") | {names[0]: "before"}
    model = get_peft_model(copy.deepcopy(base), BottleneckConfig(insertion=insertion, bottleneck_size=3))
    assert model.peft_config["default"].target_modules == sorted(names)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.peft_config["default"].insertion == insertion
    assert get_peft_model_state_dict(loaded).keys() == get_peft_model_state_dict(model).keys()


def test_a_state_dict_that_names_other_modules() -> None:
    from peft import inject_adapter_in_model

    base = fresh("llama")
    before = snapshot(base)
    keys = {"model.layers.0.self_attn.bottleneck_down.weight": torch.zeros(6, 32)}
    refused(
        "has an adapter at model.layers.0.self_attn",
        inject_adapter_in_model,
        config_of("series", "llama"),
        base,
        state_dict=keys,
    )
    assert_unchanged(base, before)


# --- names at run time


def test_unknown_adapters() -> None:
    model = with_adapters("llama", {"one": "series", "two": "parallel"})
    before = snapshot(model)
    refused("no adapter 'three': the model has one, two", model.base_model.set_adapter, "three")
    refused("no adapter 'three'", model.base_model.set_adapter, ["one", "three"])
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="three"):  # PEFT's own
            call("three")
    assert model.active_adapters == ["one"]
    assert_unchanged(model, before)


BAD_NAMES: list[tuple[Any, str]] = [
    (["one", "three", "two", "one"], "adapter_names has 'three': the model has one, two, and __base__ for none"),
    (["one", "two"], "adapter_names has 2 names for a batch of 4 sequences"),
    (["one"] * 5, "adapter_names has 5 names for a batch of 4 sequences"),
    ([], "adapter_names has 0 names for a batch of 4"),
    ("one", "adapter_names is 'one': give a list"),
    ([1, 2, 3, 4], r"adapter_names is \[1, 2, 3, 4\]"),
]


@pytest.mark.parametrize(("names", "message"), BAD_NAMES, ids=str)
@pytest.mark.parametrize("family", ["llama", "mpt"])
@torch.no_grad()
def test_adapter_names(family: str, names: Any, message: str) -> None:
    model = with_adapters(family, {"one": "series", "two": "parallel"})
    expected = model(IDS).logits
    before = snapshot(model)
    calls: list[Callable[[], Any]] = [
        lambda: model(IDS, adapter_names=names),
        lambda: model(input_ids=IDS, adapter_names=names),
        lambda: model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=2),
        lambda: model.generate(IDS, adapter_names=names, max_new_tokens=2),
    ]
    if family != "mpt":  # which takes no embeddings
        embeddings = model.get_input_embeddings()(IDS)
        calls.append(lambda: model(inputs_embeds=embeddings, adapter_names=names))
        calls.append(lambda: model.generate(inputs_embeds=embeddings, adapter_names=names, max_new_tokens=2))
    for call in calls:
        refused(message, call)
        assert_unchanged(model, before)
        assert all(m.routing is None for m in model.modules() if isinstance(m, BottleneckLayer))
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_adapter_names_while_training(family: str) -> None:
    model = with_adapters(family, {"one": "series"}).train()
    before = snapshot(model)
    refused(r"call model\.eval\(\) first", model, IDS, adapter_names=["one"] * 4)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "mpt"])
@torch.no_grad()
def test_an_error_in_the_middle_of_forward_leaves_no_hook_and_no_routing(family: str) -> None:
    model = with_adapters(family, {"one": "parallel", "two": "series"})
    expected = model(IDS).logits
    before = snapshot(model)
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer))

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = layer.base_layer.register_forward_pre_hook(fail)
    for options in ({}, {"adapter_names": ["one", "two", "__base__", "one"]}):
        with pytest.raises(RuntimeError, match="in the middle"):
            model(IDS, **options)
    handle.remove()
    assert_unchanged(model, before)
    assert all(m.routing is None for m in model.modules() if isinstance(m, BottleneckLayer))
    copy.deepcopy(model)  # no tensor of a graph is left behind
    assert torch.equal(model(IDS).logits, expected)


# --- checkpoints


def damage(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = sorted(tensors)[0]
    if kind == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != first}
    if kind == "extra":
        return tensors | {first.replace("layers.0", "layers.9").replace("h.0", "h.9"): tensors[first].clone()}
    return {key: tensor[:3].contiguous() if "down.weight" in key else tensor for key, tensor in tensors.items()}


DAMAGES = {
    "missing": r"the checkpoint lacks 1 of \d+ tensors, first ",
    "extra": "the checkpoint has 1 tensors? too many, first ",
    "width": r"has shape \(3, 32\) instead of \(6, 32\)",
}


@pytest.mark.parametrize("damaged", DAMAGES)
@pytest.mark.parametrize("method", ["series", "parallel", "both-learned", "linears"])
@pytest.mark.parametrize("family", ["llama", "bloom", "opt"])
def test_checkpoints(family: str, method: str, damaged: str, tmp_path: Path) -> None:
    own = adapted(family, method)
    own.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(damage(damaged, load_file(file)), file)
    message = DAMAGES[damaged]

    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}):
        base = fresh(family)
        before = snapshot(base)
        refused(message, PeftModel.from_pretrained, base, tmp_path, **options)
        assert_unchanged(base, before)

    model = adapted(family, method)
    expected = model(IDS).logits
    before = snapshot(model)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        refused(message, model.load_adapter, tmp_path, "second", **options)
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]
    # into the adapter that is there
    refused(message, model.load_adapter, tmp_path, "default")
    assert_unchanged(model, before)
    refused(message, set_peft_model_state_dict, model, damage(damaged, get_peft_model_state_dict(own)))
    assert_unchanged(model, before)
    assert torch.equal(model(IDS).logits, expected)


def test_a_trained_adapter_survives_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    own = adapted("llama", "series")
    own.save_pretrained(tmp_path)
    config = BottleneckConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(fresh("llama"), config).train()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    before = snapshot(model)
    refused(DAMAGES["missing"], set_peft_model_state_dict, model, damage("missing", get_peft_model_state_dict(own)))
    assert_unchanged(model, before)


@pytest.mark.parametrize("other", ["size", "bias", "scaling", "layers", "placement", "family"])
def test_checkpoints_of_another_configuration(other: str, tmp_path: Path) -> None:
    """The weights of one configuration beside the config file of another."""
    options: dict[str, dict[str, Any]] = {
        "size": {"bottleneck_size": 5},
        "bias": {"use_bias": True},
        "scaling": {"scaling": "learned"},
        "layers": {"layers": [0]},
        "placement": {"placement": "attention"},
        "family": {},
    }
    family = "gptj" if other == "family" else "llama"
    adapted(family, "series", **options[other]).save_pretrained(tmp_path)
    base = fresh("llama")
    before = snapshot(base)
    if other != "family":
        config_of("series", "llama", inference_mode=True).save_pretrained(tmp_path)
    refused("the checkpoint", PeftModel.from_pretrained, base, tmp_path)
    assert_unchanged(base, before)


def test_modules_to_save_after_a_failed_load(tmp_path: Path) -> None:
    own = adapted("llama", "series", modules_to_save=["lm_head"])
    own.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, file)
    base = fresh("llama")
    before = snapshot(base)
    refused("lacks 2 of 4", PeftModel.from_pretrained, base, tmp_path)
    assert_unchanged(base, before)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == (
        plain("llama").lm_head.weight is plain("llama").model.embed_tokens.weight
    )
    model = adapted("llama", "parallel")
    before = snapshot(model)
    refused("lacks 2 of 4", model.load_adapter, tmp_path, "second")
    assert_unchanged(model, before)


def test_nothing_waits_once_the_weights_have_arrived_or_the_model_has_run(tmp_path: Path) -> None:
    """What is kept to take an adapter out again is dropped in time: a later misfit must not remove a good adapter."""
    own = adapted("llama", "series")
    own.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path)
    assert not _pending.get(loaded.get_base_model())
    config = BottleneckConfig.from_pretrained(tmp_path)
    model = get_peft_model(fresh("llama"), config)
    assert _pending[model.get_base_model()].keys() == {"default"}
    model(IDS)
    assert model.get_base_model() not in _pending
    assert vars(config).keys() == vars(BottleneckConfig(**config.to_dict())).keys()  # and no closure on the config
