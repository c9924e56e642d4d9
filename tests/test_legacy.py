"""Checkpoints of the paper's own code: against its stored outputs, and against its semantics written out with hooks."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

import llm_adapters
from llm_adapters.errors import RequestError, WorkError
from llm_adapters.legacy import convert, load_legacy_adapter

TOLERANCE = 1e-4  # what the project promises
LOCAL = Path(__file__).parent / "data" / "golden"
LOCAL_VARIANTS = ["llama/adapterh", "llama/parallel-learned", "llama/prefix", "bloom/lora-default"]
_COMMON_VARIANTS = [
    "adapterh",
    "adapterp",
    "series-gelu",
    "parallel-attn-default",
    "parallel-learned",
    "parallel-mlp",
    "parallel-scaled",
    "lora-default",
    "lora-recipe",
]
VARIANTS = [f"{family}/{name}" for family in ("llama", "bloom", "gptj") for name in _COMMON_VARIANTS]
VARIANTS += ["llama/prefix", "gptj/prefix"]

# Each family's linear layers as the paper's code names and places them.
BEFORE = {
    "llama": ["gate_proj", "up_proj"],
    "bloom": ["dense_h_to_4h"],
    "gptj": ["fc_in"],
    "gpt_neo": ["c_fc"],
    "opt": ["fc1"],
}
AFTER = {
    "llama": ["down_proj"],
    "bloom": ["dense_4h_to_h"],
    "gptj": ["fc_out"],
    "gpt_neo": ["c_proj"],
    "opt": ["fc2"],
}
ATTENTION = {family: ["q_proj", "v_proj", "k_proj"] for family in BEFORE} | {"bloom": ["query_key_value"]}
ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}
IDS = torch.tensor([[5, 9, 2, 40, 17, 200], [7, 7, 31, 250, 3, 1]])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- a checkpoint as the paper's code writes it, with random weights


def linears(model: Any, names: list[str]) -> dict[str, tuple[Any, int, int]]:
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            conv1d = type(module).__name__ == "Conv1D"
            rows, columns = module.weight.shape
            found[name] = (module, rows, columns) if conv1d else (module, columns, rows)
    assert found
    return found


def write(folder: Path, settings: dict[str, Any], weights: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    common = {"base_model_name_or_path": "some/base", "inference_mode": True, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(common | settings))
    torch.save(weights, folder / "adapter_model.bin")
    return folder


def bottleneck(folder: Path, model: Any, names: list[str], seed: int = 3, **settings: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    size, learned = 5, settings.get("scaling") == "learned"
    weights: dict[str, torch.Tensor] = {}
    for name, (_, taken, given) in linears(model, names).items():
        end = name.rpartition(".")[2]
        read, written = taken, given
        if not settings.get("use_parallel_adapter"):
            read = written = taken if any(end in group for group in BEFORE.values()) else given
        key = f"base_model.model.{name}"
        if learned:
            weights[f"{key}.adapter_scaling"] = torch.rand(1, generator=generator) + 0.5
        weights[f"{key}.adapter_down.weight"] = torch.randn(size, read, generator=generator) * 0.3
        weights[f"{key}.adapter_up.weight"] = torch.randn(written, size, generator=generator) * 0.3
    defaults = {
        "peft_type": "BOTTLENECK",
        "bottleneck_size": size,
        "non_linearity": "tanh",
        "adapter_dropout": 0.1,
        "use_parallel_adapter": False,
        "use_adapterp": False,
        "scaling": 1.0,
        "target_modules": names,
        "init_weights": "bert",
        "bias": "none",
        "modules_to_save": None,
    }
    return write(folder, defaults | settings, weights)


def lora(folder: Path, model: Any, names: list[str], groups: int = 2, seed: int = 3, **settings: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    r, enabled = settings.get("r", 4), settings.get("enable_lora")
    weights = {}
    for name, (_, taken, given) in linears(model, names).items():
        a, b = (r, taken), (given, r)
        if enabled:
            a = (r * sum(enabled), taken)
            b = (given // len(enabled) * sum(enabled), a[0] // groups, 1)
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(*a, generator=generator) * 0.3
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(*b, generator=generator) * 0.3
    defaults = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": names,
        "enable_lora": None,
        "fan_in_fan_out": False,
        "merge_weights": False,
        "bias": "none",
        "modules_to_save": None,
    }
    return write(folder, defaults | settings, weights)


def prefix(folder: Path, model: Any, seed: int = 3, **settings: Any) -> Path:
    config = model.config
    weights = torch.randn(3, 2 * config.num_hidden_layers * config.hidden_size, generator=generator_of(seed)) * 0.5
    defaults = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": 3,
        "token_dim": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": 32,
        "prefix_projection": False,
    }
    return write(folder, defaults | settings, {"prompt_embeddings": weights})


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def edit(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def edit_weights(folder: Path, **changes: Any) -> Path:
    """Change weights by the end of their key in layer 0 of llama's up_proj; None takes one out."""
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    for end, value in changes.items():
        key = f"base_model.model.model.layers.0.mlp.up_proj.{end}.weight"
        weights.pop(key) if value is None else weights.update({key: value})
    torch.save(weights, folder / "adapter_model.bin")
    return folder


