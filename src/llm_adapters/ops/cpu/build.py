"""Compilation of the functions in csrc by the machine's own C compiler, when they are first used.

It takes a second or two for each precision; the result is kept in the cache. What is loaded runs with the user's
rights, so only a file that is theirs, that nobody else can write and that is whole is taken from there.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from llm_adapters.errors import WorkError, first_line
from llm_adapters.files import atomic, cache_folder, private_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_WIDE = ("-mprefer-vector-width=512",)  # compilers think of the clock of older processors
_PRECISIONS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library for this precision; else the reason why it is not available."""
    try:
        return ctypes.CDLL(str(compiled(dtype).resolve()))
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
    name = f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    for folder in _folders():
        with contextlib.suppress(OSError):
            path = folder / name
            if not _is_whole(path):
                _compile([compiler, *flags], path)
            return path
    raise WorkError("there is no folder to keep them in")


def _folders() -> Iterator[Path]:
    """The cache, where it is the user's alone; else a folder of this process."""
    folder = cache_folder("kernels")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_ours(folder):
            yield folder
        else:
            logger.warning(
                "%s can be written by others: kernels are compiled anew (chmod go-w, if it is yours)", folder
            )
    except OSError as error:
        logger.warning("the cache cannot be written, kernels are compiled anew (%s)", first_line(error))
    yield private_folder()


def _is_ours(path: Path) -> bool:
    """True if `path` belongs to this user and nobody else can write to it."""
    status = path.lstat()
    return status.st_uid == os.getuid() and not stat.S_ISLNK(status.st_mode) and not status.st_mode & 0o022


def _is_whole(path: Path) -> bool:
    """True if the library at `path` is ours and what was written there, by its digest beside it."""
    try:
        digest = _digest_file(path)
        if not (_is_ours(path) and _is_ours(digest)):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest.read_text("utf-8")
    except (OSError, ValueError):
        return False


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Linked without OpenMP, so that the one that torch has loaded is used, and not a second one beside it.
        _run([*command, "-c", str(SOURCES / "kernels.c"), "-o", f"{folder}/kernels.o"])
        _run([command[0], "-shared", f"{folder}/kernels.o", "-o", f"{folder}/kernels.so"])
        library = Path(folder, "kernels.so").read_bytes()
    for file, content in ((path, library), (_digest_file(path), hashlib.sha256(library).hexdigest().encode())):
        with atomic(file, "wb") as stream:
            stream.write(content)
        file.chmod(0o600)


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
