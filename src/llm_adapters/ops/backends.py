"""The choice of a backend: who computes an operator for a tensor, by its device and precision.

An operator asks for the backend's function of its own name. Where there is none, or it does not take these arguments,
it computes its plain torch reference, which runs on any device:

    if kernel := function("swiglu", gate):
        return kernel(gate, up)
    return functional.silu(gate).mul_(up)

To add a backend, make a folder `ops/NAME` with a module `functions` that has

- functions with the names and signatures of those in `ops/cpu/functions.py`, as many of them as are faster there (those
  that belong together, such as `rms_norm` and `rms_norm_backward`, both or none);
- `unsupported_reason(dtype)`: None, or why the whole backend does not work for this precision here;
- `supports(name, *arguments)`: False for arguments that one of its functions does not take;
- `has_fast_linear(weight)`: True if its `linear` exists for this weight;

and name it in `_BACKENDS` by the type of its device. No operator changes. `tests/ops` checks it: each test there runs
with the backend and with the reference.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

_BACKENDS = {"cpu": "llm_adapters.ops.cpu.functions", "cuda": "llm_adapters.ops.cuda.functions"}

disabled = False  # for tests and benchmarks: compute references only


def for_tensor(x: torch.Tensor) -> Any:
    """The module of the backend's functions for the device and precision of `x`; None for torch's own."""
    name = _BACKENDS.get(x.device.type)
    if disabled or name is None:
        return None
    functions = _module(name)
    return functions if _unsupported_reason(functions, x.dtype) is None else None


def function(name: str, x: torch.Tensor, *arguments: Any) -> Callable[..., Any] | None:
    """The backend's function `name` for `x` and the other arguments that `supports` asks about; None if it has none."""
    functions = for_tensor(x)
    found = getattr(functions, name, None)
    return found if found is not None and functions.supports(name, x, *arguments) else None


def unsupported_reason(dtype: torch.dtype, device: str = "cpu") -> str | None:
    """The reason why there is no backend for this precision on this type of device; None where there is one."""
    if disabled:
        return "turned off"
    name = _BACKENDS.get(device)
    return f"there is none for {device}" if name is None else _unsupported_reason(_module(name), dtype)


def _unsupported_reason(functions: Any, dtype: torch.dtype) -> str | None:
    return functions if isinstance(functions, str) else functions.unsupported_reason(dtype)


@functools.cache
def _module(name: str) -> Any:
    """The backend's functions, or why it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "llm_adapters":
            raise
        return f"{error.name} is not installed"
