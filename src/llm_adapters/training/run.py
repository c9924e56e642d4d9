"""`train`: from a recipe to a run folder; nothing is measured here."""

import contextlib
import dataclasses
import importlib.util
import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llm_adapters import architectures, methods, processes
from llm_adapters.errors import Interrupted, RequestError, WorkError
from llm_adapters.fast_paths import FastPaths
from llm_adapters.files import LOCK, refuse_links, write_json, write_text
from llm_adapters.models import LoadedModel, context_length, load, load_base, model_config
from llm_adapters.models.insertion import insert
from llm_adapters.models.quantization import Quantization, check_method, check_optimizer
from llm_adapters.models.rope import independent_length
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
    asked, folder = load_recipe(recipe), RunFolder(output)
    with contextlib.ExitStack() as held:
        resumes = processes.once(lambda: _open(folder, asked, held))
        return _train(asked, folder, resumes, progress)


def finished_run(recipe: Recipe, output: str | Path) -> Run | None:
    """The finished run of `recipe` in `output`, as `train` returned it; None where there is none."""
    folder = RunFolder(output)
    if not (folder.finished and _is_of(folder, recipe)):
        return None
    processes.once(lambda: checkpoints.prune(folder))  # it may have been killed before it did that
    loaded = load(folder.path, device=recipe.model.device)
    return Run(folder.path, folder.read_manifest(), folder.read_log(), loaded.model, loaded.tokenizer)


def _open(run: RunFolder, recipe: Recipe, held: contextlib.ExitStack) -> bool:
    """Hold the folder of `run` as long as `held` is open; tell if it holds an interrupted run of this very recipe.

    Raises:
        RequestError: it holds anything else, or another process is training in it.
    """
    folder = run.path
    held.enter_context(run.lock())
    refuse_links(run.config, run.adapter, run.manifest, run.log, run.sizes, run.checkpoints, *run.checkpoints.glob("*"))
    if not run.config.is_file():
        checkpoints.clean(run)
        if any(file.name != LOCK for file in folder.iterdir()):
            raise RequestError(f"the output folder {str(folder)!r} is not empty: name a new one")
        return False
    if run.finished:
        if _is_of(run, recipe):
            checkpoints.prune(run)  # it may have been killed before it did that
        raise RequestError(
            f"the output folder {str(folder)!r} already holds a finished run: name a new one, or evaluate it"
        )
    if not _is_of(run, recipe):
        raise RequestError(
            f"the output folder {str(folder)!r} already holds another run: name a new one, or give its recipe to go on"
        )
    checkpoints.clean(run)
    return True


