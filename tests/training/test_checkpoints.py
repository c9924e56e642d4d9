"""A run that is interrupted anywhere ends as if it had not been, or says in a sentence why it cannot."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny

from llm_adapters.errors import RequestError, WorkError
from llm_adapters.models import load
from llm_adapters.runs import RunFolder
from llm_adapters.tasks.catalog import load_training_data
from llm_adapters.training import Collator, FastPaths, Run, checkpoints, load_recipe, manifest, train
from llm_adapters.training.data import prepare

CLOCK = ("seconds", "tokens", "tokens_per_second")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {i} and {i * i}?", "answer": f"It is {i + i * i}."} for i in range(22)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(model: Path, data: Path, method: str, options: dict[str, Any] | None = None, **training: Any) -> Any:
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "adapter": {"method": method, "options": options or {}},
        "data": {"train": str(data), "template": "plain", "validation": 4},
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "save_every": 2} | training,
    }


class Killed(BaseException):
    """Ends a run without any further word, as SIGKILL does."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    def run_until(asked: Any, folder: Path, step: int) -> RunFolder:
        """Train until the checkpoint after `step` is whole, and no further."""
        original = checkpoints.complete

        def complete(run: RunFolder, at: int, *rest: Any) -> None:
            original(run, at, *rest)
            if at == step:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "complete", complete)
            with pytest.raises(Killed):
                train(asked, folder, progress=False)
        return RunFolder(folder)

    return run_until


def assert_same(one: Run, two: Run) -> None:
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    logs = [[{k: v for k, v in line.items() if k not in CLOCK} for line in run.log] for run in (one, two)]
    assert logs[0] == logs[1]
    assert {p.name for p in one.folder.iterdir()} == {p.name for p in two.folder.iterdir()}
    for key in ("steps", "final_loss", "first_validation_loss", "best_validation_loss"):
        assert one.manifest[key] == two.manifest[key]


TOKENS = {"num_virtual_tokens": 3}


@pytest.mark.parametrize(
    ("method", "options", "training"),
    [
        ("lora", {"r": 4, "lora_dropout": 0.2}, {}),
        ("prefix", TOKENS | {"prefix_projection": True, "encoder_hidden_size": 16}, {}),
        ("p-tuning", TOKENS, {"keep_best": True, "evaluate_every": 1}),
        ("prompt", TOKENS, {"save_every": 3, "evaluate_every": 2, "keep_best": True}),
        ("series", {"bottleneck_size": 4}, {"learning_rate": 0.3, "evaluate_every": 1, "early_stopping": 2}),
    ],
)
@pytest.mark.parametrize("at", ["first", "last"])
def test_a_run_goes_on_to_the_same_bits(
    method: str,
    options: dict[str, Any],
    training: dict[str, Any],
    at: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: Callable[..., RunFolder],
) -> None:
    asked = recipe(model, data, method, options, **training)
    saved: list[int] = []
    original = checkpoints.complete
    with monkeypatch.context() as patched:
        patched.setattr(
            checkpoints, "complete", lambda run, step, *rest: saved.append(step) or original(run, step, *rest)
        )
        whole = train(asked, tmp_path / "whole", progress=False)
    killed(asked, tmp_path / "cut", saved[0] if at == "first" else saved[-1])
    assert_same(train(asked, tmp_path / "cut", progress=False), whole)


@pytest.mark.parametrize("steps", [3, 7])  # within an epoch of 5 steps, the first and the second
def test_nothing_is_trained_after_the_last_step(
    steps: int, model: Path, data: Path, tmp_path: Path, killed: Callable[..., RunFolder]
) -> None:
    asked = recipe(model, data, "lora", {"r": 4}, max_steps=steps)
    whole = train(asked, tmp_path / "whole", progress=False)
    killed(asked, tmp_path / "cut", steps)
    assert_same(train(asked, tmp_path / "cut", progress=False), whole)


def test_the_best_adapter_is_the_one_that_was_measured(model: Path, data: Path, tmp_path: Path) -> None:
    """Also where the adapter that is written is other tensors than those that are trained."""
    options = TOKENS | {"prefix_projection": True, "encoder_hidden_size": 16}
    wild = {"learning_rate": 200.0, "warmup": 0, "schedule": "constant"}  # so that the loss goes up as well
    asked = recipe(model, data, "prefix", options, keep_best=True, evaluate_every=1, **wild)
    run = train(asked, tmp_path / "run", progress=False)
    measured = [line["eval_loss"] for line in run.log if line["step"] and "eval_loss" in line]
    assert min(measured) < measured[-1], "the last is the best: this test would see nothing"
    loaded, settings = load(run.folder), load_recipe(asked)
    held_out = prepare(
        load_training_data(str(data)), loaded.tokenizer, settings.data, settings.training.seed
    ).validation
    with FastPaths(loaded.model.eval()) as fast, torch.inference_mode():
        step = Collator(0, packed=fast.packs)(held_out)
        total = sum(float(loaded.model(**micro.arguments())["loss"]) for micro in step["micro_batches"])
    assert total / len(step["labels"]) == pytest.approx(min(measured), abs=1e-5)


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "deleted"])
def test_a_damaged_checkpoint_is_told_and_left_out(
    damage: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    killed: Callable[..., RunFolder],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = recipe(model, data, "parallel", {"bottleneck_size": 4}, keep_best=True, evaluate_every=2)
    whole = train(asked, tmp_path / "whole", progress=False)
    stopped = killed(asked, tmp_path / "stopped", 4)
    files = sorted(file.name for file in stopped.checkpoint(4).iterdir())
    assert {"trainable.safetensors", "best.safetensors", "optimizer.pt", "complete"} <= set(files)
    for name in files:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(stopped.path, tmp_path / "cut")
        file = RunFolder(tmp_path / "cut").checkpoint(4) / name
        content = bytearray(file.read_bytes())
        if damage == "deleted":
            file.unlink()
        else:
            content[len(content) // 3] ^= 4
            file.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "flipped": content}[damage])
        caplog.clear()
        assert_same(train(asked, tmp_path / "cut", progress=False), whole)
        assert "going on from checkpoint-2" in caplog.text
        if (damage, name) != ("deleted", "complete"):  # that one looks as if it were never finished
            assert "checkpoint-4 is damaged" in caplog.text


