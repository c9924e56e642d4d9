"""The manifest of a run."""

import os
import platform
import sys
from datetime import UTC, datetime
from typing import Any

from llm_adapters import processes
from llm_adapters.models import LoadedModel
from llm_adapters.models.fingerprints import versions
from llm_adapters.tasks import leakage
from llm_adapters.tasks.templates import clock
from llm_adapters.training.data import TrainingData
from llm_adapters.training.memory import peak_memory
from llm_adapters.training.recipe import Recipe


def fingerprints(base: LoadedModel, data: TrainingData) -> dict[str, str]:
    """What decides the result of a run and is not in its recipe: contents of files, and versions of the software."""
    code = {library: number for library, number in versions("accelerate").items() if library != "python"}
    return {
        "data": data.fingerprint,
        "base_model": base.fingerprint(),
        "tokenizer": base.tokenizer_fingerprint(),
        **code,
    }


def describe(
    recipe: Recipe,
    base: LoadedModel,
    model: Any,
    data: TrainingData,
    recorder: Any,
    state: Any,
    seconds: float,
    fast_paths: dict[str, str],
    begun: dict[str, str],
    micro_batches: dict[str, Any],
) -> dict[str, Any]:
    """Everything that tells another person what a run was: what ran, on what, how fast, and what came of it.

    Args:
        recipe: what was asked for.
        base: the base model, and what "auto" came to.
        model: the trained model.
        data: what it was trained on.
        recorder: the lines of the log and the number of tokens.
        state: Trainer's final state.
        seconds: how long the training took.
        fast_paths: the report of `FastPaths`.
        begun: the `fingerprints`.
        micro_batches: the sizes of micro-batches (`Sizes.to_dict`).
    """
    import torch

    memory = peak_memory(base.device)
    trainable, parameters = model.get_nb_trainable_parameters()  # of packed weights it knows how many there are
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions("accelerate"),
        "hardware": {
            "machine": platform.machine(),
            "device": str(base.device),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": processes.count(),
        },
        "seed": recipe.training.seed,
        "base_model": {
            "name": base.name,
            "source": base.source,
            "dtype": str(base.dtype).removeprefix("torch."),
            "quantization": base.quantization.to_dict() if base.quantization else None,
            "fingerprint": begun["base_model"],
        },
        "adapter": {
            "method": recipe.adapter.method,
            "trainable_parameters": trainable,
            "all_parameters": parameters,
        },
        "data": {
            "name": recipe.data.train,
            "fingerprint": data.fingerprint,
            "template": recipe.data.template,
            "template_date": clock(recipe.data.template),
            "example": data.example,
            **data.counts(),
            **data.reading,
            "questions": leakage.fingerprint(data.questions).to_dict(),
        },
        "fast_paths": fast_paths,
        "steps": state.global_step,
        "epochs": state.epoch,
        "final_loss": next((line["loss"] for line in reversed(recorder.losses) if "loss" in line), None),
        "first_validation_loss": _first_validation_loss(recorder.losses),
        "best_validation_loss": state.best_metric,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(recorder.tokens / max(seconds, 1e-9), 1),
        "micro_batch_tokens": micro_batches,
        "peak_memory_bytes": memory.get("allocated", memory["host"]),
        "peak_memory": memory,
        "command": sys.argv if sys.argv and sys.argv[0].endswith("llm-adapters") else None,
    }


def _first_validation_loss(log: list[dict[str, Any]]) -> float | None:
    """Loss on the validation split before the first step."""
    return next((line["eval_loss"] for line in log if line["step"] == 0 and "eval_loss" in line), None)