# --- the paper's semantics, on the plain model


def reference(model: Any, folder: Path, position: dict[str, str]) -> torch.Tensor:
    """Logits of the plain model with a hook on each adapted linear; `position` is before, after or parallel."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    act, handles = ACTIVATIONS[settings["non_linearity"]], []

    def adapter(name: str) -> Any:
        down, up, scale = (
            weights.get(f"base_model.model.{name}.adapter_{p}") for p in ("down.weight", "up.weight", "scaling")
        )
        return lambda x: (settings["scaling"] if scale is None else scale) * (act(x @ down.T) @ up.T)

    for name, (module, _, _) in linears(model, list(position)).items():
        a = adapter(name)
        match position[name.rpartition(".")[2]]:
            case "before":
                handles.append(module.register_forward_pre_hook(lambda m, args, a=a: (args[0] + a(args[0]),)))
            case "after":
                handles.append(module.register_forward_hook(lambda m, args, out, a=a: out + a(out)))
            case "parallel":
                handles.append(module.register_forward_hook(lambda m, args, out, a=a: out + a(args[0])))
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


def lora_reference(model: Any, folder: Path, names: list[str], groups: int = 2) -> torch.Tensor:
    """Logits of the plain model where each slice that is enabled gets its rows of a grouped 1-d convolution."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    enabled, handles = settings["enable_lora"], []

    def delta(name: str, x: torch.Tensor) -> torch.Tensor:
        a, b = (weights[f"base_model.model.{name}.lora_{p}.weight"] for p in "AB")
        scale = settings["lora_alpha"] / settings["r"]
        if enabled is None:
            return x @ a.T @ b.T * scale
        rows = F.conv1d((x @ a.T).transpose(-2, -1), b, groups=groups).transpose(-2, -1) * scale
        parts = iter(rows.chunk(sum(enabled), dim=-1))
        width = rows.shape[-1] // sum(enabled)
        return torch.cat([next(parts) if on else x.new_zeros(*x.shape[:-1], width) for on in enabled], dim=-1)

    for name, (module, _, _) in linears(model, names).items():
        handles.append(module.register_forward_hook(lambda m, args, out, n=name: out + delta(n, args[0])))
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