def test_a_run_without_a_whole_checkpoint_begins_anew(
    model: Path, data: Path, tmp_path: Path, killed: Callable[..., RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(model, data, "lora", {"r": 4})
    whole = train(asked, tmp_path / "whole", progress=False)
    stopped = killed(asked, tmp_path / "cut", 2)
    (stopped.checkpoint(2) / "optimizer.pt").unlink()
    (stopped.checkpoints / "checkpoint-old").mkdir()
    stopped.log.write_bytes(stopped.log.read_bytes()[:-20] + bytes(40))
    (stopped.path / ".config.yaml.abcd1234.tmp").write_text("model:")
    assert_same(train(asked, tmp_path / "cut", progress=False), whole)
    assert "begins anew" in caplog.text


def test_only_the_last_checkpoints_are_kept(
    model: Path, data: Path, tmp_path: Path, killed: Callable[..., RunFolder]
) -> None:
    assert killed(recipe(model, data, "lora", {"r": 4}), tmp_path / "cut", 8).saved_steps() == [6, 8]


@pytest.mark.parametrize("what", ["data", "base model", "tokenizer", "peft"])
def test_a_run_whose_inputs_have_changed_does_not_go_on(
    what: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    killed: Callable[..., RunFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    asked = recipe(own, data, "lora", {"r": 4})
    stopped = killed(asked, tmp_path / "cut", 2)
    before = stopped.log.read_bytes()
    if what == "data":
        data.write_text(data.read_text().replace("What is 3 and", "What is three and"))
    elif what == "base model":
        save_tiny(own, seed=1)
    elif what == "tokenizer":
        file = own / "tokenizer_config.json"
        document = json.loads(file.read_text())
        file.write_text(json.dumps(document | {"chat_template": "{{ messages[0]['content'] }}"}))
    else:
        now = manifest.versions("accelerate") | {"peft": "0.0.1"}
        monkeypatch.setattr(manifest, "versions", lambda *_: now)
    with pytest.raises(RequestError, match=f"begun with something else.* the {what} \\("):
        train(asked, tmp_path / "cut", progress=False)
    assert stopped.log.read_bytes() == before
    assert stopped.saved_steps() == [2]


def test_a_second_training_in_the_same_folder_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    import threading

    asked, refused = recipe(model, data, "lora", {"r": 4}), []

    def second() -> None:
        try:
            train(asked, tmp_path / "run", progress=False)
        except RequestError as error:
            refused.append(str(error))

    with RunFolder(tmp_path / "run").lock():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another process is training" in refused[0]
    assert not (tmp_path / "run").exists()


def test_links_in_a_run_folder_are_not_written_through(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="is a link"):
        train(recipe(model, data, "lora", {"r": 4}), tmp_path / "run", progress=False)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("method", "options", "training", "kind", "message"),
    [
        ("lora", {"r": 4}, {"warmup": 50}, RequestError, "warmup is 50 steps and the run has 10"),
        ("lora", {"r": 4}, {"learning_rate": 1e-60}, WorkError, "no weight of the adapter has changed"),
        ("parallel", {"bottleneck_size": 4, "scaling": 1e-60}, {}, WorkError, "every gradient of the first step is 0"),
        ("rslora", {"r": 4, "lora_alpha": 0}, {}, RequestError, "lora_alpha is 0"),
        ("lora", {"r": 4, "lora_dropout": 1.5}, {}, RequestError, "lora_dropout is 1.5"),
        ("prompt", TOKENS | {"num_layers": 7}, {}, RequestError, "num_layers is 7, and the model has 2"),
        ("p-tuning", {"num_virtual_tokens": 0}, {}, RequestError, "num_virtual_tokens is 0"),
        ("lora", {"r": 4}, {"trackers": ["mlflow"]}, RequestError, "mlflow, which is not installed"),
    ],
)
def test_a_training_that_would_do_nothing_is_an_error(
    method: str,
    options: dict[str, Any],
    training: dict[str, Any],
    kind: type[Exception],
    message: str,
    model: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=message):
        train(recipe(model, data, method, options, **training), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "adapter").exists()
    assert kind is WorkError or not (tmp_path / "run").exists()


def test_a_share_of_warmup_leaves_a_step_to_learn(model: Path, data: Path, tmp_path: Path) -> None:
    run = train(recipe(model, data, "lora", {"r": 4}, max_steps=1, warmup=0.1), tmp_path / "run", progress=False)
    assert [line["learning_rate"] for line in run.log if "loss" in line] == [0.01]
