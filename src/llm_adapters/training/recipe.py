"""The recipe: typed dataclasses that are the YAML schema, the command line's options and the record of what ran."""

import dataclasses
import importlib.util
import sys
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_adapters.compat.jsonargparse import Count, Decay, NotNegative, Positive, Seed
from llm_adapters.documents import fits, read_yaml
from llm_adapters.errors import RequestError, shortened, unknown
from llm_adapters.tasks.answers import ProtocolName
from llm_adapters.tasks.templates import TemplateName

# Keys and values of earlier versions, and their present names.
_RENAMED_KEYS = {("training", "accelerate"): "fast_paths"}
_LEFT_OPEN = {"device"}  # keys whose "auto" is chosen anew by a run that is resumed
_RENAMED_VALUES = {("data", "too_long"): {"cut": "truncate"}}


@dataclass
class ModelSettings:
    """The frozen base model.

    Attributes:
        name: a local folder, the short name smollm2-135m, or a hub id.
        dtype: precision of the base; auto is bfloat16 where the hardware multiplies it natively, else float32. float16
            is for evaluation alone.
        device: where to train; auto takes an accelerator if there is one.
        quantization: store the frozen weights in fewer bits, nf4 (QLoRA) or int8; null for dtype, in which everything
            is computed in any case.
        double_quantization: with nf4, quantise the scales too, which saves 0.4 bits a weight.
    """

    name: str = "smollm2-135m"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantization: Literal["nf4", "int8"] | None = None
    double_quantization: bool = True


@dataclass
class AdapterSettings:
    """The adapter that is trained.

    Attributes:
        method: series, parallel, scaled-parallel, mam, fusion, lora, dora, rslora, ia3, prefix, prompt, p-tuning, or
            PEFT's name.
        options: the method's own options, by PEFT's names; what is left out comes from the method's row.
    """

    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSettings:
    """The data that it is trained on.

    Attributes:
        train: a training set of the catalogue (see `llm-adapters data list`) or a .json, .jsonl, .csv, .tsv or .parquet
            file.
        columns: for a file, which column holds question, input, response, answer, system, history, messages and
            choices; a column for which null is given is not used. Without a map the usual names are found.
        limit: use so many examples, the first that fit after shuffling with the seed; null for all.
        validation: hold out this many examples, or this share if below 1, to measure the loss on.
        template: the prompt template; it travels with the adapter.
        max_length: the longest example, in tokens.
        too_long: what to do with longer ones: drop them (and say how many), truncate them (which loses their end), or
            error.
        train_on_prompt: whether the prompt's tokens count in the loss too, as in the paper's recipes.
    """

    train: str = "gsm8k-train"
    columns: dict[str, str | None] | None = None
    limit: Count | None = None
    validation: NotNegative = 0
    template: TemplateName = "alpaca"
    max_length: Count = 512
    too_long: Literal["drop", "truncate", "error"] = "drop"
    train_on_prompt: bool = False


@dataclass
class TrainingSettings:
    """The optimisation.

    Attributes:
        epochs: passes over the training data.
        max_steps: stop after so many optimiser steps, whatever `epochs` says; null for no limit.
        batch_size: sequences per optimiser step, over all processes.
        micro_batch_tokens: the most tokens computed at once, which decides memory and speed; the loss does not
            depend on it. auto chooses from the device's memory and the model.
        micro_batch_size: the most sequences computed at once; null for no limit but the tokens.
        optimizer: AdamW, fused into one kernel, with one per operation, with states of 8 bits, or with states that go
            to the host where the device is full, by transformers' names; the last three need bitsandbytes.
        adam_beta1: AdamW's decay of the mean of the gradients.
        adam_beta2: AdamW's decay of the mean of their squares.
        adam_epsilon: what AdamW adds to the root of the latter.
        learning_rate: the peak learning rate of AdamW.
        warmup: steps until the peak; below 1, the share of all steps.
        schedule: what the learning rate does after the peak.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of the adapter's initial weights, the order of the data and dropout.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        fast_paths: compute the same with less work, wherever that is possible (the manifest says where).
        cuda_graphs: on a GPU, capture the passes over packs of round sizes and replay them, at next to no cost to the
            host; where that cannot be, the manifest says why.
        log_every: steps between lines in log.jsonl.
        evaluate_every: steps between measurements of the validation loss; null for once an epoch.
        save_every: steps between checkpoints to resume from; null for once an epoch.
        keep_best: keep the adapter with the lowest validation loss instead of the last one.
        early_stopping: stop after so many validation measurements without an improvement; null for never.
        trackers: report to tensorboard, wandb, mlflow or trackio as well.
    """

    epochs: Positive = 3
    max_steps: Count | None = None
    batch_size: Count = 16
    micro_batch_tokens: Count | Literal["auto"] = "auto"
    micro_batch_size: Count | None = None
    optimizer: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        "adamw_torch_fused"
    )
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_epsilon: Positive = 1e-8
    learning_rate: Positive = 3e-4
    warmup: NotNegative = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    seed: Seed = 42
    gradient_checkpointing: bool = False
    fast_paths: bool = True
    cuda_graphs: bool = True
    log_every: Count = 5
    evaluate_every: Count | None = None
    save_every: Count | None = None
    keep_best: bool = False
    early_stopping: Count | None = None
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=list)