def prefix_reference(model: Any, folder: Path) -> torch.Tensor:
    """Logits of the plain model with the virtual tokens' keys and values in its cache."""
    prompt = torch.load(folder / "adapter_model.bin", weights_only=True)["prompt_embeddings"]
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    tokens = prompt.shape[0]
    states = prompt.view(tokens, layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    cache = DynamicCache()
    for layer in range(layers):
        key, value = (states[layer, i].expand(len(IDS), -1, -1, -1) for i in (0, 1))
        cache.update(key, value, layer)
    mask = torch.ones(len(IDS), tokens + IDS.shape[1], dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=IDS, past_key_values=cache, attention_mask=mask).logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def both_ways(family: str, folder: Path, **overrides: Any) -> list[torch.Tensor]:
    """The logits through `load_legacy_adapter` and through `convert` + `PeftModel.from_pretrained`."""
    loaded = load_legacy_adapter(tiny_model(family, **overrides), folder)
    converted = convert(folder, folder.parent / "converted")
    return [logits(loaded), logits(PeftModel.from_pretrained(tiny_model(family, **overrides), converted))]


def check(family: str, folder: Path, expected: torch.Tensor, **overrides: Any) -> None:
    plain = logits(tiny_model(family, **overrides))
    assert (expected - plain).abs().max() > 100 * TOLERANCE, "the adapter does nothing: the test would see nothing"
    for found in both_ways(family, folder, **overrides):
        assert (found - expected).abs().max() < TOLERANCE


# --- what the paper's code computed


def golden_base(root: Path, variant: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(root / Path(variant).parent / "base", dtype=torch.float32).eval()


def golden_difference(model: Any, folder: Path) -> float:
    stored = load_file(folder / "io.safetensors")
    with torch.no_grad():
        found = model(input_ids=stored["input_ids"], attention_mask=stored["attention_mask"]).logits
    return (found - stored["logits"]).abs().max().item()


def check_golden(root: Path, variant: str, tmp_path: Path) -> None:
    folder = root / variant
    base = golden_base(root, variant)
    assert golden_difference(base, folder.parent / "base") < TOLERANCE
    assert golden_difference(base, folder) > 100 * TOLERANCE
    assert golden_difference(load_legacy_adapter(base, folder), folder) < TOLERANCE
    converted = convert(folder, tmp_path / "converted", model=str(folder.parent / "base"))
    assert golden_difference(PeftModel.from_pretrained(golden_base(root, variant), converted), folder) < TOLERANCE


@pytest.mark.shared
@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_outputs_of_every_variant(golden: Path, variant: str, tmp_path: Path) -> None:
    check_golden(golden, variant, tmp_path)


@pytest.mark.parametrize("variant", LOCAL_VARIANTS)
def test_stored_outputs(variant: str, tmp_path: Path) -> None:
    check_golden(LOCAL, variant, tmp_path)


@pytest.mark.shared
def test_every_stored_variant_is_tested(golden: Path) -> None:
    stored = {str(file.parent.relative_to(golden)) for file in golden.glob("*/*/adapter_config.json")}
    assert stored == set(VARIANTS)


# --- bottleneck


@pytest.mark.parametrize("family", list(BEFORE))
@pytest.mark.parametrize("variant", ["adapterh", "adapterp", "parallel-attention", "parallel-mlp"])
def test_bottleneck(family: str, variant: str, tmp_path: Path) -> None:
    before, after = BEFORE[family], AFTER[family]
    position = {
        "adapterh": dict.fromkeys(before, "before") | dict.fromkeys(after, "after"),
        "adapterp": dict.fromkeys(after, "after"),
        "parallel-attention": dict.fromkeys(ATTENTION[family], "parallel"),
        "parallel-mlp": dict.fromkeys(before + after, "parallel"),
    }[variant]
    model = tiny_model(family)
    settings = {"use_parallel_adapter": variant.startswith("parallel"), "use_adapterp": variant == "adapterp"}
    folder = bottleneck(tmp_path / "legacy", model, list(position), **settings)
    check(family, folder, reference(model, folder, position))


@pytest.mark.parametrize(("family", "parallel"), [("llama", False), ("opt", True)])
@pytest.mark.parametrize("scaling", [4.0, 2, "learned"])
def test_scaling(family: str, scaling: float | str, parallel: bool, tmp_path: Path) -> None:
    before, after = BEFORE[family], AFTER[family]
    position = dict.fromkeys(before, "before") | dict.fromkeys(after, "after")
    if parallel:
        position = dict.fromkeys(position, "parallel")
    model = tiny_model(family, seed=1)
    settings = {"scaling": scaling, "use_parallel_adapter": parallel, "non_linearity": "relu"}
    folder = bottleneck(tmp_path / "legacy", model, list(position), **settings)
    expected = reference(model, folder, position)
    loaded = load_legacy_adapter(tiny_model(family, seed=1), folder, "another")
    assert (logits(loaded) - expected).abs().max() < TOLERANCE
    loaded.save_pretrained(tmp_path / "saved", selected_adapters=["another"])
    again = PeftModel.from_pretrained(tiny_model(family, seed=1), tmp_path / "saved" / "another")
    assert (logits(again) - expected).abs().max() < TOLERANCE


def test_settings_are_carried_over(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"], non_linearity="gelu")
    config = load_legacy_adapter(tiny_model("llama"), folder).peft_config["default"]
    assert config.non_linearity == "gelu"
    assert config.bottleneck_dropout == 0.1
    assert config.insertion == {"down_proj": "after"}
    assert config.base_model_name_or_path == "some/base"
    assert config.init_weights == "paper"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["wn_proj", "te_proj"], ["down_proj", "gate_proj"]),  # the paper's code compares the bare end of a name
        ([".down_proj", "mlp.gate_proj"], ["down_proj", "gate_proj"]),
        (r"model\.layers\.[01]\.mlp\.(down|up)_proj", ["down_proj", "up_proj"]),
        (None, ["up_proj"]),
    ],
)
def test_target_modules_as_the_papers_code_reads_them(given: Any, names: list[str], tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = bottleneck(tmp_path / "legacy", model, names, target_modules=given)
    check("llama", folder, reference(model, folder, {n: "after" if n == "down_proj" else "before" for n in names}))


@pytest.mark.parametrize("given", [r".*\.1\.mlp\.up_proj", ["1.mlp.up_proj"]])
@pytest.mark.parametrize("write_checkpoint", [bottleneck, lora])
def test_a_target_in_one_layer_only(given: Any, write_checkpoint: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "legacy", tiny_model("llama"), ["up_proj"], target_modules=given)
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    torch.save({k: v for k, v in weights.items() if ".layers.1." in k}, folder / "adapter_model.bin")
    loaded, again = both_ways("llama", folder)
    assert torch.equal(loaded, again)
    status = load_legacy_adapter(tiny_model("llama"), folder).get_layer_status()
    assert [layer.name for layer in status] == ["model.model.layers.1.mlp.up_proj"]


def test_half_precision_base_keeps_the_adapter_in_fp32(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    loaded = load_legacy_adapter(tiny_model("llama", dtype=torch.bfloat16), folder)
    assert {p.dtype for n, p in loaded.named_parameters() if "bottleneck_" in n} == {torch.float32}
    expected = reference(tiny_model("llama"), folder, {"down_proj": "after"})
    assert (logits(loaded).float() - expected).abs().max() < 0.2


def test_the_adapter_is_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    loaded = load_legacy_adapter(tiny_model("llama").train(), folder)
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


# --- LoRA


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
        ("bloom", ["query_key_value", "dense_4h_to_h", "dense_h_to_4h"]),
        ("gptj", ["q_proj", "k_proj", "v_proj", "fc_in", "fc_out"]),
        ("gpt_neo", ["q_proj", "v_proj"]),
        ("opt", ["q_proj", "v_proj"]),
    ],
)
def test_lora(family: str, names: list[str], tmp_path: Path) -> None:
    model = tiny_model(family)
    folder = lora(tmp_path / "legacy", model, names)
    check(family, folder, lora_reference(model, folder, names))


