"""Compositions from a recipe: adapters are trained and fused, or mixed with a prefix, and the run is like any other."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny

import llm_adapters
from llm_adapters.errors import RequestError
from llm_adapters.training import train

IDS = torch.arange(3, 40)[None]


def recipe(model: Path, method: str, **options: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "adapter": {"method": method, "options": options},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 16, "max_length": 256},
        "training": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "log_every": 1},
    }


def test_a_recipe_fuses_the_adapters_of_two_runs(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    sources = [
        train(recipe(model, method, bottleneck_size=8), tmp_path / method, progress=False).folder
        for method in ("series", "parallel")
    ]
    run = train(recipe(model, "fusion", adapters=[str(f) for f in sources]), tmp_path / "fused", progress=False)
    weights = load_file(run.adapter / "adapter_model.safetensors")
    for index, source in enumerate(sources):  # the adapters are in it as they were
        for key, tensor in load_file(source / "adapter" / "adapter_model.safetensors").items():
            start, _, rest = key.partition(".bottleneck_")
            what, _, weight = rest.partition(".")
            assert torch.equal(weights[f"{start}.fusion_adapters.bottleneck_{what}.{index}.{weight}"], tensor)
    values = [tensor for key, tensor in weights.items() if "fusion_value" in key]
    assert len(values) == 2
    assert not any(torch.equal(value, torch.eye(len(value))) for value in values)  # something was learned
    with torch.inference_mode():
        expected = run.model(IDS).logits
        for folder in sources:
            shutil.rmtree(folder)
        assert torch.equal(llm_adapters.load(run.folder).model(IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_recipe_mixes_prefix_and_parallel_adapter(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    run = train(recipe(model, "mam", bottleneck_size=8, prefix_length=4), tmp_path / "run", progress=False)
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert sum(tensor.shape[0] == 2 and tensor.shape[2] == 4 for key, tensor in weights.items() if "prefix" in key) == 2
    losses = [line["loss"] for line in run.log if "loss" in line]
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        loaded = llm_adapters.load(run.folder).model
        assert torch.equal(loaded(IDS).logits, run.model(IDS).logits)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(IDS).logits, run.model(IDS).logits, atol=1e-3)


def test_a_recipe_without_adapters_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with pytest.raises(RequestError, match="adapters is empty: name at least one folder"):
        train(recipe(model, "fusion"), tmp_path / "run", progress=False)
    with pytest.raises(RequestError, match="there is no adapter folder"):
        train(recipe(model, "fusion", adapters=["nowhere"]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("order", ["llm_adapters, peft", "peft, llm_adapters"])
def test_importing_the_package_makes_peft_know_it(order: str) -> None:
    code = f"import {order}; print('FUSION' in __import__('peft').PEFT_TYPE_TO_CONFIG_MAPPING)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