@dataclass
class EvaluationSettings:
    """The tasks that are measured after training.

    Attributes:
        tasks: test sets of the catalogue; none by default.
        limit: the first so many questions of each; null for all.
        protocol: default, strict or paper.
        max_new_tokens: the longest answer, in tokens.
        batch_size: questions answered at once; null chooses.
    """

    tasks: list[str] = field(default_factory=list)
    limit: Count | None = None
    protocol: ProtocolName = "default"
    max_new_tokens: Count = 256
    batch_size: Count | None = None


@dataclass
class Recipe:
    """Everything that decides the result of a training run.

    Attributes:
        model: the frozen base model.
        adapter: the adapter that is trained.
        data: what it is trained on.
        training: how it is trained.
        evaluation: what is measured afterwards.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain mappings, lists and values, for YAML and JSON."""
        return dataclasses.asdict(self)

    def resolved(self, **chosen: dict[str, Any]) -> "Recipe":
        """A copy with what was `chosen` where "auto" was asked for: by section, the values of its keys.

        Of earlier runs the record says it: ``recipe.resolved(**RunFolder(path).read_config())``.
        """
        document = self.to_dict()
        for section, values in document.items():
            for key, value in values.items():
                if value == "auto" and key not in _LEFT_OPEN and chosen.get(section, {}).get(key) is not None:
                    values[key] = chosen[section][key]
        sections = {f.name: f.default_factory for f in dataclasses.fields(self)}
        return Recipe(**{name: sections[name](**values) for name, values in document.items()})  # type: ignore[operator]

    def check(self) -> None:
        """Refuse values that the types allow one by one, and no run can use.

        Raises:
            RequestError: names the key, the value and what is allowed.
        """
        t, d = self.training, self.data
        if self.model.dtype == "float16":
            raise RequestError(
                "model.dtype is float16, in which the gradients of many layers vanish: train in bfloat16, or in "
                "float32 where the hardware has no bfloat16 (auto chooses between them). Evaluation takes float16"
            )
        if d.validation >= 1 and d.validation != int(d.validation):
            raise RequestError(f"data.validation is {d.validation}: a whole number of examples, or a share below 1")
        if d.max_length < 2:
            raise RequestError(f"data.max_length is {d.max_length}: an example has at least 2 tokens")
        if missing := [name for name in t.trackers if importlib.util.find_spec(name) is None]:
            raise RequestError(
                f"training.trackers names {missing[0]}, which is not installed: pip install {missing[0]}"
            )
        _check_options("adapter.options", self.adapter.options)
        for key, on in (
            ("training.keep_best", t.keep_best),
            ("training.early_stopping", t.early_stopping),
            ("training.evaluate_every", t.evaluate_every),
        ):
            if on and not d.validation:
                raise RequestError(f"{key} needs a validation split: set data.validation")