FUSED = {
    "bloom": ("query_key_value", {"hidden_size": 64}),
    "gpt2": ("c_attn", {}),
    "gpt_neox": ("query_key_value", {"num_attention_heads": 2}),
    "llama": ("q_proj", {"hidden_size": 48}),  # any single target gets enable_lora
}
PATTERNS = [
    ([True, False, True], 2),
    ([True, True, False], 2),
    ([False, True, True], 2),
    ([True, True, True], 2),  # the paper's code has two groups, however many slices are enabled
    ([True, True, True], 3),  # the original of its layer has one group for each
    ([True, False, False], 2),
    ([True, False, False], 1),
    ([False, True], 2),
    ([True, False, True, True], 2),
]


@pytest.mark.parametrize(
    ("family", "enabled", "groups"),
    [(family, *pattern) for family in ("bloom", "gpt2") for pattern in PATTERNS]
    + [(family, *pattern) for family in ("gpt_neox", "llama") for pattern in PATTERNS[:2]],
)
def test_enable_lora(family: str, enabled: list[bool], groups: int, tmp_path: Path) -> None:
    name, overrides = FUSED[family]
    model = tiny_model(family, **overrides)
    settings = {"enable_lora": enabled, "fan_in_fan_out": family == "gpt2"}
    folder = lora(tmp_path / "legacy", model, [name], groups, **settings)
    check(family, folder, lora_reference(model, folder, [name], groups), **overrides)


