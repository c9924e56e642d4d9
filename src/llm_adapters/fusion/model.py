"""The tuner: finds the target modules of the fused adapters in a model and wraps them with fusion layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llm_adapters.adapter_files import read_weights as stored_weights
from llm_adapters.bottleneck.config import INSERT_BEFORE
from llm_adapters.bottleneck.model import BottleneckModel
from llm_adapters.bottleneck.placement import check_free, find_targets
from llm_adapters.errors import RequestError
from llm_adapters.fusion.config import FusionConfig, FusionType
from llm_adapters.fusion.layer import FusionLayer, FusionPlacement

_NESTED = ".fusion_adapters."


class FusionModel(BottleneckModel):
    """Adapter fusion as a PEFT tuner (see `FusionConfig`); the arguments are those of `BottleneckModel`."""

    key = FusionType.FUSION
    config_class = FusionConfig
    prefix = "fusion_"
    tuner_layer_cls = FusionLayer
    _weights: dict[str, dict[str, torch.Tensor]] = {}  # noqa: RUF012  replaced while a fusion is injected

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the fusion, or leave the model as it was and say in one sentence why not."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for name, weights in self._weights.items():
                model.get_submodule(name).fill(adapter_name, weights)
        finally:
            self._weights = {}

    def _find(self, model: nn.Module, config: FusionConfig) -> dict[str, FusionPlacement]:
        found = placements(model, config)
        self._weights = read_weights(config, found)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The checkpoint's key; PEFT looks for the name at the end of the key, and the networks are deeper."""
        start, nested, rest = key.rpartition(_NESTED)
        if nested:
            return start + nested + rest.removeprefix(f"{adapter_name}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


def placements(model: nn.Module, config: FusionConfig) -> dict[str, FusionPlacement]:
    """Placement of a fusion at each module that it would adapt; the model is not touched.

    Args:
        model: a transformers decoder, with or without adapters in it.
        config: the fusion's configuration.

    Returns:
        A `FusionPlacement` for each module, by its full name in `model`.

    Raises:
        RequestError: an adapter fits nowhere in the model, changes a module's input, or is inside another one.
    """
    found: dict[str, dict[str, Any]] = {}
    for index, adapter in enumerate(config.bottlenecks):
        for name, here in find_targets(model, adapter).items():
            if here.insertion == INSERT_BEFORE:
                raise RequestError(
                    f"{_called(config, index)} changes the input of {name} (insertion 'before'), and a fusion weighs "
                    "what is added to outputs: fuse adapters inserted in series, after or parallel"
                )
            found.setdefault(name, {})[str(index)] = here
    check_free(model, found, FusionLayer)
    return {name: FusionPlacement(adapters) for name, adapters in found.items()}


def read_weights(config: FusionConfig, found: Mapping[str, FusionPlacement]) -> dict[str, dict[str, torch.Tensor]]:
    """Read the fused adapters' weights for each module from their folders; nothing where a checkpoint brings them.

    Args:
        config: the fusion's configuration.
        found: its placements by module.

    Returns:
        For each module, the state dict of its `FusionPlacement.networks`.

    Raises:
        RequestError: an adapter's file does not hold exactly the weights that it would have on this model.
    """
    if config.folders is None:
        return {}
    files = [stored_weights(folder) for folder in config.folders]
    result: dict[str, dict[str, torch.Tensor]] = {}
    for module, here in found.items():
        with torch.device("meta"):
            wanted = here.networks(config).state_dict()
        result[module] = {}
        for key, like in wanted.items():
            container, index, *rest = key.split(".")
            stored = ".".join(["base_model.model", module, container, *rest])
            tensor = files[int(index)].pop(stored, None)
            if tensor is None:
                raise RequestError(f"{_called(config, int(index))} does not fit the model: it has no {stored}")
            if tensor.dtype != like.dtype and not tensor.is_floating_point():
                raise RequestError(
                    f"{_called(config, int(index))} does not fit the model: {stored} has type {tensor.dtype} "
                    f"instead of {like.dtype}"
                )
            if tensor.shape != like.shape:
                raise RequestError(
                    f"{_called(config, int(index))} does not fit the model: {stored} has shape {tuple(tensor.shape)} "
                    f"instead of {tuple(like.shape)}"
                )
            result[module][key] = tensor
    for index, left in enumerate(files):
        if left:
            raise RequestError(
                f"{_called(config, index)} does not fit the model: it has {len(left)} tensors too many, "
                f"first {min(left)}"
            )
    return result


def _called(config: FusionConfig, index: int) -> str:
    return f"the adapter {str(config.folders[index])!r}" if config.folders else f"the adapter at position {index}"
