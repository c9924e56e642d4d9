"""Everything that saves a training: the adapter itself, checkpoints to resume from, their marks, and cleaning up.

A checkpoint holds what training needs to go on: every trainable parameter by its name in the model (p-tuning trains
other tensors than those of the adapter that PEFT writes), those of the best adapter so far, and the states of the
optimiser, the schedule, the random numbers and Trainer. It is whole by itself, or it is none.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llm_adapters._version import __version__
from llm_adapters.adapter_files import write_note
from llm_adapters.errors import RequestError
from llm_adapters.files import COMPLETE, atomic_folder, damage, mark_complete, read_json, remove, remove_temporaries
from llm_adapters.models import starts
from llm_adapters.runs import RunFolder

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from llm_adapters.models import Quantization

logger = logging.getLogger(__name__)

KEPT = 2  # whole checkpoints: the one before the last is used where that is damaged
_WEIGHTS, _BEST = "trainable.safetensors", "best.safetensors"

Weights: TypeAlias = "dict[str, torch.Tensor]"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: where it is.
        step: the optimiser steps before it.
        processes: how many wrote it.
        ended: there was nothing left to train.
    """

    folder: Path
    step: int
    processes: int
    ended: bool


def trainable(model: "torch.nn.Module") -> Weights:
    """The trainable parameters of `model`, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def digest(model: "torch.nn.Module") -> str:
    """SHA-256 of the bytes of the trainable parameters."""
    import torch

    total = hashlib.sha256()
    for weight in trainable(model).values():
        total.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def copy_of_trainable(model: "torch.nn.Module") -> Weights:
    """A copy of the trainable parameters in the host's memory."""
    import torch

    return {name: torch.empty_like(weight, device="cpu").copy_(weight) for name, weight in trainable(model).items()}


def set_trainable(model: "torch.nn.Module", weights: Weights) -> None:
    """Give the trainable parameters of `model` these values.

    Raises:
        RequestError: `weights` are those of another adapter.
    """
    import torch

    own = trainable(model)
    if {name: weight.shape for name, weight in own.items()} != {name: w.shape for name, w in weights.items()}:
        raise RequestError("the checkpoint is of another adapter: its trainable parameters are not this one's")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def save_weights(model: "torch.nn.Module", folder: Path, best: "Weights | None" = None) -> None:
    """Write the trainable parameters, and those of the `best` adapter so far, into a checkpoint."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in trainable(model).items()}, folder / _WEIGHTS)
    if best is not None:
        save_file(best, folder / _BEST)


def load_weights(model: "torch.nn.Module", folder: Path) -> "Weights | None":
    """Read what `save_weights` wrote: into `model`, and the best adapter's, if there are any, as the result."""
    from safetensors.torch import load_file

    set_trainable(model, load_file(folder / _WEIGHTS))
    return load_file(folder / _BEST) if (folder / _BEST).exists() else None


def save_adapter(
    model: "PeftModel", folder: Path, template: str, base_weights: str, quantization: "Quantization | None" = None
) -> None:
    """Write the trained adapter to `folder`, whole or not at all, with what its use must know of its training.

    Args:
        model: the model with the adapter.
        folder: where to write.
        template: the prompt template that it was trained with.
        base_weights: the fingerprint of the weights that it was trained on.
        quantization: how those were stored.
    """
    more = {"quantization": quantization.kind, "double_quantization": quantization.double} if quantization else {}
    with atomic_folder(folder, replace=True) as made:
        # PEFT would ask the hub whether the base's embeddings have changed: they are frozen, and may be on no hub.
        starts.save(model, made, save_embedding_layers=False)
        write_note(made, template, base_weights=base_weights, **more, **{"llm-adapters": __version__})


def complete(run: RunFolder, step: int, processes: int = 1, ended: bool = False) -> None:
    """Mark the checkpoint after `step` as whole, and delete those that are not needed any more."""
    mark_complete(run.checkpoint(step), step=step, processes=processes, ended=ended)
    whole = [other for other in run.saved_steps() if (run.checkpoint(other) / COMPLETE).is_file()]
    for old in whole[:-KEPT]:
        remove(run.checkpoint(old))


def latest(run: RunFolder) -> Checkpoint | None:
    """The latest whole checkpoint; the damaged ones after it are told, and everything after it is deleted."""
    found = None
    for step in reversed(run.saved_steps()):
        folder = run.checkpoint(step)
        if not (folder / COMPLETE).exists():  # the process ended while it was written
            continue
        if fault := damage(folder):
            logger.warning("the checkpoint %s is damaged (%s) and left out", folder.name, fault)
            continue
        mark = read_json(folder / COMPLETE)
        found = Checkpoint(folder, step, int(mark.get("processes", 1)), bool(mark.get("ended")))
        break
    for step in run.saved_steps():
        if found is None or step > found.step:
            remove(run.checkpoint(step))
    return found


def check_begun(run: RunFolder, now: dict[str, Any]) -> None:
    """See that what decides the result is what the run was begun with.

    Args:
        run: an interrupted run.
        now: the fingerprints, as `manifest.fingerprints` makes them.

    Raises:
        RequestError: something has changed; says what.
    """
    if not run.begun.is_file():  # it was interrupted before there was a checkpoint
        return
    before = read_json(run.begun)
    changed = [
        f"the {what.replace('_', ' ')} ({_short(before.get(what))} then, {_short(value)} now)"
        for what, value in now.items()
        if before.get(what) != value
    ]
    if changed:
        raise RequestError(
            f"the run in {str(run.path)!r} was begun with something else, and would not go on to the same result: "
            f"{'; '.join(changed)}. Give it what it was begun with, or name a new folder."
        )


def _short(value: Any) -> str:
    return str(value)[:12]


def clean(run: RunFolder) -> None:
    """Delete what a process that was killed has left half written."""
    remove_temporaries(run.path, run.config.name, run.log.name, run.adapter.name, run.manifest.name, run.sizes.name)
    remove_temporaries(run.checkpoints)


def prune(run: RunFolder) -> None:
    """Delete the checkpoints, and what a save that was killed has left."""
    clean(run)
    remove(run.checkpoints)
