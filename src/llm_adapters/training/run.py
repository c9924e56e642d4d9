"""`train`: from a recipe to a run folder; nothing is measured here."""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llm_adapters import methods
from llm_adapters.errors import Interrupted, RequestError, WorkError
from llm_adapters.fast_paths import FastPaths
from llm_adapters.files import check_folder, write_json, write_text
from llm_adapters.models import LoadedModel, context_length, load_base, model_config
from llm_adapters.models.insertion import insert
from llm_adapters.models.sources import quiet
from llm_adapters.runs import RunFolder
from llm_adapters.tasks.catalog import load_training_data
from llm_adapters.training import checkpoints, manifest, sizes
from llm_adapters.training.collator import Collator
from llm_adapters.training.data import TrainingData, prepare
from llm_adapters.training.memory import reset_peak_memory
from llm_adapters.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Result of a training run; itself the path of its folder (`os.fspath`), to be loaded or evaluated.

    Attributes:
        folder: the run folder; `folder / "adapter"` is the adapter in PEFT's format.
        manifest: what ran, on what, how fast (manifest.json).
        log: the lines of log.jsonl.
        model: the trained model, in eval mode.
        tokenizer: the base model's tokenizer.
        evaluation: what the recipe's tasks gave (an `Evaluation`), if it names any and they were measured.
    """

    folder: Path
    manifest: dict[str, Any]
    log: list[dict[str, Any]]
    model: "PeftModel" = field(repr=False)
    tokenizer: Any = field(repr=False)
    evaluation: Any = None

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that training took of its device, in tensors; on a CPU, of the process."""
        return self.manifest["peak_memory_bytes"]

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return RunFolder(self.folder).adapter