def _is_of(run: RunFolder, recipe: Recipe) -> bool:
    """Tell if the run in the folder is one of `recipe`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # an earlier version wrote it, nobody can change that
            before = load_recipe(run.read_config())
    except RequestError:
        return False
    return before == recipe.resolved(**before.to_dict())


def _train(recipe: Recipe, folder: RunFolder, resumes: bool, progress: bool) -> Run:
    from transformers import set_seed

    if resumes:
        recipe = recipe.resolved(**processes.once(folder.read_config))
    row = methods.check_options(recipe.adapter.method, recipe.adapter.options)
    quantization = Quantization.of(dataclasses.asdict(recipe.model))
    if quantization is not None:
        check_method(row.name, row.peft_type)
        quantization.require()
    check_optimizer(recipe.training.optimizer)
    _check_trackers(recipe)
    model_config(recipe.model.name)  # what can be wrong is looked for in the order of what it costs
    examples = load_training_data(recipe.data.train, recipe.data.columns)
    base = load_base(recipe.model.name, dtype=recipe.model.dtype, device=recipe.model.device, quantization=quantization)
    embeddings = base.model.get_input_embeddings().weight.shape[0]
    seed, context = recipe.training.seed, context_length(base.model)
    data = prepare(examples, base.tokenizer, recipe.data, seed, context, embeddings)
    config = methods.adapter_config(recipe.adapter.method, base.model, **recipe.adapter.options)
    _check_effect(config, base.model)
    set_seed(recipe.training.seed)  # before the adapter's initial weights are drawn
    model = insert(base.model, config)
    _check_trainable(model)
    arguments = _arguments(recipe, folder.checkpoints, len(data.train), base.device)
    if recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()
    start = checkpoints.digest(model)
    if processes.count() > 1:
        set_seed(recipe.training.seed + processes.rank())  # each its own dropout

    if recipe.training.micro_batch_tokens == "auto":
        checkpointing = recipe.training.gradient_checkpointing
        graphs = recipe.training.cuda_graphs and base.device.type == "cuda" and not checkpointing
        tokens = processes.once(lambda: sizes.choose(model, base.device, checkpointing, graphs))
        recipe = recipe.resolved(training={"micro_batch_tokens": tokens})
    recipe = recipe.resolved(model={"dtype": str(base.dtype).removeprefix("torch.")})
    begun = processes.once(lambda: _begin(folder, recipe, base, data, resumes))
    micro_batches = sizes.Sizes(int(recipe.training.micro_batch_tokens), folder.sizes)
    reset_peak_memory(base.device)
    with quiet():
        started = time.monotonic()
        with FastPaths(model, recipe.training.fast_paths) as fast:
            recorder, state = _fit(model, base, data, recipe, arguments, micro_batches, folder, resumes, progress, fast)
        _check_trained(model, start)
        model.eval()
        seconds = time.monotonic() - started

        def finish() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            made = manifest.describe(
                recipe, base, model, data, recorder, state, seconds, fast.report, begun, micro_batches.to_dict()
            )
            weights = base.weights_fingerprint()
            checkpoints.save_adapter(model, folder.adapter, recipe.data.template, weights, base.quantization)
            write_json(folder.manifest, made)  # last: its presence says that the run is finished
            checkpoints.prune(folder)
            return made, recorder.losses

        document, log = processes.once(finish)
    return Run(folder.path, document, log, model, base.tokenizer)


def _begin(run: RunFolder, recipe: Recipe, base: LoadedModel, data: TrainingData, resumes: bool) -> dict[str, Any]:
    """Write the recipe, with what "auto" came to, and the fingerprints of what else decides the result; returns these.

    Raises:
        RequestError: the run is resumed, and was begun with others.
    """
    begun = manifest.fingerprints(base, data)
    if resumes:
        checkpoints.check_begun(run, begun)
    write_text(run.config, yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
    write_json(run.begun, begun)
    return begun


def _check_effect(config: Any, model: Any) -> None:
    """See that no option leaves an adapter without effect, or is obeyed in part."""
    for name, value in vars(config).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in ("lora_alpha", "alpha", "scaling") and value == 0:
            raise RequestError(f"adapter.options.{name} is 0, which takes away all effect of the adapter")
        if "dropout" in name and not 0 <= value < 1:
            raise RequestError(f"adapter.options.{name} is {value}: a probability from 0 to below 1 is allowed")
    if config.is_prompt_learning and config.num_virtual_tokens < 1:
        raise RequestError(f"adapter.options.num_virtual_tokens is {config.num_virtual_tokens}: it must be at least 1")
    if config.is_prompt_learning and config.num_layers != (own := architectures.text_config(model).num_hidden_layers):
        raise RequestError(f"adapter.options.num_layers is {config.num_layers}, and the model has {own}: leave it out")


def _check_trainable(model: "PeftModel") -> None:
    if not any(weight.numel() for weight in checkpoints.trainable(model).values()):
        raise RequestError("the adapter has no trainable parameter: see that its options leave it a size")


def _fit(
    model: "PeftModel",
    base: LoadedModel,
    data: TrainingData,
    recipe: Recipe,
    arguments: Any,
    micro_batches: sizes.Sizes,
    folder: RunFolder,
    resumes: bool,
    progress: bool,
    fast_paths: FastPaths,
) -> tuple[Any, Any]:
    """Run Trainer; returns the recorder and Trainer's final state."""
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from llm_adapters.training.graphs import MicroBatchGraphs
    from llm_adapters.training.progress import TrainingProgress
    from llm_adapters.training.trainer import AdapterTrainer, EarlyStopping, Recorder, StopOnSignal

    t = recipe.training
    checkpoint = processes.once(lambda: checkpoints.latest(folder)) if resumes else None
    arguments.eval_on_start = bool(data.validation) and checkpoint is None
    micro_batch_size = t.micro_batch_size
    if (limit := independent_length(model)) is not None and data.longest > limit:
        micro_batch_size = 1
        told = f"each example alone: the rotary positions depend on the longest row where that is over {limit} tokens"
        fast_paths.report["micro-batches"] = told
        logger.warning("micro-batches: %s", told)
    stop = StopOnSignal()
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(
            base.tokenizer.pad_token_id, fast_paths.packs, micro_batches.start, micro_batch_size, base.device
        ),
        sizes=micro_batches,
        train_dataset=data.train,
        eval_dataset=data.validation or None,
        callbacks=[stop],
    )
    trainer.keep_best = bool(t.keep_best or t.early_stopping)
    trainer.graphs = MicroBatchGraphs(model, fast_paths, on=recipe.training.cuda_graphs)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if t.early_stopping:
        trainer.add_callback(EarlyStopping(t.early_stopping))
    if checkpoint and processes.is_first():
        logger.warning("going on from %s", checkpoint.folder.name)
    if checkpoint and checkpoint.processes != processes.count():
        if processes.is_first():
            logger.warning(
                "%d processes wrote it, and %d go on: the result is the same up to rounding, but for dropout",
                checkpoint.processes,
                processes.count(),
            )
        set_seed(t.seed + checkpoint.step + processes.rank())
    display = TrainingProgress(_steps(recipe, len(data.train))) if progress and processes.is_first() else None
    recorder = Recorder(folder, trainer, display)
    trainer.add_callback(recorder)
    if checkpoint and checkpoint.ended:
        trainer.restore(checkpoint.folder)
        recorder.resume(trainer.state)
    else:
        with display or contextlib.nullcontext(), stop:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
            trainer.check_loss()
    fast_paths.report["CUDA graphs"] = trainer.graphs.report
    if stop.stopped and not trainer.ended:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint: "
            "the same command goes on from there"
        )
    if trainer.best is not None:
        checkpoints.set_trainable(model, trainer.best)
    return recorder, trainer.state


