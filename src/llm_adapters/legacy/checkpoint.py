"""Common base of the kinds of checkpoints: settings and weights, and how to say what is wrong with them."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapters.adapter_files import ADAPTER_CONFIG
from llm_adapters.errors import RequestError, some

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn


class Checkpoint(ABC):
    """A checkpoint that is right in itself: its settings are understood, its weights complete and of the right shapes.

    Raises `RequestError` from the constructor where that is not so.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], weights: "dict[str, torch.Tensor]") -> None:
        self.folder, self.settings, self.weights = folder, settings, weights

    @abstractmethod
    def check_fit(self, model: "nn.Module") -> None:
        """Raise `RequestError` unless the checkpoint has exactly the weights that it needs on `model`."""

    @abstractmethod
    def config(self) -> "PeftConfig":
        """PEFT's configuration of the converted adapter."""

    @abstractmethod
    def converted(self) -> "dict[str, torch.Tensor]":
        """The weights as PEFT saves them."""

    def common(self) -> dict[str, Any]:
        """The settings that every PEFT configuration has."""
        base = self.setting("base_model_name_or_path", None, str)
        return {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}

    def error(self, what: str) -> RequestError:
        """An error that says what is wrong with this checkpoint."""
        return RequestError(f"the checkpoint {str(self.folder)!r} {what}. Nothing was changed.")

    def number(self, name: str) -> int:
        """The setting `name`, a whole number of at least 1."""
        value = self.setting(name, None, int)
        if value is None or value < 1:
            raise self.error(f"has {name} = {value!r} in {ADAPTER_CONFIG}: a whole number of at least 1 is allowed")
        return value

    def fraction(self, name: str) -> float:
        """The setting `name`, a probability below 1."""
        value = self.setting(name, 0.0, int, float)
        if not 0 <= value < 1:
            raise self.error(f"has {name} = {value!r} in {ADAPTER_CONFIG}: it must be at least 0 and below 1")
        return float(value)

    def setting(self, name: str, default: Any, *kinds: type) -> Any:
        """The setting `name`, which is of one of these kinds; `default` where it is absent or null."""
        value = self.settings.get(name)
        if value is None:
            return default
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kinds) or isinstance(value, bool) or infinite:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise self.error(f"has {name} = {value!r} in {ADAPTER_CONFIG}, where {expected} is expected")
        return value

    def check_keys(self, missing: list[str], unexpected: list[str], where: str = "") -> None:
        """Raise `RequestError` if there are any; `where` names the model, once there is one."""
        if missing:
            raise self.error(f"lacks {len(missing)} weights{where}: {some(missing)}")
        if unexpected:
            raise self.error(f"holds {len(unexpected)} weights that have no place{where}: {some(unexpected)}")

    def check_shape(self, key: str, wanted: tuple[int, ...], where: str = "") -> None:
        """Raise `RequestError` unless the weight `key` has the shape that is `wanted`."""
        found = tuple(self.weights[key].shape)
        if found != wanted:
            raise self.error(f"has a wrong shape{where}: {key} has the shape {found}, and {wanted} is needed")
