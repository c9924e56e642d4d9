"""Everything that saves a training: the adapter itself, checkpoints to resume from, their marks, and cleaning up."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapters._version import __version__
from llm_adapters.adapter_files import write_note
from llm_adapters.files import atomic_folder, mark_complete
from llm_adapters.runs import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel

    from llm_adapters.models import Quantization


def save_weights(model: "PeftModel", folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapter's weights and config to `folder`, in PEFT's format.

    Args:
        model: the model with the adapter.
        folder: where to write, also of a checkpoint of Trainer's.
        state_dict: the weights, where they are not those in `model` (gathered from several processes).
    """
    # PEFT would ask the hub whether the base's embeddings have changed: they are frozen, and may be on no hub.
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)


def save_adapter(model: "PeftModel", folder: Path, template: str, quantization: "Quantization | None" = None) -> None:
    """Write the trained adapter to `folder`, whole or not at all, with what its use must know of its training.

    Args:
        model: the model with the adapter.
        folder: where to write.
        template: the prompt template.
        quantization: how the base's weights were stored.
    """
    more = {"quantization": quantization.kind, "double_quantization": quantization.double} if quantization else {}
    with atomic_folder(folder, replace=True) as made:
        save_weights(model, made)
        write_note(made, template, **more, **{"llm-adapters": __version__})


def complete(run: RunFolder, step: int) -> None:
    """Mark the checkpoint after `step` as whole: only such a one is resumed from."""
    # The other processes may still be writing the states of their random numbers.
    mark_complete(run.checkpoint(step), ignore="rng_state_[1-9]*.pth")


def prune(run: RunFolder) -> None:
    """Delete the checkpoints, and what a save that was killed has left."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    for left in run.path.glob(f".{run.adapter.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
