"""Private interfaces of transformers' Trainer."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


class StepTrainer(Trainer):
    """Trainer whose private hooks have public names here; the loss that it is given is that of a whole step.

    The model is not wrapped: where there are several processes, `training_step` adds up their gradients.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes Trainer count a step's labels over the ranks
        self._loss_shifts_labels = False  # the collator's labels are the targets alone
        # In "evaluation mode" accelerate places the model, and wraps it in nothing.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def save_weights(self, folder: Path) -> None:
        """Write the trained weights to `folder`, a checkpoint."""
        raise NotImplementedError

    def load_weights(self, folder: Path) -> None:
        """Read them."""
        raise NotImplementedError

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        self.save_weights(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))