def test_enable_lora_becomes_ordinary_lora_that_merges(tmp_path: Path) -> None:
    model = tiny_model("bloom")
    folder = lora(tmp_path / "legacy", model, ["query_key_value"], r=4, lora_alpha=6, enable_lora=[True, False, True])
    expected = lora_reference(model, folder, ["query_key_value"])
    loaded = load_legacy_adapter(tiny_model("bloom"), folder)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 12)
    assert (logits(loaded.merge_and_unload()) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_lora_with_trained_biases(bias: str, tmp_path: Path) -> None:
    names = ["q_proj", "v_proj"]
    model = tiny_model("opt")
    folder = lora(tmp_path / "legacy", model, names, bias=bias)
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and (bias == "all" or name.split(".")[-2] in names):
            parameter.data += torch.randn(parameter.shape, generator=generator_of(len(name)))
            weights[f"base_model.model.{name}"] = parameter.data.clone()
    torch.save(weights, folder / "adapter_model.bin")
    check("opt", folder, lora_reference(model, folder, names))


# --- prefix tuning


@pytest.mark.parametrize("family", list(BEFORE))
@pytest.mark.parametrize("projection", [False, True])
def test_prefix(family: str, projection: bool, tmp_path: Path) -> None:
    overrides = {"num_key_value_heads": 4} if family == "llama" else {}
    model = tiny_model(family, **overrides)
    # With a projection the paper's code saves what comes out of it, too.
    folder = prefix(tmp_path / "legacy", model, prefix_projection=projection)
    check(family, folder, prefix_reference(model, folder), **overrides)


# --- convert


def test_convert_writes_a_peft_checkpoint(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["up_proj"], use_parallel_adapter=True)
    out = convert(folder, tmp_path / "deep" / "out")
    assert out == tmp_path / "deep" / "out"
    assert sorted(file.name for file in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "llm_adapters.json",
    ]
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    note = json.loads((out / "llm_adapters.json").read_text())
    assert note == {"template": "paper", "converted_from": str(folder)}
    config = llm_adapters.BottleneckConfig.from_pretrained(out)
    assert config.base_model_name_or_path == "some/base"
    assert config.insertion == {"up_proj": "parallel"}


def test_convert_reads_safetensors_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = bottleneck(tmp_path / "legacy", model, ["down_proj"])
    expected = reference(model, folder, {"down_proj": "after"})
    save_file(torch.load(folder / "adapter_model.bin", weights_only=True), folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    check("llama", folder, expected)


def test_convert_compares_with_a_base_model_and_names_it(tmp_path: Path) -> None:
    base = str(save_tiny(tmp_path / "base", "llama"))
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    out = convert(folder, tmp_path / "out", model=base)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    other = bottleneck(tmp_path / "other", tiny_model("llama", hidden_size=64), ["down_proj"])
    with pytest.raises(RequestError, match=r"down_proj.adapter_down.weight has the shape \(5, 64\), and \(5, 32\)"):
        convert(other, tmp_path / "other-out", model=base)
    assert not (tmp_path / "other-out").exists()


def test_convert_never_overwrites(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in ("out", "file", "legacy"):
        with pytest.raises(RequestError, match=r"is there already and not empty|is a file"):
            convert(folder, tmp_path / target)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]
    (tmp_path / "out" / "precious").unlink()
    convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_convert_leaves_nothing_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])

    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(WorkError, match="No space left"):
        convert(folder, tmp_path / "results" / "out")
    assert list((tmp_path / "results").iterdir()) == []


