"""transformers' Trainer with this project's loss, order of data and validation, and the callbacks of a run."""

import contextlib
import functools
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from llm_adapters import processes
from llm_adapters.compat.trainer import StepTrainer
from llm_adapters.compat.transformers import recomputes_activations
from llm_adapters.errors import WorkError
from llm_adapters.files import append, write_text
from llm_adapters.ops import dropout
from llm_adapters.runs import RunFolder
from llm_adapters.training import checkpoints
from llm_adapters.training.collator import Collator, MicroBatch
from llm_adapters.training.graphs import MicroBatchGraphs
from llm_adapters.training.halving import DoesNotFitError, RandomState, computing, until_it_fits
from llm_adapters.training.memory import release_memory
from llm_adapters.training.sizes import Sizes
from llm_adapters.training.steps import Steps

Result = TypeVar("Result")


class AdapterTrainer(StepTrainer):
    """Trainer whose batch is a whole optimiser step, divided into micro-batches by the collator.

    The loss is the mean over the labels of the step, however it is divided and over however many processes.

    Args:
        args: Trainer's.
        sizes: tokens of a micro-batch at each step; None for those of the collator.
        kwargs: Trainer's.
    """

    tokens_seen = 0  # by this process, no padding counted
    keep_best = False
    best: dict[str, torch.Tensor] | None = None  # trainable parameters of the best adapter so far, where it is kept
    graphs: MicroBatchGraphs | None = None  # of its micro-batches
    _recomputes: bool | None = None  # activations, in the backward pass; known when Trainer has prepared the model
    _unchecked: "tuple[int, torch.Tensor, torch.cuda.Event] | None" = (
        None  # step, its loss on the host, when it is there
    )

    def __init__(self, *args: Any, sizes: Sizes | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes = sizes or Sizes(self.data_collator.micro_batch_tokens)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The gradients of one optimiser step; a loss that is not finite ends the run.

        Where memory is used up, the step is done again from its start in smaller micro-batches.
        """
        model.train()
        count = num_items_in_batch if num_items_in_batch is not None else len(inputs["labels"])
        step, start = self.state.global_step + 1, RandomState(self.args.device)

        def compute() -> tuple[list[MicroBatch], torch.Tensor]:
            micro_batches = self._micro_batches(inputs, step)
            return micro_batches, self._accumulate(model, micro_batches, count)

        def undo() -> None:
            start.restore()
            model.zero_grad()

        micro_batches, total = self._within_memory(compute, undo, step)
        self._check_later(total)
        self.tokens_seen += sum(micro.tokens for micro in micro_batches)
        if self.accelerator.num_processes > 1:
            add_up([p for p in self.model.parameters() if p.requires_grad])
        return total * self.accelerator.num_processes  # Trainer takes the mean over the processes

    def _within_memory(self, compute: Callable[[], Result], undo: Callable[[], None], step: int) -> Result:
        """`until_it_fits`; before anything is halved, the graphs give their memory back."""

        def attempt() -> Result:
            try:
                return compute()
            except DoesNotFitError:
                if self.graphs is None or not self.graphs.release():
                    raise
            undo()
            release_memory()
            return compute()

        return until_it_fits(attempt, undo, self.sizes, step, self.accelerator.num_processes)

    def _micro_batches(self, batch: dict[str, Any], step: int) -> list[MicroBatch]:
        """The micro-batches of a batch in the size of `step`, which may not be the one that it was collated in."""
        collator: Collator = self.data_collator
        collator.micro_batch_tokens = self.sizes.at(step)
        if batch["micro_batch_tokens"] == collator.micro_batch_tokens:
            return batch["micro_batches"]
        return collator.make_micro_batches(batch["examples"])

    def _accumulate(
        self, model: torch.nn.Module, micro_batches: list[MicroBatch], count: torch.Tensor | int
    ) -> torch.Tensor:
        """Add the gradients of all micro-batches; returns their loss."""
        compute = functools.partial(self._compute, model)
        total = torch.zeros((), device=self.args.device)
        if self.graphs is not None:
            self.graphs.begin_step()
        for micro in micro_batches:
            with computing(micro):
                loss = self.graphs.run(micro, count, compute) if self.graphs is not None else None
                total += compute(micro.arguments(), count) if loss is None else loss
        return total

    def _compute(self, model: torch.nn.Module, arguments: dict[str, Any], count: torch.Tensor | int) -> torch.Tensor:
        """A micro-batch's share in the loss of the step, whose gradients are added."""
        if self._recomputes is None:
            self._recomputes = recomputes_activations(model)
        seeds = contextlib.nullcontext() if self._recomputes else dropout.seeds_drawn_together()
        with self.compute_loss_context_manager(), seeds:
            loss = model(**arguments)["loss"] / count
        # Backward functions are Python's own: a thread for them would only wait for this one.
        with torch.autograd.set_multithreading_enabled(False):
            self.accelerator.backward(loss)
        return loss.detach()

    def _check_later(self, loss: torch.Tensor) -> None:
        """Check that a step's loss is finite; on a GPU when the next step has begun, so that the host never waits."""
        before, step = self._unchecked, self.state.global_step + 1
        if loss.device.type != "cuda":
            _require_finite(step, loss)
            return
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._unchecked = step, copy, arrived
        if before is not None:
            before[2].synchronize()
            _require_finite(before[0], before[1])

    def check_loss(self) -> None:
        """Check the last step's loss, before anything of it is written.

        Raises:
            WorkError: it is not finite.
        """
        before, self._unchecked = self._unchecked, None
        if before is not None:
            before[2].synchronize()
            _require_finite(before[0], before[1])

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer's estimate knows nothing of packs."""
        return 0

    def get_train_dataloader(self) -> "StepLoader":
        """The training examples, a batch for each step, in the order of the seed and the epoch."""
        return self._loader(self.train_dataset, self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> "StepLoader":
        """The examples that were held out, in their order."""
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset, None)

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far."""
        return math.inf if self.state.best_metric is None else self.state.best_metric

    @property
    def ended(self) -> bool:
        """True if no step is left, or early stopping has left it."""
        early = any(isinstance(it, EarlyStopping) and it.reached for it in self.callback_handler.callbacks)
        return early or self.state.global_step >= self.state.max_steps

    def _loader(self, examples: Any, seed: int | None) -> "StepLoader":
        steps = Steps(
            len(examples), self.args.per_device_train_batch_size, seed, self.args.process_index, self.args.world_size
        )
        # A generator of its own: Python's DataLoader draws a number for its workers, which would not be dropout's.
        return StepLoader(examples, batch_sampler=steps, collate_fn=self.data_collator, generator=torch.Generator())

    def save_weights(self, folder: Path) -> None:
        """Write the trainable parameters into a checkpoint."""
        self.check_loss()
        checkpoints.save_weights(self.model, folder, self.best)

    def load_weights(self, folder: Path) -> None:
        """Read them."""
        self.best = checkpoints.load_weights(self.model, folder)

    def restore(self, folder: Path) -> None:
        """Be as after the last step, as the checkpoint in `folder` has it: nothing is left to train."""
        self.load_weights(folder)
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean cross-entropy per label over the validation split, whatever the batches are."""
        model = self.model
        was_training = model.training
        model.eval()
        step = self.state.global_step + 1  # what does not fit here is not tried again there

        def compute() -> torch.Tensor:
            total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for batch in self.get_eval_dataloader():
                for micro in self._micro_batches(batch, step):
                    with computing(micro):
                        total[0] += model(**micro.arguments())["loss"].double()
                    total[1] += len(micro.targets)
            return total

        with torch.inference_mode():
            total = self._within_memory(compute, lambda: None, step)
        model.train(was_training)
        gathered = self.accelerator.reduce(total, "sum")
        loss = (gathered[0] / gathered[1]).item()
        metrics = {"eval_loss": loss}
        self.log(metrics)
        # The loss before the first step is one of no trained adapter.
        if self.keep_best and self.state.global_step and loss < self.best_loss:
            self.best = checkpoints.copy_of_trainable(model)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class StepLoader(torch.utils.data.DataLoader[Any]):
    """A DataLoader of whole steps, which passes the epoch on to them."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that pass over the data."""
        self.batch_sampler.set_epoch(epoch)


def add_up(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients of `parameters`; one that has none counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _require_finite(step: int, loss: torch.Tensor) -> None:
    if not torch.isfinite(loss):
        raise WorkError(f"the loss is {loss.item()} at step {step}: lower training.learning_rate")


class Recorder(TrainerCallback):
    """Writes log.jsonl, marks complete checkpoints, and tells the progress display what it needs.

    Args:
        folder: the run folder.
        trainer: knows how many tokens it has seen, no padding counted.
        display: called with the latest numbers after every step; None for silence.
    """

    def __init__(self, folder: RunFolder, trainer: AdapterTrainer, display: "Any | None" = None) -> None:
        self.folder = folder
        self.trainer = trainer
        self.display = display
        self.started_at = 0.0
        self.losses: list[dict[str, float]] = []

    @property
    def tokens(self) -> int:
        """Tokens that all processes have trained on since this one started, about: they have equal shares."""
        return self.trainer.tokens_seen * self.trainer.accelerator.num_processes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; after a resume, forget the lines that the checkpoint does not know."""
        self.started_at = time.monotonic()
        self.resume(state)

    def resume(self, state: TrainerState) -> None:
        """Take over the lines up to the step of `state`."""
        if state.is_world_process_zero:
            # A run that begins anew measures what comes before its first step again.
            known = self.folder.read_log() if state.global_step else []
            self.losses = [line for line in known if line["step"] <= state.global_step]
            write_text(self.folder.log, "".join(json.dumps(line) + "\n" for line in self.losses))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        seconds = time.monotonic() - self.started_at
        known = {k: v for k, v in (logs or {}).items() if k in ("loss", "eval_loss", "grad_norm", "learning_rate")}
        if not state.is_world_process_zero or not known:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), **known}
        line |= {"seconds": round(seconds, 3), "tokens": self.tokens}
        line |= {"tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1)}
        bad = [k for k, v in known.items() if not math.isfinite(v)]
        if bad:
            raise WorkError(f"{bad[0]} is {known[bad[0]]} at step {state.global_step}: lower training.learning_rate")
        self.losses.append(line)
        append(self.folder.log, json.dumps(line, allow_nan=False) + "\n", flush=True)
        if self.display:
            self.display.log(line)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that the first step has something to learn from."""
        if state.global_step == 0:
            gradients = [p.grad for p in self.trainer.model.parameters() if p.requires_grad and p.grad is not None]
            if not any(bool(gradient.any()) for gradient in gradients):
                raise WorkError(
                    "every gradient of the first step is 0, so that nothing would be learnt: see that the adapter's"
                    " options leave it an effect"
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the progress bar; log the last step, whatever `log_every` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.display and state.is_world_process_zero:
            seconds = time.monotonic() - self.started_at
            self.display.step(state.global_step, self.tokens / max(seconds, 1e-9))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as complete, once all processes have written: only such a one is resumed from."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoints.complete(self.folder, state.global_step, processes.count(), self.trainer.ended)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping; the best adapter is kept by `AdapterTrainer`."""

    @property
    def reached(self) -> bool:
        """True once it has stopped the training."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing: the library's warning is of its own way to keep the best."""


class StopOnSignal(TrainerCallback):
    """Makes the first Ctrl-C (or SIGTERM) save a checkpoint at the end of the step and stop; the second one kills.

    Several processes stop after the same step, a few after the one in which the first of them hears of it.
    """

    _numbers = itertools.count()  # of the trainings, which are the same in every process

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped = False
        self.previous: dict[int, Any] = {}
        self._key = f"stop/{next(self._numbers)}"

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if processes.is_first():
            print("stopping after this step, with a checkpoint (once more to stop at once)", file=sys.stderr)

    def __enter__(self) -> "StopOnSignal":
        try:
            self.previous = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread (a notebook's worker, say): its owner handles signals
            self.previous = {}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask Trainer to save and stop."""
        if state.global_step < state.max_steps and self._is_last(state.global_step):
            self.stopped = control.should_save = control.should_training_stop = True

    def _is_last(self, step: int) -> bool:
        if processes.count() == 1:
            return self.received is not None
        store = processes.shared_store()
        if self.received is not None:
            # A step needs all processes, and each is at most two of them ahead of what it has heard of.
            return step >= int(store.compare_set(self._key, "", str(step + 3)))
        return store.check([self._key]) and step >= int(store.get(self._key))