def _steps_per_epoch(recipe: Recipe, examples: int) -> int:
    return -(-examples // recipe.training.batch_size)


def _steps(recipe: Recipe, examples: int) -> int:
    return recipe.training.max_steps or -(
        -int(recipe.training.epochs * 1000 * _steps_per_epoch(recipe, examples)) // 1000
    )


def _warmup_steps(recipe: Recipe, examples: int) -> int:
    """Steps until the peak learning rate, which leave at least one at it.

    Raises:
        RequestError: there are not so many steps.
    """
    steps, warmup = _steps(recipe, examples), recipe.training.warmup
    if warmup < 1:
        return min(math.ceil(steps * warmup), steps - 1)
    if warmup >= steps:
        raise RequestError(
            f"training.warmup is {warmup:g} steps and the run has {steps}, so that the learning rate would never reach "
            "its peak: lower it (below 1, it is the share of all steps)"
        )
    return int(warmup)


def _arguments(recipe: Recipe, output: Path, examples: int, device: Any) -> Any:
    from transformers import TrainingArguments

    t = recipe.training
    per_epoch = _steps_per_epoch(recipe, examples)
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        per_device_train_batch_size=t.batch_size,  # of all processes: the trainer divides it
        optim=t.optimizer,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        adam_epsilon=t.adam_epsilon,
        learning_rate=t.learning_rate,
        warmup_steps=_warmup_steps(recipe, examples),
        lr_scheduler_type=t.schedule if t.schedule != "constant" else "constant_with_warmup",
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        seed=t.seed,
        activation_checkpointing=t.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if t.gradient_checkpointing else None,
        logging_steps=t.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.data.validation else "no",
        eval_steps=t.evaluate_every or per_epoch if recipe.data.validation else None,
        save_strategy="steps",
        save_steps=t.save_every or per_epoch,
        restore_callback_states_from_checkpoint=True,  # early stopping has counted
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=list(t.trackers) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,  # the collator puts its tensors where they are needed
    )


def _check_trackers(recipe: Recipe) -> None:
    for tracker in recipe.training.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise RequestError(f"training.trackers names {tracker}, which is not installed: pip install {tracker}")


def _check_trained(model: Any, start: str) -> None:
    """See that the weights are finite, and not what they were at the `start`."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise WorkError(f"the adapter's weight {name} is not finite after training: lower training.learning_rate")
    if checkpoints.digest(model) == start:
        raise WorkError(
            "no weight of the adapter has changed: see that training.learning_rate is not too small for model.dtype,"
            " and that the adapter's options leave it an effect"
        )
