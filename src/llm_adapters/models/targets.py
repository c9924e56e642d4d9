"""Options that name parts of a model: whether each name in them is that of some part, in every method of PEFT.

PEFT is content where one name of several matches, and the others then do nothing.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

_CLASSIFIERS = {"classifier", "score"}  # PEFT adds both for classification, whichever the model has


def unmatched(adapted: "PeftModel", config: "PeftConfig") -> list[str]:
    """Tell what `config` names that the adapter on `adapted` does not have.

    Args:
        adapted: the model with the adapter.
        config: the adapter's options as they were given (PEFT fills them in and shortens them).

    Returns:
        A sentence without a full stop for each such name.
    """
    if config.is_prompt_learning:
        return []
    tuner, base = adapted.base_model, adapted.get_base_model()
    adapted_names = list(getattr(tuner, "targeted_module_names", ()))
    modules = list(_modules(base))
    of_model = type(base).__name__
    pools: dict[str, tuple[Iterable[str], str]] = {
        "target_modules": (adapted_names, f"no module of {of_model} that gets an adapter"),
        "feedforward_modules": (adapted_names, f"no module of {of_model} that gets an adapter"),
        "target_parameters": (getattr(tuner, "targeted_parameter_names", ()), f"no parameter of {of_model}"),
        "exclude_modules": (modules, f"no module of {of_model}"),
        "modules_to_save": (modules, f"no module of {of_model}"),
        "trainable_token_indices": (modules, f"no module of {of_model}"),
    }
    found = []
    for option, (pool, what) in pools.items():
        for name in _names(getattr(config, option, None)):
            saved = option == "modules_to_save"
            if not any(full.endswith(name if saved else f".{name}") or full == name for full in pool) and not (
                saved and name in _CLASSIFIERS
            ):
                found.append(f"{option} has {name!r}, which is the name of {what}{_near(name, modules)}")
    for field in dataclasses.fields(config):  # rank_pattern, alpha_pattern, ...
        pattern = getattr(config, field.name)
        if field.name.endswith("_pattern") and isinstance(pattern, Mapping):
            for name in pattern:
                if not any(re.match(rf"(.*\.)?({name})$", module) for module in adapted_names):
                    found.append(f"{field.name} has {name!r}, which matches {pools['target_modules'][1]}")
    return found + _unmatched_layers(config, adapted_names)


def _modules(module: "nn.Module", inside: str = "") -> Iterator[str]:
    """Names of the modules as they were without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, child in module.named_children():
        yield inside + name
        if isinstance(child, BaseTunerLayer):
            child = child.get_base_layer()
        elif isinstance(child, AuxiliaryTrainingWrapper):
            child = child.original_module
        yield from _modules(child, f"{inside}{name}.")


def _names(value: Any) -> list[str]:
    """The names in an option; a single text is a regular expression, of which PEFT says where nothing matches."""
    several = isinstance(value, list | tuple | set | Mapping)
    return sorted(name for name in value if isinstance(name, str)) if several else []


def _near(name: str, modules: Iterable[str]) -> str:
    last = sorted({part for module in modules if not (part := module.rpartition(".")[2]).isdigit()})
    near = difflib.get_close_matches(name.rpartition(".")[2], last, n=3, cutoff=0.5)
    return f" (near it are {', '.join(near)})" if near else f" (its modules end in {', '.join(last[:20])})"


def _unmatched_layers(config: "PeftConfig", adapted_names: Iterable[str]) -> list[str]:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None:
        return []
    there = {int(match[1]) for name in adapted_names if (match := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    missing = [index for index in ([wanted] if isinstance(wanted, int) else wanted) if index not in there]
    return [f"layers_to_transform has {index}, and nothing in such a layer gets an adapter" for index in missing]