def load_recipe(source: "Recipe | Mapping[str, Any] | str | Path") -> Recipe:
    """A recipe from a YAML file, from nested mappings, or as it is, with types checked and unknown keys refused.

    What earlier versions called otherwise is taken, with a warning that names the present key.

    Raises:
        RequestError: the file is missing or not YAML; a key is unknown or a value has the wrong type.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not _is_file(path):
            raise RequestError(f"no recipe file {shortened(str(path))!r}")
        document = read_yaml(path, "recipe")
    else:
        document = _sections(source) if isinstance(source, Recipe) else source
    if not isinstance(document, Mapping):
        raise RequestError(f"a recipe is a mapping with the keys {', '.join(Recipe.__dataclass_fields__)}")
    document = _upgraded(document)
    _check_keys(document)
    recipe = _typed(document)
    recipe.check()
    return recipe


def _typed(document: Mapping[str, Any]) -> Recipe:
    """A recipe of `document`, whose keys are known, with every value's type checked."""
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    from llm_adapters.compat.jsonargparse import readable

    adapter = document.get("adapter", {})
    options = adapter.get("options", {})
    if not isinstance(options, Mapping):
        raise RequestError(f"adapter.options must be a mapping such as {{r: 8}}, not {shortened(str(options), 60)!r}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    try:
        # What the parser would copy without looking, and what it would take for "not given", is put in afterwards.
        found = parser.parse_object({"recipe": {**document, "adapter": {**adapter, "options": {}}}})
    except (ArgumentError, TypeError, ValueError) as error:
        raise RequestError(f"the recipe is wrong: {readable(error).removeprefix('recipe.')}") from None
    kinds = typing.get_type_hints(Recipe)
    recipe = Recipe(**{name: kind(**_plain(found.recipe[name].as_dict())) for name, kind in kinds.items()})
    recipe.adapter.options = _plain(options)
    return recipe


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _sections(recipe: Recipe) -> dict[str, Any]:
    """Sections of a recipe that was put together in Python, where a section may be a plain mapping."""
    return {
        section.name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        for section in dataclasses.fields(recipe)
        for value in [getattr(recipe, section.name)]
    }


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` in the types that YAML has: the parser's bounded numbers are classes of their own."""
    if depth > _DEEPEST:
        return value  # `_check_options` refuses it
    if isinstance(value, Mapping):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, depth + 1) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


_DEEPEST = 10


def _check_options(key: str, value: Any, depth: int = 0) -> None:
    """Refuse what YAML has no word for, numbers that are not finite, and what is too deep (or holds itself)."""
    if depth > _DEEPEST:
        raise RequestError(f"{shortened(key)} is nested more than {_DEEPEST} deep, or holds itself")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise RequestError(f"{key} has the key {name!r}: keys are texts")
            _check_options(f"{key}.{name}", inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_options(key, inner, depth + 1)
    elif not fits(value, bool | int | float | str | None):
        raise RequestError(
            f"{shortened(key)} is {shortened(str(value), 60)}: a finite number, a text, true, false or null is needed"
        )


def upgraded_options(words: list[str]) -> list[str]:
    """Options of a command line (``--training.accelerate false``) with what earlier versions called otherwise renamed.

    Raises:
        RequestError: a key is given under both of its names.
    """
    found = list(words)
    for (section, old), new in _RENAMED_KEYS.items():
        before, after = f"--{section}.{old}", f"--{section}.{new}"
        names = [word.partition("=")[0] for word in found]
        if before in names:
            _warn_renamed(section, old, new, both=after in names)
            found = [
                after + word.removeprefix(before) if name == before else word
                for name, word in zip(names, found, strict=True)
            ]
    for (section, key), values in _RENAMED_VALUES.items():
        option = f"--{section}.{key}"
        for at, word in enumerate(found):
            name, equals, value = word.partition("=")
            if name == option and equals:
                found[at] = f"{option}={values.get(value, value)}"
            elif at and found[at - 1] == option:
                found[at] = values.get(word, word)
    return found


def _upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document`, where what earlier versions called otherwise has its present name."""
    sections = {
        section: dict(values) if isinstance(values, Mapping) else values for section, values in document.items()
    }
    for (section, old), new in _RENAMED_KEYS.items():
        values = sections.get(section)
        if isinstance(values, dict) and old in values:
            _warn_renamed(section, old, new, both=new in values)
            values[new] = values.pop(old)
    for (section, key), renamed in _RENAMED_VALUES.items():
        values = sections.get(section)
        if isinstance(values, dict) and isinstance(value := values.get(key), str):
            values[key] = renamed.get(value, value)
    return sections


def _warn_renamed(section: str, old: str, new: str, both: bool) -> None:
    if both:
        raise RequestError(f"{section}.{old} is the former name of {section}.{new}: give {section}.{new} alone")
    level, frame = 1, sys._getframe()
    while frame.f_globals.get("__name__", "").partition(".")[0] == "llm_adapters" and frame.f_back:
        level, frame = level + 1, frame.f_back  # to the user's own line, as Python shows no deprecation in a library's
    warnings.warn(f"{section}.{old} is deprecated: write {section}.{new}", DeprecationWarning, stacklevel=level)


def _check_keys(document: Mapping[str, Any]) -> None:
    """Refuse a section or a key that a recipe does not have."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}
    for section, values in document.items():
        if section not in sections:
            raise unknown("section of a recipe", section, sections)
        if not isinstance(values, Mapping):
            raise RequestError(f"the section {section} of the recipe is {values!r}: a mapping of its keys is needed")
        known = [f.name for f in dataclasses.fields(sections[section])]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise unknown(f"key of {section}", key, known)
        hints = typing.get_type_hints(sections[section])
        for key, value in values.items():
            if value is None and type(None) not in typing.get_args(hints[key]):
                raise RequestError(f"{section}.{key} has no value (null): give it one, or leave the line out")
