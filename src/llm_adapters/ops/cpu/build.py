"""Compilation of the functions in csrc by the machine's own C compiler, when they are first used.

It takes a second or two for each precision; the result is kept in the cache.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from llm_adapters.errors import WorkError
from llm_adapters.files import cache_folder

SOURCES = Path(__file__).with_name("csrc")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_WIDE = ("-mprefer-vector-width=512",)  # compilers think of the clock of older processors
_PRECISIONS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library for this precision; else the reason why it is not available."""
    try:
        return ctypes.CDLL(str(compiled(dtype)))
    except (OSError, WorkError) as error:
        return str(error)


def compiled(dtype: torch.dtype) -> Path:
    """The library's file for this precision, from the cache, or compiled now.

    Raises:
        WorkError: it is not available here.
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
    """The instruction sets that the processor has, as the operating system lists them."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
