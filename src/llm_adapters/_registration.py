"""Registers this package's methods with PEFT at the moment PEFT is imported.

``import llm_adapters`` promises that ``PeftModel.from_pretrained`` then knows the methods, and ``llm-adapters --help``
promises an answer within half a second, which rules out importing PEFT (and with it torch) to keep the first promise.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


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
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Register now if PEFT is loaded, else as soon as it is."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    for method in ("bottleneck", "fusion"):
        importlib.import_module(f"llm_adapters.{method}")
