"""Target modules: which modules of a model a configuration adapts, and how wide the network is at each."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from llm_adapters import architectures
from llm_adapters._registration import OWN_METHODS
from llm_adapters.bottleneck import prefix
from llm_adapters.bottleneck.config import INSERT_AFTER, INSERT_BEFORE, INSERT_PARALLEL, BottleneckConfig
from llm_adapters.bottleneck.layer import BottleneckLayer
from llm_adapters.bottleneck.wrapper import Placement, Wrapper
from llm_adapters.compat.peft import features
from llm_adapters.errors import RequestError


def placements(model: nn.Module, config: BottleneckConfig) -> dict[str, Placement]:
    """Placement of an adapter at each module that it would adapt; the model is not touched.

    Args:
        model: a transformers decoder, with or without adapters in it.
        config: the adapter's configuration.

    Returns:
        A `Placement` for each module, by its full name in `model`.

    Raises:
        RequestError: as `find_targets` and `check_free` say.
    """
    found = find_targets(model, config)
    check_free(model, found, BottleneckLayer)
    return found


def find_targets(model: nn.Module, config: BottleneckConfig) -> dict[str, Placement]:
    """Placements of `config` in `model`, whatever adapters it has already.

    Raises:
        RequestError: a target matches nothing or is in no known layer; the family cannot be told; or the model would
            bypass the adapted module.
    """
    settings = architectures.text_config(model)
    if getattr(settings, "slow_but_exact", False) and getattr(settings, "pretraining_tp", 1) > 1:
        raise RequestError(
            "the model has slow_but_exact on with pretraining_tp > 1, which bypasses the projections that hold the "
            "adapter: set model.config.slow_but_exact = False"
        )
    if config.target_modules is None:
        found = _sublayers(model, config, settings.hidden_size)
    else:
        found = _named_targets(model, config)
    if config.prefix_length:
        for name in _attention_blocks(model, config):
            shape = prefix.shape_of(name, _unwrapped(model.get_submodule(name)), settings)
            nothing_else = Placement("", settings.hidden_size, settings.hidden_size)
            found[name] = dataclasses.replace(found.get(name, nothing_else), prefix=shape)
    return found


def check_free(model: nn.Module, found: Collection[str], kind: type[Wrapper]) -> None:
    """Refuse targets that a wrapper of the class `kind` cannot take.

    Raises:
        RequestError: a target is inside another, inside or around what an adapter of the model wraps, or is wrapped
            by another kind of adapter.
    """
    for outer in found:
        inner = next((name for name in found if name.startswith(outer + ".")), None)
        if inner:
            raise RequestError(f"target {inner} is inside target {outer}: name one of them")
    for name in found:
        wrapper = next((n for n in _parents(name) if isinstance(model.get_submodule(n), Wrapper)), None)
        if wrapper:
            raise RequestError(
                f"target {name} is inside {wrapper}, which another adapter of this model wraps whole: "
                "adapt the same modules, or load the two adapters on two models"
            )
        target = model.get_submodule(name)
        # Wrapping a block renames what is in it, and an adapter in there could not be saved as it was loaded.
        if isinstance(target, Wrapper) and not isinstance(target, kind):
            raise RequestError(
                f"target {name} already has an adapter of another method ({type(target).__name__}): "
                "load the two adapters on two models"
            )
        if not isinstance(target, kind):
            for part, module in target.named_modules():
                if part and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                    raise RequestError(
                        f"target {name} holds {part}, which another adapter of this model wraps: "
                        "adapt the same modules, or load the two adapters on two models"
                    )


def _sublayers(model: nn.Module, config: BottleneckConfig, hidden_size: int) -> dict[str, Placement]:
    insertion = config.insertion_at("")
    result = {}
    for site in architectures.sites(model, config.placement, config.layers):
        tapped = insertion == INSERT_PARALLEL and site.input != site.output
        result[site.output] = Placement(insertion, hidden_size, hidden_size, site.input if tapped else "")
    return result


def _attention_blocks(model: nn.Module, config: BottleneckConfig) -> list[str]:
    """Attention blocks of the chosen layers: what a layer calls, which may hold the end of the sub-layer."""
    architecture = architectures.architecture_of(model)
    stack, _ = architectures.decoder_layers(model, inside=[architecture.attention.output])
    block = architecture.attention.output.partition(".")[0]
    return [f"{stack}.{site.layer}.{block}" for site in architectures.sites(model, ["attention"], config.layers)]


def _named_targets(model: nn.Module, config: BottleneckConfig) -> dict[str, Placement]:
    targets = config.target_modules
    assert targets is not None
    unmatched = set() if isinstance(targets, str) else set(targets)
    inside: tuple[str, ...] = ("",)
    if config.layers is not None:
        prefix, stack = architectures.decoder_layers(model)
        inside = tuple(f"{prefix}.{architectures.checked_index(i, len(stack))}." for i in config.layers)
    wrappers = [name for name, module in model.named_modules() if isinstance(module, Wrapper)]
    result = {}
    for name, module in model.named_modules():
        if not name or not name.startswith(inside) or any(name.startswith(wrapper + ".") for wrapper in wrappers):
            continue
        if isinstance(targets, str):
            target = targets if re.fullmatch(targets, name) else None
        else:  # of several endings that match, the longest says most
            target = max((t for t in targets if f".{name}".endswith(f".{t}")), key=len, default=None)
        if target is None:
            continue
        unmatched.discard(target)
        insertion = config.insertion_at(target)
        taken, given = _features(name, module, architectures.text_config(model))
        read = given if insertion == INSERT_AFTER else taken
        written = taken if insertion == INSERT_BEFORE else given
        result[name] = Placement(insertion, read, written)
    if unmatched or not result:
        what = ", ".join(sorted(unmatched)) if unmatched else repr(targets)
        raise RequestError(
            f"no module of {type(model).__name__} matches the target {what}{_suggestion(model)}{_wrapped(wrappers)}"
        )
    return result


def _features(name: str, module: nn.Module, settings: Any) -> tuple[int, int]:
    """Numbers of features that a module takes and gives."""
    base = _unwrapped(module)
    if not isinstance(base, nn.Embedding | nn.ModuleList):
        taken, given = features(base)
        if taken is not None and given is not None:
            return taken, given
        if hasattr(settings, "hidden_size") and any(p.dim() > 1 for p in base.parameters()):  # a block of the decoder
            return settings.hidden_size, settings.hidden_size
    raise RequestError(
        f"target {name} is a {type(base).__name__}: an adapter goes on a linear layer or on an attention or MLP block"
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, Wrapper) else module


def _suggestion(model: nn.Module) -> str:
    ours = [f".{method.prefix}" for method in OWN_METHODS]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not any(part in n for part in ours)]
    names = sorted({part for name in linears if (part := name.removesuffix(".base_layer").rpartition(".")[2])})
    return f"; its linear layers end in {', '.join(names[:20])}" if names else ""


def _wrapped(wrappers: list[str]) -> str:
    if not wrappers:
        return ""
    return f" (the inside of {wrappers[0]} and its like belongs to another adapter of this model, which wraps it whole)"


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
