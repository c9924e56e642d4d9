"""Checks of a request to the bottleneck method, each before anything has changed, with a sentence for what is wrong."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from llm_adapters.bottleneck.wrapper import Wrapper
from llm_adapters.compat.peft import NO_ADAPTER
from llm_adapters.errors import RequestError

_CLASSIFIERS = {"classifier", "score"}  # PEFT adds both for classification, whichever the model has
_PEFT_PREFIX = "base_model.model."


def listed(names: Iterable[str]) -> str:
    """Names, for a sentence."""
    return ", ".join(sorted(names)) or "none"


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Refuse a name with which PEFT would mix up this adapter's tensors and the model's own when it saves.

    Raises:
        RequestError: the name has a dot, is `NO_ADAPTER`, or is that of a module or parameter of the model.
    """
    if "." in name or not name:
        raise RequestError(f"the adapter's name {name!r} is empty or has a dot: choose one without")
    taken = {NO_ADAPTER}
    for module in model.modules():
        if not isinstance(module, nn.ModuleDict | nn.ParameterDict):  # these hold the names of other adapters
            taken |= module._modules.keys() | module._parameters.keys()
    if name in taken:
        raise RequestError(
            f"the adapter's name {name!r} is also that of a part of the model, and saved files would be confused: "
            "choose another"
        )


def check_modules_to_save(model: nn.Module, config: PeftConfig, targets: Iterable[str]) -> None:
    """Refuse `modules_to_save` that name nothing, or something in or around what is adapted.

    Raises:
        RequestError: the first such name.
    """
    names = [name for name, _ in model.named_modules()]
    wrapped = {name for name, module in model.named_modules() if isinstance(module, Wrapper)}.union(targets)
    for wanted in config.modules_to_save or ():
        matching = [name for name in names if name.endswith(wanted)]  # as PEFT matches
        if not matching and wanted not in _CLASSIFIERS:
            raise RequestError(f"modules_to_save has {wanted!r}, which no module of {type(model).__name__} is called")
        for saved in matching:
            clash = next(
                (t for t in sorted(wrapped) if f"{t}.".startswith(f"{saved}.") or saved.startswith(f"{t}.")), None
            )
            if clash:
                raise RequestError(
                    f"modules_to_save has {wanted!r}, which matches {saved}, but {clash} gets an adapter: "
                    "one module cannot be inside the other"
                )


def check_keys(state_dict: Mapping[str, Any] | None, prefix: str, targets: Iterable[str]) -> None:
    """Refuse a state dict, given to say which modules are adapted, that names others than the configuration does.

    Raises:
        RequestError: a module of the state dict gets no adapter.
    """
    modules = {key.rsplit(f".{prefix}", 1)[0] for key in state_dict or ()}
    strange = sorted(modules - set(targets))
    if strange:
        raise RequestError(f"the state dict has an adapter at {strange[0]}, the configuration has none there")


def check_checkpoint(model: nn.Module, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the adapter `name` in `model`.

    Args:
        model: the model with the adapter, wrapped by PEFT or not.
        name: the adapter's name.
        tensors: the checkpoint, with the model's keys.

    Raises:
        RequestError: a tensor is missing, is too many, or has another shape.
    """
    own = {
        f"{path}.{attribute}.{key}": parameter
        for path, layer in model.named_modules()
        if isinstance(layer, Wrapper)
        for attribute, container in layer.named_children()
        if attribute != "base_layer"
        for key, parameter in container.named_parameters()
        if key.partition(".")[0] == name
    }
    hint = "it belongs to another configuration or another base model"
    missing = [key for key in own if key not in tensors]
    if missing:
        raise RequestError(f"the checkpoint lacks {len(missing)} of {len(own)} tensors, first {missing[0]}: {hint}")
    everything = model.state_dict().keys()
    extra = [key for key in tensors if not {key, key.removeprefix(_PEFT_PREFIX)} & everything]
    if extra:
        raise RequestError(f"the checkpoint has {len(extra)} tensors too many, first {extra[0]}: {hint}")
    for key, parameter in own.items():
        if tensors[key].shape != parameter.shape:
            found, wanted = tuple(tensors[key].shape), tuple(parameter.shape)
            raise RequestError(f"the checkpoint's tensor {key} has shape {found} instead of {wanted}: {hint}")


def check_adapter_names(names: Any, adapters: Iterable[str], training: bool) -> None:
    """Refuse `adapter_names` that are not a list of the model's adapters, or come while training.

    Raises:
        RequestError: which of these it is.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise RequestError(f"adapter_names is {names!r}: give a list with one adapter's name per sequence")
    if training:
        raise RequestError("adapter_names routes sequences at inference only: call model.eval() first")
    missing = sorted(set(names) - set(adapters) - {NO_ADAPTER})
    if missing:
        raise RequestError(
            f"adapter_names has {', '.join(map(repr, missing))}: "
            f"the model has {listed(adapters)}, and {NO_ADAPTER} for none"
        )


def check_batch(names: list[str], batch: int) -> None:
    """Refuse a list that does not have one name for each of `batch` sequences.

    Raises:
        RequestError: the two numbers.
    """
    if len(names) != batch:
        raise RequestError(f"adapter_names has {len(names)} names for a batch of {batch} sequences: give one for each")


def check_forward(names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the base model that checks `names` against the batch (see `check_batch`)."""
    inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if inputs is None and args:
        inputs = args[0]
    if isinstance(inputs, torch.Tensor):
        check_batch(names, inputs.shape[0])
