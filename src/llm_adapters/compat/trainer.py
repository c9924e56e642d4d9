"""Private interfaces of transformers' Trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


class StepTrainer(Trainer):
    """Trainer whose private hooks have public names here; the loss that it is given is that of a whole step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes Trainer count a step's labels over the ranks
        self._loss_shifts_labels = False  # the collator's labels are the targets alone

    def train_sampler(self, examples: Any) -> Any:
        """Sampler of the training `examples`."""
        raise NotImplementedError

    def save_weights(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write the trained weights to `folder`; `state_dict` holds them where they are not in the model."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        self.save_weights(Path(output_dir or self.args.output_dir), state_dict)