# --- what is refused, and that nothing has changed then


def snapshot(model: Any) -> tuple[Any, ...]:
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, type(m), m.training, len(m._forward_pre_hooks), *vars(m)) for name, m in model.named_modules()]
    return weights, flags, modules, model.config.to_dict()


def assert_refused(model: Any, folder: Path, message: str, tmp_path: Path, *, by_convert: bool = True) -> None:
    weights, *rest = snapshot(model)
    with pytest.raises(RequestError, match=message):
        load_legacy_adapter(model, folder)
    weights_now, *rest_now = snapshot(model)
    assert rest_now == rest
    assert weights_now.keys() == weights.keys()
    assert all(torch.equal(weights_now[key], weights[key]) for key in weights)
    if by_convert:
        with pytest.raises(RequestError, match=message):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def broken(what: str, folder: Path) -> Path:
    """A checkpoint of llama with one thing wrong that shows without a model."""
    if what == "no folder":
        return folder
    bottleneck(folder, tiny_model("llama"), ["up_proj", "down_proj"])
    weights, config = folder / "adapter_model.bin", folder / "adapter_config.json"
    match what:
        case "no config":
            config.unlink()
        case "config not JSON":
            config.write_text("{")
        case "config a list":
            config.write_text("[]")
        case "no weights":
            weights.unlink()
        case "damaged file":
            weights.write_bytes(weights.read_bytes()[:2000])
        case "empty file":
            weights.write_bytes(b"")
        case "damaged safetensors":
            (folder / "adapter_model.safetensors").write_bytes(b"abc")
        case "no tensors":
            torch.save([1, 2], weights)
        case "no tensor":
            torch.save({"key": 1}, weights)
        case "whole numbers":
            edit_weights(folder, adapter_up=torch.ones(32, 5, dtype=torch.long))
        case "no keys":
            torch.save({}, weights)
        case "missing up":
            edit_weights(folder, adapter_up=None)
        case "missing in one layer":
            edit_weights(folder, adapter_up=None, adapter_down=None)
        case "unexpected":
            edit_weights(folder, other=torch.ones(1))
        case "shape":
            edit_weights(folder, adapter_up=torch.ones(33, 5))
        case "dimension":
            edit_weights(folder, adapter_up=torch.ones(()))
        case "not finite":
            edit_weights(folder, adapter_up=torch.full((32, 5), float("nan")))
        case "base bias":
            edit(folder, bias="all")
            tensors = torch.load(weights, weights_only=True)
            torch.save(tensors | {"base_model.model.model.norm.bias": torch.ones(32)}, weights)
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "there is no adapter folder"),
        ("no config", "has no adapter_config.json"),
        ("config not JSON", "adapter_config.json.* cannot be read"),
        ("config a list", "does not hold a JSON object"),
        ("no weights", "holds no weights"),
        ("damaged file", "adapter_model.bin.* (cannot be read|damaged)"),
        ("empty file", "adapter_model.bin.* (cannot be read|damaged)"),
        ("damaged safetensors", "adapter_model.safetensors.* cannot be read"),
        ("no tensors", "holds a list instead of named tensors"),
        ("no tensor", "something else than a tensor of floating numbers under 'key'"),
        ("whole numbers", "something else than a tensor of floating numbers under '.*up_proj.adapter_up.weight'"),
        ("no keys", "holds no adapter weights"),
        ("missing up", r"lacks 1 weights: base_model.model.model.layers.0.mlp.up_proj.adapter_up.weight"),
        ("missing in one layer", r"lacks 2 weights: base_model.model.model.layers.0.mlp.up_proj.adapter_down.weight"),
        ("unexpected", r"holds 1 weights that have no place: .*up_proj.other.weight"),
        ("shape", r"layers.0.mlp.up_proj.adapter_up.weight has the shape \(33, 5\), and \(32, 5\) is needed"),
        ("dimension", r"layers.0.mlp.up_proj.adapter_up.weight has the shape \(\), and \(32, 5\) is needed"),
        ("not finite", "up_proj.adapter_up.weight holds values that are not finite"),
        ("base bias", "holds biases of the base model .*norm.bias"),
    ],
)
def test_a_broken_checkpoint_is_refused(what: str, message: str, tmp_path: Path) -> None:
    assert_refused(tiny_model("llama"), broken(what, tmp_path / "legacy"), message, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "BOTLENECK"}, "unknown peft_type 'BOTLENECK'.*Did you mean 'BOTTLENECK'"),
        ({"peft_type": None}, "unknown peft_type 'None'"),
        ({"peft_type": ["LORA"]}, "unknown peft_type"),
        ({"auto_mapping": None}, "newer PEFT: load it with PeftModel.from_pretrained"),
        ({"bottleneck_size": "5"}, "bottleneck_size = '5'"),
        ({"bottleneck_size": 0}, "bottleneck_size = 0"),
        ({"bottleneck_size": 6}, r"adapter_down.weight has the shape \(5, 32\), and \(6, 32\)"),
        ({"non_linearity": "tan"}, "unknown non_linearity 'tan'"),
        ({"non_linearity": ["tanh"]}, "non_linearity = "),
        ({"scaling": "learnt"}, "scaling is 'learnt'"),
        ({"scaling": float("nan")}, "scaling = nan"),
        ({"scaling": "learned"}, r"lacks 4 weights: .*adapter_scaling"),
        ({"adapter_dropout": 1.5}, "adapter_dropout = 1.5"),
        ({"target_modules": ["up_proj"]}, r"holds 2 weights that have no place: .*down_proj"),
        ({"target_modules": ["up_proj", "down_proj", "gate_proj"]}, "holds no weights for 'gate_proj'"),
        ({"target_modules": "("}, "is no pattern"),
        ({"target_modules": 3}, "target_modules = 3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["up_proj", "down_proj"])
    assert_refused(tiny_model("llama"), edit(folder, **settings), message, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": 3}, r"lora_A.weight has the shape \(8, 32\), and \(6, 32\) is needed"),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"lora_alpha": "6"}, "lora_alpha = '6'"),
        ({"lora_dropout": 1}, "lora_dropout = 1"),
        ({"enable_lora": [False, False]}, "enable_lora = "),
        ({"enable_lora": [1, 0, 1]}, "enable_lora = "),
        ({"enable_lora": True}, "enable_lora = "),
        ({"enable_lora": None}, r"lora_A.weight has the shape \(8, 32\), and \(4, 32\) is needed"),
    ],
)
def test_a_wrong_lora_setting_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = lora(tmp_path / "legacy", tiny_model("bloom"), ["query_key_value"], enable_lora=[True, False, True])
    assert_refused(tiny_model("bloom"), edit(folder, **settings), message, tmp_path)


