"""Whole runs on a base in 4 or 8 bits, and with optimisers whose states are."""

import importlib.util
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import save_wide
from safetensors.torch import load_file

from llm_adapters import evaluation, models
from llm_adapters.errors import RequestError
from llm_adapters.training import Interrupted, train
from llm_adapters.training.trainer import Recorder

with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quantization"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("models") / "llama")


def recipe(model: Path, kind: str | None = None, method: str = "lora", **training: Any) -> dict[str, Any]:
    options = {"r": 8} if method == "lora" else {} if method == "fusion" else {"bottleneck_size": 8}
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu", "quantization": kind},
        "adapter": {"method": method, "options": options},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 36, "validation": 4, "max_length": 256},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1} | training,
    }


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


@with_bitsandbytes
@pytest.mark.parametrize(("kind", "method"), [("nf4", "lora"), ("int8", "parallel"), ("nf4", "series")])
def test_a_run_learns_and_is_evaluated_as_it_was_trained(
    kind: str, method: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(recipe(model, kind, method, epochs=4), tmp_path / "run", progress=False)
    losses = [line["loss"] for line in run.log if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert run.manifest["base_model"]["quantization"] == {"kind": kind, "double": True}
    whole = train(recipe(model, None, method, max_steps=1), tmp_path / "whole", progress=False)
    assert run.manifest["adapter"]["all_parameters"] == whole.manifest["adapter"]["all_parameters"]
    for place in (run.folder, run.adapter):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = models.load(place, device="cpu", dtype="float32")
        assert loaded.quantization == models.Quantization(kind)
        assert any(f"is loaded as {kind}" in record.getMessage() for record in caplog.records)
        ids = torch.arange(3, 40)[None]
        with torch.inference_mode():
            assert torch.equal(loaded.model(ids).logits, run.model(ids).logits)
    assert models.load(run.folder, device="cpu", quantization=None).quantization is None


@with_bitsandbytes
def test_the_summary_of_an_evaluation_says_it(model: Path, tmp_path: Path) -> None:
    run = train(recipe(model, "nf4", max_steps=1), tmp_path / "run", progress=False)
    found = evaluation.evaluate(run, tasks=["wordproblems"], limit=2, max_new_tokens=4, progress=False)
    assert found.about["quantization"] == {"kind": "nf4", "double": True}
    other = evaluation.evaluate(
        str(model), tasks=["wordproblems"], limit=2, max_new_tokens=4, quantization="int8", progress=False
    )
    assert other.about["quantization"]["kind"] == "int8"


@with_bitsandbytes
def test_a_fusion_of_adapters_on_a_quantised_base(model: Path, tmp_path: Path) -> None:
    parts = [
        train(recipe(model, "nf4", name, max_steps=1), tmp_path / name, progress=False)
        for name in ("series", "parallel")
    ]
    document = recipe(model, "nf4", "fusion")
    document["adapter"]["options"] = {"adapters": [str(part.adapter) for part in parts]}
    run = train(document, tmp_path / "fusion", progress=False)
    losses = [line["loss"] for line in run.log if "loss" in line]
    assert losses[-1] < losses[0]


@with_bitsandbytes
def test_checkpointing_changes_nothing(model: Path, tmp_path: Path) -> None:
    document = recipe(model, "nf4")
    document["adapter"]["options"] = {"r": 8, "lora_dropout": 0.0}
    plain = train(document, tmp_path / "plain", progress=False)
    document["training"]["gradient_checkpointing"] = True
    again = train(document, tmp_path / "again", progress=False)
    for name, weight in weights(plain.adapter).items():
        torch.testing.assert_close(weights(again.adapter)[name], weight, atol=1e-5, rtol=1e-4)


@with_bitsandbytes
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimisers_of_bitsandbytes_learn_and_resume_to_the_same_adapter(
    optimizer: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = recipe(model, None, optimizer=optimizer)
    document["adapter"]["options"] = {"r": 64}  # bitsandbytes leaves states of fewer than 4,096 numbers in 32 bits
    whole = train(document, tmp_path / "whole", progress=False)
    usual = train(document | {"training": document["training"] | {"optimizer": "adamw_torch"}}, tmp_path / "usual")
    assert whole.log[-2]["loss"] == pytest.approx(usual.log[-2]["loss"], abs=0.1)
    original = Recorder.on_log

    def interrupt(self: Recorder, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        original(self, args, state, control, logs, **kwargs)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Recorder, "on_log", interrupt)
    with pytest.raises(Interrupted):
        train(document, tmp_path / "cut", progress=False)
    monkeypatch.setattr(Recorder, "on_log", original)
    resumed = train(document, tmp_path / "cut", progress=False)
    assert all(torch.equal(weights(whole.adapter)[name], w) for name, w in weights(resumed.adapter).items())


def test_the_settings_of_adamw_are_those_of_the_recipe(model: Path, tmp_path: Path) -> None:
    fused = train(recipe(model), tmp_path / "fused", progress=False)
    plain = train(recipe(model, optimizer="adamw_torch"), tmp_path / "plain", progress=False)
    other = train(recipe(model, adam_beta1=0.5), tmp_path / "other", progress=False)
    for name, weight in weights(fused.adapter).items():
        torch.testing.assert_close(weights(plain.adapter)[name], weight, atol=1e-5, rtol=1e-4)
    assert any(
        (weights(other.adapter)[name] - weight).abs().max() > 1e-3 for name, weight in weights(fused.adapter).items()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"quantization": "nf4"}, "adapter": {"method": "loha"}}, "loha does not work on a quantised base"),
        ({"model": {"quantization": "int4"}}, "int4"),
        ({"model": {"dtype": "float16"}}, "float16.*train in bfloat16, or in float32"),
        ({"training": {"optimizer": "adamw"}}, "adamw"),
        ({"training": {"adam_beta2": 1.0}}, "adam_beta2"),
        ({"training": {"adam_epsilon": 0}}, "adam_epsilon"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    document = recipe(model)
    for section, values in change.items():
        document[section] = document[section] | values
    document["adapter"]["options"] = {}
    with pytest.raises(RequestError, match=message):
        train(document, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes_a_run_does_not_begin(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    for document in (recipe(model, "nf4"), recipe(model, optimizer="adamw_8bit")):
        with pytest.raises(RequestError, match=r"needs bitsandbytes.*llm-adapter-family\[quantization\]"):
            train(document, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_records_of_a_plain_run_say_that_nothing_is_quantised(model: Path, tmp_path: Path) -> None:
    run = train(recipe(model, max_steps=1), tmp_path / "run", progress=False)
    assert run.manifest["base_model"]["quantization"] is None
    assert "quantization" not in json.loads((run.adapter / "llm_adapters.json").read_text())
    assert run.peak_memory_bytes == run.manifest["peak_memory_bytes"] == run.manifest["peak_memory"]["host"] > 2**20
