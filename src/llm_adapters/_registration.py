"""Registers this package's methods with PEFT at the moment PEFT is imported.

``import llm_adapters`` promises that ``PeftModel.from_pretrained`` then knows the methods, and ``llm-adapters --help``
promises an answer within half a second, which rules out importing PEFT (and with it torch) to keep the first promise.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple


class OwnMethod(NamedTuple):
    """A method that this package adds to PEFT.

    Attributes:
        peft_type: its name among PEFT's.
        module: the module that holds its tuner.
        tuner: the tuner's class, which names its key, its configuration class and the prefix of its tensors.
    """

    peft_type: str
    module: str
    tuner: str

    @property
    def prefix(self) -> str:
        """Start of its tensors' names; a test compares it with the tuner's."""
        return f"{self.peft_type.lower()}_"


OWN_METHODS = (
    OwnMethod("BOTTLENECK", "llm_adapters.bottleneck.model", "BottleneckModel"),
    OwnMethod("FUSION", "llm_adapters.fusion.model", "FusionModel"),
)


class _AfterPeft:
    """Finds `peft` as the other finders do, and adds one step after its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # Only now: transformers looks for PEFT (`find_spec`) long before anyone imports it.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register_own_methods()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Register now if PEFT is loaded, else as soon as it is."""
    if "peft" in sys.modules:
        register_own_methods()
    else:
        sys.meta_path.insert(0, _AfterPeft())


def register_own_methods() -> None:
    """Make `OWN_METHODS` known to PEFT, which is loaded; calling it again changes nothing."""
    from llm_adapters.compat.peft import register_method

    for method in OWN_METHODS:
        tuner = getattr(importlib.import_module(method.module), method.tuner)
        register_method(tuner.key, tuner.config_class, tuner)
