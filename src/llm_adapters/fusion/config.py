"""The configuration of adapter fusion: which trained adapters it combines."""

import dataclasses
import enum
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from llm_adapters.adapter_files import ADAPTER_CONFIG, find_adapter
from llm_adapters.bottleneck.config import AdapterConfig, BottleneckConfig, BottleneckType, names_in
from llm_adapters.errors import RequestError
from llm_adapters.files import read_json


class FusionType(str, enum.Enum):  # noqa: UP042  PEFT and transformers want a str with `.value`
    """The key under which PEFT's tables know the method (PEFT's own enum is closed to others)."""

    FUSION = "FUSION"


# What decides where a fused adapter goes and what it computes; the rest says how it was trained and by whom.
_DECISIVE = sorted(
    {f.name for f in dataclasses.fields(BottleneckConfig)}
    - {f.name for f in dataclasses.fields(PeftConfig)}
    - {"modules_to_save"}
)


@dataclass
class FusionConfig(AdapterConfig):
    """A learned attention over several trained, frozen series or parallel adapters (Pfeiffer et al. 2021, section 3).

    The adapters may differ in kind, size and target modules. They are read once, when the fusion is created, and
    are part of its checkpoint from then on: loading it needs none of their folders. See `FusionLayer` for what is
    computed.

    Args:
        adapters: the folders of the adapters to fuse (in PEFT's format, or run folders); in a saved configuration, the
            adapters' own configurations, in the order of their weights.
        modules_to_save: further modules to train and save, as in every PEFT method.

    Raises:
        RequestError: no adapter is named, or one is missing, cannot be read or is no bottleneck adapter that stands
            alone.
    """

    adapters: list[Any] = field(default_factory=list)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FusionType.FUSION
        self.target_modules = None  # the adapters say where; PEFT asks every configuration for it
        if self.modules_to_save is not None:
            self.modules_to_save = names_in("modules_to_save", self.modules_to_save)
        # Where the weights of the adapters are; None where they come with the fusion's own checkpoint.
        self.folders: list[Path] | None = None
        given = self.adapters
        if isinstance(given, str | os.PathLike):
            given = [given]
        if not isinstance(given, list | tuple):
            raise RequestError(f"adapters is {given!r}: a list of folders with trained adapters is allowed")
        if not given:
            raise RequestError("adapters is empty: name at least one folder with a trained series or parallel adapter")
        if all(isinstance(adapter, dict) for adapter in given):
            self.adapters = list(given)
        elif all(isinstance(adapter, str | os.PathLike) for adapter in given):
            self.folders = [find_adapter(Path(adapter)) for adapter in given]
            self.adapters = [_read(folder) for folder in self.folders]
        else:
            raise RequestError(f"adapters is {given!r}: a list of folders with trained adapters is allowed")
        # In what is frozen, dropout would only be noise.
        self.bottlenecks = [BottleneckConfig(**{**adapter, "bottleneck_dropout": 0.0}) for adapter in self.adapters]


def _read(folder: Path) -> dict[str, Any]:
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != BottleneckType.BOTTLENECK:
        raise RequestError(
            f"{str(folder)!r} holds a {config.get('peft_type')} adapter: only series and parallel adapters "
            "(BOTTLENECK) can be fused"
        )
    if config.get("modules_to_save"):
        raise RequestError(
            f"the adapter {str(folder)!r} trained whole modules beside it ({', '.join(config['modules_to_save'])}), "
            "which cannot be fused: train it without modules_to_save"
        )
    if config.get("prefix_length"):
        raise RequestError(
            f"the adapter {str(folder)!r} has a prefix (prefix_length {config['prefix_length']}), which cannot be "
            "fused: train it without one"
        )
    return {name: config[name] for name in _DECISIVE if name in config}
