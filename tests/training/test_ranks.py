"""Two processes that train together give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import save_tiny

from llm_adapters.files import read_json

TRAIN = "import sys, llm_adapters; llm_adapters.train(sys.argv[1], sys.argv[2], progress=False)"


def run(recipe: dict[str, Any], folder: Path, processes: int) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "train.py").write_text(TRAIN)
    output = folder / f"run{processes}"
    launch(processes, folder / "train.py", folder / "recipe.yaml", output)
    return output


def launch(processes: int, *command: Path | str) -> str:
    """What so many processes of a script, or of a module after ``-m``, print."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("family", "processes"), [("llama", 2), ("bloom", 3)])
def test_processes_give_the_adapter_of_one(family: str, processes: int, tmp_path: Path) -> None:
    """Steps of 8 from 33 examples, 5 held out: neither 8, 33 nor 5 can be divided by the processes."""
    recipe = {
        "model": {"name": str(save_tiny(tmp_path / "model", family)), "dtype": "float32", "device": "cpu"},
        "adapter": {"method": "parallel", "options": {"bottleneck_size": 8}},
        "data": {
            "train": "wordproblems-train",
            "template": "plain",
            "limit": 38,
            "validation": 5,
            "max_length": 256,
        },
        "training": {
            "epochs": 2,
            "batch_size": 8,
            "micro_batch_size": 3,
            "learning_rate": 1e-3,
            "log_every": 1,
            "fast_paths": family == "llama",  # which decides on packs or padded rows
        },
    }
    one, more = (run(recipe, tmp_path, count) for count in (1, processes))
    expected, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, more))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    first, second = (read_json(folder / "manifest.json") for folder in (one, more))
    for key in ("final_loss", "best_validation_loss", "first_validation_loss"):
        assert second[key] == pytest.approx(first[key], abs=1e-6)
    assert second["data"] == first["data"]
    assert {p.name for p in more.iterdir()} == {p.name for p in one.iterdir()}


@pytest.mark.slow
def test_the_command_line_does_and_shows_everything_once(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (tmp_path / "test.jsonl").write_text('{"question": "What is 3 + 4?", "answer": "7"}\n' * 3)
    (tmp_path / "sums.yaml").write_text("title: sums\nkind: number\nfile: test.jsonl\n")
    recipe = {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "adapter": {"method": "lora", "options": {"r": 4, "lora_dropout": 0.0}},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 8, "max_length": 256},
        "training": {"epochs": 1, "batch_size": 8, "warmup": 0},
        "evaluation": {"tasks": [str(tmp_path / "sums.yaml")], "max_new_tokens": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-m", "llm_adapters.cli", "train", tmp_path / "recipe.yaml", "--json", "--output"]
    one, two = (json.loads(launch(count, *command, tmp_path / f"run{count}")) for count in (1, 2))
    assert two["evaluation"]["tasks"]["sums"]["total"] == 3
    assert two["hardware"]["processes"] == 2
    records = [(tmp_path / f"run{count}/eval/default/sums.jsonl").read_text() for count in (1, 2)]
    assert records[0] == records[1]
    assert one.keys() == two.keys()
    measured = launch(
        2, "-m", "llm_adapters.cli", "evaluate", tmp_path / "run1", "--tasks", tmp_path / "sums.yaml",
        "--max-new-tokens", "8", "--output", tmp_path / "again", "--json", "--html",
    )  # fmt: skip
    assert json.loads(measured)["tasks"]["sums"]["total"] == 3
    assert (tmp_path / "again/eval/default/sums.jsonl").read_text() == records[0]
    assert (tmp_path / "again/eval/default/errors.html").is_file()


@pytest.mark.slow
def test_a_model_may_be_sharded_once_it_is_accelerated() -> None:
    found = json.loads(launch(2, Path(__file__).parents[1] / "support/sharded.py").splitlines()[-1])  # FSDP2
    assert found["packed"]
    assert found["all"] == pytest.approx(found["one"], rel=1e-6)
    assert found["furthest"] < 1e-5
    assert "before" in found["refused"]