def train(recipe: Recipe | Mapping[str, Any] | str | Path, output: str | Path, *, progress: bool = True) -> Run:
    """Train the adapter that `recipe` describes and write a run folder; `llm_adapters.train` also measures its tasks.

    Everything that can be wrong with the request is found before anything is written. If `output` holds an interrupted
    run of the same recipe, it goes on from its last checkpoint and ends as if it had never stopped.

    Args:
        recipe: a `Recipe`, nested mappings, or the path of a YAML file.
        output: the run folder; new, empty, or an interrupted run of the same recipe.
        progress: show progress on stderr.

    Returns:
        The `Run`. Its folder holds config.yaml, adapter/, manifest.json and log.jsonl.

    Raises:
        RequestError: the request is wrong.
        Interrupted: a signal stopped the run after a checkpoint.
        WorkError: the work failed (a loss that is not finite, data that is not available).
    """
    from transformers import set_seed

    recipe = load_recipe(recipe)
    folder = RunFolder(output)
    resumes = _check_output(folder, recipe)
    if resumes:
        recipe = recipe.resolved(**folder.read_config())
    methods.check_options(recipe.adapter.method, recipe.adapter.options)
    model_config(recipe.model.name)  # what can be wrong is looked for in the order of what it costs
    examples = load_training_data(recipe.data.train, recipe.data.columns)
    base = load_base(recipe.model.name, dtype=recipe.model.dtype, device=recipe.model.device)
    data = prepare(examples, base.tokenizer, recipe.data, recipe.training.seed, context_length(base.model))
    config = methods.adapter_config(recipe.adapter.method, base.model, **recipe.adapter.options)
    set_seed(recipe.training.seed)  # before the adapter's initial weights are drawn
    model = insert(base.model, config)
    if recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()

    processes = _Processes(base.device.type == "cpu")
    tokens: Any = recipe.training.micro_batch_tokens
    if tokens == "auto":
        tokens = processes.agree(sizes.choose(model, base.device, recipe.training.gradient_checkpointing))
    processes.wait()  # nobody writes before all have looked at the folder
    # What is not in a recipe's text but decides the result: what "auto" came to.
    recipe = recipe.resolved(
        model={"dtype": str(base.dtype).removeprefix("torch.")}, training={"micro_batch_tokens": tokens}
    )
    if processes.first:
        write_text(folder.config, yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
    processes.wait()
    micro_batches = sizes.Sizes(int(recipe.training.micro_batch_tokens), folder.sizes)
    reset_peak_memory(base.device)
    with quiet():
        started = time.monotonic()
        with FastPaths(model, recipe.training.fast_paths) as fast:
            recorder, state = _fit(model, base, data, recipe, micro_batches, folder, resumes, progress, fast)
        _check_finite(model)
        model.eval()
        seconds = time.monotonic() - started
        document = manifest.describe(
            recipe, base, model, data, recorder, state, seconds, fast.report, micro_batches.to_dict()
        )
        if processes.first:
            checkpoints.save_adapter(model, folder.adapter, recipe.data.template)
            write_json(folder.manifest, document)  # last: its presence says that the run is finished
            checkpoints.prune(folder)
    processes.wait()
    return Run(folder.path, document, recorder.losses, model, base.tokenizer)


class _Processes:
    """The processes that train together (torchrun's), of which the first one writes."""

    def __init__(self, cpu: bool) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=cpu)
        self.first = self._state is None or self._state.is_main_process

    def agree(self, value: Any) -> Any:
        """The `value` of the first process, in all."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()


def _check_output(run: RunFolder, recipe: Recipe) -> bool:
    """Tell if `run` holds an interrupted run of this very recipe.

    Raises:
        RequestError: it holds anything else.
    """
    folder = run.path
    check_folder(folder, "the output")
    if not folder.exists():
        return False
    if not any(folder.iterdir()):
        return False
    if not run.config.is_file():
        raise RequestError(f"the output folder {str(folder)!r} is not empty: name a new one")
    if run.finished:
        raise RequestError(
            f"the output folder {str(folder)!r} already holds a finished run: name a new one, or evaluate it"
        )
    if not _is_of(run, recipe):
        raise RequestError(
            f"the output folder {str(folder)!r} already holds another run: name a new one, or give its recipe to go on"
        )
    return True


def _is_of(run: RunFolder, recipe: Recipe) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # an earlier version wrote it, nobody can change that
            before = load_recipe(run.read_config())
    except RequestError:
        return False
    return before == recipe.resolved(**before.to_dict())


def _fit(
    model: "PeftModel",
    base: LoadedModel,
    data: TrainingData,
    recipe: Recipe,
    micro_batches: sizes.Sizes,
    folder: RunFolder,
    resumes: bool,
    progress: bool,
    fast_paths: FastPaths,
) -> tuple[Any, Any]:
    """Run Trainer; returns the recorder and Trainer's final state."""
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from llm_adapters.training.graphs import MicroBatchGraphs
    from llm_adapters.training.progress import TrainingProgress
    from llm_adapters.training.trainer import AdapterTrainer, Recorder, StopOnSignal

    arguments = _arguments(recipe, folder.checkpoints, len(data.train), base.device)
    stop = StopOnSignal()
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(
            base.tokenizer.pad_token_id,
            fast_paths.packs,
            micro_batches.start,
            recipe.training.micro_batch_size,
            base.device,
        ),
        sizes=micro_batches,
        train_dataset=data.train,
        eval_dataset=data.validation or None,
        callbacks=[stop],
    )
    trainer.graphs = MicroBatchGraphs(model, fast_paths, on=recipe.training.cuda_graphs)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if recipe.training.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(recipe.training.early_stopping))
    checkpoint = folder.resume_point() if resumes else None
    if resumes and checkpoint is None and trainer.is_world_process_zero():
        checkpoints.prune(folder)
    if checkpoint:
        logger.warning("going on from %s", checkpoint.name)
    display = TrainingProgress(_steps(recipe, len(data.train))) if progress else None
    recorder = Recorder(folder, trainer, display)
    trainer.add_callback(recorder)
    with display or contextlib.nullcontext(), stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.check_loss()
    fast_paths.report["CUDA graphs"] = trainer.graphs.report
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint: "
            "the same command goes on from there"
        )
    return recorder, trainer.state


def _steps_per_epoch(recipe: Recipe, examples: int) -> int:
    return -(-examples // recipe.training.batch_size)


def _steps(recipe: Recipe, examples: int) -> int:
    return recipe.training.max_steps or -(
        -int(recipe.training.epochs * 1000 * _steps_per_epoch(recipe, examples)) // 1000
    )


def _arguments(recipe: Recipe, output: Path, examples: int, device: Any) -> Any:
    from transformers import TrainingArguments

    t = recipe.training
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if t.batch_size % world:
        raise RequestError(f"training.batch_size is {t.batch_size}: it must be a multiple of the {world} processes")
    per_epoch = _steps_per_epoch(recipe, examples)
    evaluate_every = t.evaluate_every or per_epoch
    # Keeping the best adapter means having saved it, so that both then happen at the same steps.
    save_every = evaluate_every if t.keep_best or t.early_stopping else t.save_every or per_epoch
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        per_device_train_batch_size=t.batch_size // world,
        per_device_eval_batch_size=t.batch_size // world,
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup if t.warmup < 1 else int(t.warmup),
        lr_scheduler_type=t.schedule if t.schedule != "constant" else "constant_with_warmup",
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        seed=t.seed,
        activation_checkpointing=t.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if t.gradient_checkpointing else None,
        logging_steps=t.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.data.validation else "no",
        eval_steps=evaluate_every if recipe.data.validation else None,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        load_best_model_at_end=bool(t.keep_best or t.early_stopping),
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=list(t.trackers) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,  # the collator puts its tensors where they are needed
    )


def _check_finite(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise WorkError(f"the adapter's weight {name} is not finite after training: lower training.learning_rate")
