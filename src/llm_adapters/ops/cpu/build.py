"""The functions in csrc: what torch does in several passes over memory, in one, on a CPU.

They are compiled by the machine's own C compiler when they are first wanted (a second or two for each precision) and
kept in the cache. Where there is none, `of` says so and everything is done with torch's functions, in more time.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_adapters.errors import WorkError
from llm_adapters.files import cache_folder

SOURCES = Path(__file__).with_name("csrc")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_WIDE = ("-mprefer-vector-width=512",)  # compilers think of the clock of older processors
_EXACT = {  # which argument is float32 in any case
    "rms_norm": 3,
    "rms_norm_backward": 3,
    "cross_entropy": 2,
    "pair": 0,
    "outer": 3,
    "attention": 5,
    "attention_backward": 5,
}
_PRECISIONS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}

off = False  # for tests and benchmarks: do without them
_loaded: dict[torch.dtype, "Kernels | str"] = {}


class Kernels:
    """The compiled functions for one precision.

    Args:
        library: the loaded library.
        dtype: the precision.

    Attributes:
        strip: how many rows products take at a time; 0 where there are none for this precision and processor.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._library, self._dtype = library, dtype
        self._functions: dict[str, Any] = {}
        self.strip = int(library.strip_rows()) if hasattr(library, "strip_rows") else 0

    def call(self, name: str, *arguments: Any) -> None:
        """Call the C function: tensors by address (None: no address), ints as 64 bits, floats as 32.

        Raises:
            TypeError: a floating tensor is not of the precision (but for `_EXACT`), or another not int64.
            ValueError: a tensor is not in one piece, or not on the CPU.
        """
        function, exact = self._functions.get(name) or self._declared(name, arguments), _EXACT.get(name)
        function(
            *(
                self._address(a, torch.float32 if at == exact else self._dtype) if isinstance(a, torch.Tensor) else a
                for at, a in enumerate(arguments)
            )
        )

    def _declared(self, name: str, arguments: Sequence[Any]) -> Any:
        """The C function, told what it takes: the same kinds in every call."""
        kinds = {float: ctypes.c_float, int: ctypes.c_int64, bool: ctypes.c_int64}
        function = getattr(self._library, name)
        function.argtypes = [kinds.get(type(a), ctypes.c_void_p) for a in arguments]
        function.restype = None
        self._functions[name] = function
        return function

    @staticmethod
    def _address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not in one piece")
        if not tensor.is_cpu:
            raise ValueError(f"a tensor on {tensor.device}, where the CPU is needed")
        needed = dtype if tensor.dtype.is_floating_point else torch.int64
        if tensor.dtype != needed:
            raise TypeError(f"a tensor of {tensor.dtype}, where {needed} is needed")
        return tensor.data_ptr()


def of(x: torch.Tensor) -> Kernels | None:
    """The kernels for `x`; None where torch's functions are to be used."""
    if off or x.device.type != "cpu":
        return None
    found = _loaded.get(x.dtype) or _load(x.dtype)
    return found if isinstance(found, Kernels) else None


def why_not(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for this precision on the CPU; None where there are."""
    if off:
        return "turned off"
    found = _loaded.get(dtype) or _load(dtype)
    return found if isinstance(found, str) else None


def _load(dtype: torch.dtype) -> Kernels | str:
    try:
        _loaded[dtype] = Kernels(ctypes.CDLL(str(_compiled(dtype))), dtype)
    except (OSError, WorkError) as error:
        _loaded[dtype] = str(error)
    return _loaded[dtype]


def _compiled(dtype: torch.dtype) -> Path:
    """The library for this precision, from the cache, or compiled now.

    Raises:
        WorkError: it cannot be had here.
    """
    if dtype not in _PRECISIONS:
        raise WorkError(f"there are none for {str(dtype).removeprefix('torch.')}")
    if not sys.platform.startswith("linux"):
        raise WorkError("they are for Linux only")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise WorkError("there is no C compiler (cc, gcc or clang)")
    flags = [*_FLAGS, *(_WIDE if platform.machine() == "x86_64" else ()), *_PRECISIONS[dtype]]
    # A cache may be shared by machines, and what is compiled for one processor does not run on another.
    sources = [file.read_text("utf-8") for file in sorted(SOURCES.glob("*.[ch]"))]
    parts = *sources, os.path.realpath(compiler), *flags, _processor()
    path = cache_folder("kernels") / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # Linked without OpenMP, so that the one that torch has loaded is used, and not a second one beside it.
            _run([compiler, *flags, "-c", str(SOURCES / "kernels.c"), "-o", f"{folder}/kernels.o"])
            _run([compiler, "-shared", f"{folder}/kernels.o", "-o", f"{folder}/kernels.so"])
            os.replace(f"{folder}/kernels.so", path)
    return path


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        raise WorkError("the C compiler took more than two minutes") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise WorkError(f"the C compiler failed: {lines[0]}")


def _processor() -> str:
    """What the kernel says that the processor can do."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
