"""Options of an adapter that no model takes: found within a limit of time and memory, in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_model

from llm_adapters import inspection, methods
from llm_adapters.errors import RequestError
from llm_adapters.models import insertion, load, load_base
from llm_adapters.models.insertion import insert


def refusal(method: str, **options: Any) -> str:
    model = tiny_model("llama")
    with pytest.raises(RequestError) as caught:
        insert(model, methods.adapter_config(method, model, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Each takes exponential time on some name of a module.
ENDLESS = r"(\w*\.?)*#"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"target_modules": ENDLESS}),
        ("lora", {"exclude_modules": ENDLESS}),
        ("lora", {"rank_pattern": {ENDLESS: 4}}),
        ("lora", {"alpha_pattern": {"q_proj": 2, ENDLESS: 4}}),
        ("lora", {"layers_to_transform": [0], "layers_pattern": [ENDLESS]}),
        ("ia3", {"target_modules": ENDLESS, "feedforward_modules": []}),
        ("series", {"target_modules": ENDLESS}),
    ],
)
def test_a_pattern_without_end_is_refused(method: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insertion, "SECONDS", 1.0)
    told = refusal(method, **options)
    assert "takes longer than" in told
    assert ENDLESS in told


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", ["[", "(?P<a>x)(?P<a>y)", "*", "a{2,1}"])
def test_what_is_no_pattern_is_told(option: str, pattern: str) -> None:
    told = refusal("lora", **{option: pattern})
    assert "is not a regular expression" in told
    assert pattern in told


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"target_modules": [None]}),
        ("lora", {"target_modules": ""}),
        ("ia3", {"target_modules": []}),
        ("lora", {"target_modules": {"a": 1}}),
        ("lora", {"rank_pattern": [3]}),
        ("lora", {"alpha_pattern": 5}),
        ("lora", {"bias": "most"}),
        ("lora", {"r": -3}),
        ("lora", {"r": "eight"}),
        ("lora", {"lora_dropout": 7}),
        ("lora", {"layer_replication": [[0, 99]]}),
        ("lora", {"trainable_token_indices": [-(10**9)]}),
        ("lora", {"layers_to_transform": "x"}),
        ("vera", {"r": [1]}),
        ("prefix", {"num_virtual_tokens": -1}),
        ("prompt", {"num_virtual_tokens": "x"}),
        ("p-tuning", {"encoder_hidden_size": -4}),
        ("ia3", {"feedforward_modules": 5}),
        ("series", {"bottleneck_size": [8]}),
        ("parallel", {"scaling": {}}),
    ],
)
def test_whatever_peft_raises_is_about_the_options(method: str, options: Any) -> None:
    refusal(method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 10**10}),
        ("lora", {"rank_pattern": {"q_proj": 10**10}}),
        ("series", {"bottleneck_size": 10**10}),
        ("prompt", {"num_virtual_tokens": 10**11}),
        ("prefix", {"num_virtual_tokens": 10**10}),
    ],
)
def test_an_adapter_beyond_the_memory_is_refused_before_it_is_made(method: str, options: Any) -> None:
    told = refusal(method, **options)
    assert "GB are free" in told
    assert " parameters: they take " in told


def test_an_adapter_from_elsewhere_is_held_to_the_same_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    model = load_base(base, dtype="float32", device="cpu").model
    insert(model, methods.adapter_config("lora", model, r=2)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    good = json.loads(file.read_text())
    monkeypatch.setattr(insertion, "SECONDS", 1.0)
    for change, words in (
        ({"target_modules": ENDLESS}, "takes longer than"),
        ({"r": 10**10}, "GB are free"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(RequestError, match=words):
            load(base, tmp_path / "adapter", device="cpu")


def test_inspection_tells_the_same(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    with pytest.raises(RequestError, match="not a regular expression"):
        inspection.inspect(base, "lora", target_modules="[")
    with pytest.raises(RequestError, match=r"does not fit|refuses"):
        inspection.inspect(base, "lora", r=-1)
    assert inspection.inspect(base, "lora", r=10**6).trainable > 10**7  # nothing is allocated


@pytest.mark.parametrize("layers", [23, 60_000])
def test_a_config_of_another_model_is_refused_before_its_layers_are_made(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("made"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", lambda *a, **k: pytest.fail("made"))
    with pytest.raises(RequestError, match=f"says {layers:,} layers, and its files hold"):
        load_base(base, device="cpu")
    if layers > 10_000:
        with pytest.raises(RequestError, match="at most 10,000 are taken"):
            inspection.inspect(base)


@pytest.mark.parametrize("layers", [0, -2])
def test_a_config_without_layers_is_refused(layers: int, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(RequestError, match="at least 1 is needed"):
        load_base(base, device="cpu")


def test_a_device_that_computes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="device 'meta' cannot be used"):
        load_base(save_tiny(tmp_path / "base", "llama"), device="meta")