def test_slices_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    folder = lora(tmp_path / "legacy", tiny_model("llama"), ["q_proj"], enable_lora=[True, False, True])
    assert_refused(tiny_model("llama"), folder, "3 slices .* do not divide the 32 rows", tmp_path, by_convert=False)


def test_a_series_adapter_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["q_proj"])
    assert_refused(tiny_model("llama"), folder, "series adapter on 'q_proj'; the paper's code knows", tmp_path)


def test_a_family_that_the_papers_code_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("mistral"), ["up_proj"])
    message = "unknown family .*'mistral': choose one of bloom, chatglm, gpt_neo, gptj, llama, opt"
    assert_refused(tiny_model("mistral"), folder, message, tmp_path, by_convert=False)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"hidden_size": 64}, r"down_proj.adapter_down.weight has the shape \(5, 32\), and \(5, 64\)"),
        ("llama", {"num_hidden_layers": 3}, r"lacks 2 weights on LlamaForCausalLM: .*layers.2.mlp.down_proj"),
        ("llama", {"num_hidden_layers": 1}, r"holds 2 weights that have no place on LlamaForCausalLM: .*layers.1"),
        ("gptj", {}, r"holds 4 weights that have no place on GPTJForCausalLM: .*layers.0.mlp.down_proj"),
    ],
)
def test_another_model_is_refused(family: str, overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    assert_refused(tiny_model(family, **overrides), folder, message, tmp_path, by_convert=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 3}, r"prompt_embeddings has the shape \(3, 128\), and \(3, 192\) is needed"),
        ({"num_key_value_heads": 2}, r"prompt_embeddings has the shape \(3, 128\), and \(3, 64\) is needed"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "num_attention_heads is 4, and 8 is needed"),
    ],
)
def test_a_prefix_for_another_model_is_refused(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    folder = prefix(tmp_path / "legacy", model)
    other = tiny_model("llama", **({"num_key_value_heads": 4} | overrides))
    assert_refused(other, folder, message, tmp_path, by_convert=False)


def test_what_the_bottleneck_method_refuses_is_refused_in_time(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("bloom"), ["dense_4h_to_h"])
    bypassing = tiny_model("bloom", slow_but_exact=True, pretraining_tp=2)
    assert_refused(bypassing, folder, "slow_but_exact", tmp_path, by_convert=False)
    edit(folder, non_linearity="prelu")
    assert_refused(tiny_model("bloom"), folder, "non_linearity .prelu. has", tmp_path)


def test_a_prefix_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = prefix(tmp_path / "legacy", tiny_model("gptj"), num_virtual_tokens=4)
    message = r"prompt_embeddings has the shape \(3, 128\), and \(4, 128\) is needed"
    assert_refused(tiny_model("gptj"), folder, message, tmp_path)


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    torch.save(weights | {"x": Evil(tmp_path / "pwned")}, folder / "adapter_model.bin")
    assert_refused(tiny_model("llama"), folder, "holds more than tensors, and was refused", tmp_path)
    assert not (tmp_path / "pwned").exists()
    torch.load(folder / "adapter_model.bin", weights_only=False)  # it would have run
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["", "a.b", "keys", None])
def test_an_adapter_name_that_cannot_be_used_is_refused(name: Any, tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="cannot be used"):
        load_legacy_adapter(model, folder, name)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("name", ["bottleneck", "down", "lora"])
def test_any_other_adapter_name_works(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = bottleneck(tmp_path / "legacy", model, ["down_proj"])
    expected = reference(model, folder, {"down_proj": "after"})
    assert (logits(load_legacy_adapter(tiny_model("llama"), folder, name)) - expected).abs().max() < TOLERANCE


def test_a_model_with_an_adapter_is_refused_and_a_bare_one_again_is_not(tmp_path: Path) -> None:
    folder = bottleneck(tmp_path / "legacy", tiny_model("llama"), ["down_proj"])
    model = load_legacy_adapter(tiny_model("llama"), folder)
    for taken in (model, model.get_base_model()):
        with pytest.raises(RequestError, match="has an adapter already"):
            load_legacy_adapter(taken, folder)
    expected = logits(model)
    assert torch.equal(logits(load_legacy_adapter(model.unload(), folder)), expected)


def test_the_checkpoint_itself_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "legacy"
    shutil.copytree(LOCAL / "bloom" / "lora-default", folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    load_legacy_adapter(golden_base(LOCAL, "bloom/lora-default"), folder)
    convert(folder, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
