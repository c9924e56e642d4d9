"""Whole training runs on tiny models: learning, the run folder, resuming, and what is refused beforehand."""

import contextlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import save_tiny

from llm_adapters.errors import RequestError, WorkError
from llm_adapters.training import Interrupted, train
from llm_adapters.training.recipe import load_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    # Wide enough to learn something although all but the adapter is random and frozen.
    sizes = {"llama": {}, "bloom": {"hidden_size": 128}, "gptj": {"n_embd": 128, "rotary_dim": 16}}
    return {family: save_tiny(folder / family, family, **size) for family, size in sizes.items()}


def small(model: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe that trains in a second or two."""
    recipe: dict[str, Any] = {
        "model": {"name": str(model)},
        "adapter": {"method": "series", "options": {"bottleneck_size": 8}},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 32, "max_length": 256},
        "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "log_every": 1},
    }
    for section, values in sections.items():
        recipe[section] = recipe.get(section, {}) | values
    return recipe


RELOAD = """
import sys, torch
import llm_adapters
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
with torch.inference_mode():
    torch.save(model(torch.arange(3, 40)[None]).logits, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "gptj"])
@pytest.mark.parametrize("method", ["series", "parallel", "lora"])
def test_a_tiny_model_learns_and_its_adapter_reloads_bit_for_bit(
    family: str, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    size = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0} if method == "lora" else {"bottleneck_size": 64}
    recipe = small(
        models[family],
        adapter={"method": method, "options": size},
        data={"limit": 8},
        training={"epochs": 40, "batch_size": 8, "micro_batch_size": 8, "log_every": 5},
    )
    run = train(recipe, tmp_path / "run", progress=False)
    losses = [line["loss"] for line in run.log if "loss" in line]
    assert losses[-1] < losses[0] / 2
    with torch.inference_mode():
        expected = run.model(torch.arange(3, 40)[None]).logits
    command = [sys.executable, "-c", RELOAD, str(models[family]), str(run.adapter), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_the_run_folder_says_what_ran(models: dict[str, Path], tmp_path: Path) -> None:
    run = train(small(models["llama"], data={"validation": 4}), tmp_path / "run", progress=False)
    assert sorted(p.name for p in run.folder.iterdir()) == ["adapter", "config.yaml", "log.jsonl", "manifest.json"]
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert load_recipe(config).data.validation == 4
    assert config["model"]["dtype"] in ("float32", "bfloat16")  # what "auto" came to
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["data"]["train_examples"] == 28
    assert manifest["data"]["example"]["prompt"].startswith("Question: ")
    assert manifest["adapter"]["trainable_parameters"] == 2 * (32 * 8 + 8 * 32)
    assert manifest["seed"] == 42
    assert manifest["tokens_per_second"] > 0
    assert manifest["fast_paths"]["packing"] == manifest["fast_paths"]["fused linear cross-entropy"] == "on"
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert log == run.log
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    measured = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    assert [step for step, _ in measured] == [0, 4]  # before the first step, and at the end
    assert [loss for _, loss in measured] == [manifest["first_validation_loss"], manifest["best_validation_loss"]]
    assert json.loads((run.adapter / "llm_adapters.json").read_text())["template"] == "plain"
    # W_up starts at zero: what was saved is what was trained
    assert all(weight.abs().sum() > 0 for weight in weights(run.adapter).values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_seed_gives_the_same_adapter(dropout: float, models: dict[str, Path], tmp_path: Path) -> None:
    recipe = small(models["llama"], adapter={"options": {"bottleneck_size": 8, "bottleneck_dropout": dropout}})
    one, two = (train(recipe, tmp_path / name, progress=False) for name in ("one", "two"))
    assert weights(one.adapter).keys() == weights(two.adapter).keys()
    assert all(torch.equal(weights(one.adapter)[k], w) for k, w in weights(two.adapter).items())
    other = train(small(models["llama"], training={"seed": 7}), tmp_path / "three", progress=False)
    assert not all(torch.equal(weights(one.adapter)[k], w) for k, w in weights(other.adapter).items())


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_the_cut_into_micro_batches_changes_nothing(micro: int, models: dict[str, Path], tmp_path: Path) -> None:
    whole = train(small(models["llama"]), tmp_path / "whole", progress=False)
    cut = train(small(models["llama"], training={"micro_batch_size": micro}), tmp_path / "cut", progress=False)
    for one, two in zip(whole.log, cut.log, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_interrupted_run_resumes_to_the_same_adapter(
    dropout: float, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from llm_adapters.training.trainer import Recorder

    recipe = small(
        models["llama"],
        adapter={"options": {"bottleneck_size": 8, "bottleneck_dropout": dropout}},
        training={"epochs": 2},
    )
    whole = train(recipe, tmp_path / "whole", progress=False)
    original = Recorder.on_log

    def interrupt(self: Recorder, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        original(self, args, state, control, logs, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Recorder, "on_log", interrupt)
    with pytest.raises(Interrupted, match="stopped at step 4 of 8"):
        train(recipe, tmp_path / "cut", progress=False)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    monkeypatch.setattr(Recorder, "on_log", original)
    resumed = train(recipe, tmp_path / "cut", progress=False)
    expected = weights(whole.adapter)
    assert all(torch.equal(expected[k], w) for k, w in weights(resumed.adapter).items())
    assert [(e["step"], e["loss"]) for e in resumed.log if "loss" in e] == [
        (e["step"], e["loss"]) for e in whole.log if "loss" in e
    ]


def test_a_run_that_an_earlier_version_began_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    document = small(models["llama"], training={"epochs": 2})
    recipe = load_recipe(document)
    written = recipe.to_dict()
    written["model"]["dtype"] = "float32"
    written["training"]["accelerate"] = written["training"].pop("fast_paths")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(written))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # nobody can change what is written
        run = train(recipe, tmp_path / "run", progress=False)
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["training"]["fast_paths"] is True
    other = dict(document, training=document["training"] | {"fast_paths": False})
    (run.folder / "manifest.json").unlink()
    with pytest.raises(RequestError, match="already holds another run"):
        train(other, run.folder, progress=False)


def test_progress_bars_of_transformers_are_as_before(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    train(small(models["llama"]), tmp_path / "run", progress=False)
    assert logging.is_progress_bar_enabled()


def test_early_stopping_and_the_best_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = small(
        models["llama"],
        data={"validation": 8},
        training={"epochs": 30, "learning_rate": 0.5, "evaluate_every": 1, "early_stopping": 2, "keep_best": True},
    )
    run = train(recipe, tmp_path / "run", progress=False)
    measured = [line["eval_loss"] for line in run.log if "eval_loss" in line]
    assert len(measured) < 30 * 3  # it stopped
    assert run.manifest["best_validation_loss"] == pytest.approx(min(measured[1:]))


def test_gradient_checkpointing_changes_no_loss(models: dict[str, Path], tmp_path: Path) -> None:
    plain = train(small(models["bloom"]), tmp_path / "plain", progress=False)
    again = train(small(models["bloom"], training={"gradient_checkpointing": True}), tmp_path / "again", progress=False)
    for one, two in zip(plain.log, again.log, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


def test_what_is_computed_again_drops_the_same(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's draw is then one of torch's own, as it goes back to them; with the same draws, the same weights."""
    dropping = {"method": "series", "options": {"bottleneck_size": 8, "bottleneck_dropout": 0.3}}
    recipe = small(models["llama"], adapter=dropping, training={"gradient_checkpointing": True})
    again = train(recipe, tmp_path / "again", progress=False)
    monkeypatch.setattr("llm_adapters.ops.dropout.seeds_drawn_together", contextlib.nullcontext)
    plain = train(small(models["llama"], adapter=dropping), tmp_path / "plain", progress=False)
    for name, weight in weights(plain.adapter).items():
        torch.testing.assert_close(weights(again.adapter)[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"method": "serial"}}, "unknown method 'serial'"),
        ({"adapter": {"options": {"rank": 4}}}, "unknown option of series 'rank'"),
        ({"adapter": {"options": {"bottleneck_size": 0}}}, "bottleneck_size is 0"),
        ({"adapter": {"options": {"target_modules": ["nothing"]}}}, "nothing"),
        ({"data": {"max_length": 4}}, "all 2000 are longer"),
        ({"data": {"train": "gsm9k-train"}}, "gsm9k-train"),
    ],
)
def test_a_wrong_request_writes_nothing(
    sections: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        train(small(models["llama"], **sections), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = small(models["llama"])
    train(recipe, tmp_path / "run", progress=False)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(RequestError, match="already holds a finished run"):
        train(recipe, tmp_path / "run", progress=False)
    (tmp_path / "run" / "manifest.json").rename(tmp_path / "aside")
    with pytest.raises(RequestError, match="already holds another run"):
        train(small(models["llama"], training={"seed": 1}), tmp_path / "run", progress=False)
    (tmp_path / "aside").rename(tmp_path / "run" / "manifest.json")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RequestError, match="not empty"):
        train(recipe, tmp_path / "other", progress=False)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_sentence(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llm_adapters.fast_paths.forward.fused_linear_cross_entropy",
        lambda *_: torch.tensor(float("nan"), requires_grad=True),
    )
    with pytest.raises(WorkError, match="the loss is nan at step 1"):
        train(small(models["llama"]), tmp_path / "run", progress=False)


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")
