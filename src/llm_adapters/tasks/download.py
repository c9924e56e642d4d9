"""Files of data sets: from the mirror, the cache, or their address; checked on every read.

A git blob id, ``sha1("blob <size>\\0" + bytes)``, stands for a file's exact bytes, and a git repository gives one for
each of its files.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_adapters.errors import RequestError, WorkError
from llm_adapters.files import atomic, cache_folder
from llm_adapters.tasks.examples import Task

if TYPE_CHECKING:
    from rich.progress import Progress

MIRROR = "LLM_ADAPTERS_MIRROR"


def mirror_folder() -> Path | None:
    """Folder that ``LLM_ADAPTERS_MIRROR`` names, or None where it is not set.

    Raises:
        RequestError: the variable names no folder.
    """
    named = os.environ.get(MIRROR)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise RequestError(f"{MIRROR} names {named!r}, which is not a folder. Correct the variable or unset it.")
    return folder


def blob_id(data: bytes) -> str:
    """Git blob id of some bytes, as ``git hash-object`` prints it (40 hexadecimal digits).

    Args:
        data: all bytes of a file.
    """
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def verify(task: Task, file: Path, remedy: str) -> Path:
    """Compare a file with the blob id that the task pins.

    Args:
        task: the data set.
        file: its file.
        remedy: the end of the error's message, which says what to do.

    Returns:
        `file`.

    Raises:
        WorkError: the bytes are other ones.
    """
    if task.blob and (found := blob_id(file.read_bytes())) != task.blob:
        raise WorkError(
            f"{file} does not hold what {task.name!r} should: git blob id {task.blob} expected, {found} found. {remedy}"
        )
    return file


def present(task: Task) -> Path | None:
    """Find the file of a task that needs no download, and verify it.

    Args:
        task: the data set.

    Returns:
        The person's own file, or that of mirror or cache; None where there is none.

    Raises:
        RequestError: a person's own file does not exist.
        WorkError: its bytes are wrong.
    """
    if task.file:
        if not Path(task.file).is_file():
            raise RequestError(f"the file {task.file!r} of task {task.name!r} does not exist. Correct its `file`.")
        return verify(task, Path(task.file), "Correct the task's `blob`, or restore the file.")
    mirror = mirror_folder()
    if mirror and (mirror / task.local).is_file():
        return verify(task, mirror / task.local, f"Restore the file in the mirror, or unset {MIRROR}.")
    cached = cache_folder("data") / task.local
    if cached.is_file():
        return verify(task, cached, f"To replace it, run: llm-adapters data fetch {task.name}")
    return None


def locate(task: Task) -> Path:
    """Find the file of a task in the mirror, else in the cache, else download it into the cache.

    Its bytes are compared with the catalogue's git blob id on every call.

    Args:
        task: the data set.

    Raises:
        WorkError: the bytes are wrong or the download failed; the message says what to do.
    """
    if file := present(task):
        return file
    with _display(sys.stderr.isatty()) as display:
        return download(task, _Bar(display, task.name))


def download(task: Task, bar: "_Bar | None" = None) -> Path:
    """Fetch the file of a task into the cache, replacing what is there.

    The file appears under its name only once it is complete and its bytes are the right ones.

    Args:
        task: the data set.
        bar: shows the progress.

    Returns:
        The file in the cache.

    Raises:
        WorkError: the download failed, its bytes are wrong, or the cache cannot be written.
    """
    import pooch
    import requests

    target = cache_folder("data") / task.local
    content = io.BytesIO()
    try:
        pooch.HTTPDownloader(progressbar=bar or False, chunk_size=1 << 16)(task.url, content, None)
    except (requests.RequestException, OSError) as error:
        raise WorkError(
            f"the data set {task.name!r} is not on this machine, and fetching it from {task.url} failed "
            f"({type(error).__name__}: {_short(error)}). Run again when the network is there, or set {MIRROR} to a "
            f"folder that holds {task.local}, or place the file by hand at {target}."
        ) from error
    found = blob_id(content.getvalue())
    if found != task.blob:
        raise WorkError(
            f"what {task.url} sent is not the file that {task.name!r} pins: git blob id {task.blob} expected, "
            f"{found} received ({content.tell()} bytes). Nothing was kept: run again, or place the file at {target}."
        )
    try:
        with atomic(target, "wb") as stream:
            stream.write(content.getbuffer())
    except OSError as error:
        reason = error.strerror or error
        raise WorkError(
            f"cannot write {target} ({reason}). Set LLM_ADAPTERS_CACHE to a folder with room for it."
        ) from None
    return target


def _short(error: Exception) -> str:
    """Innermost reason in one line: the outer layers of a connection error repeat the address."""
    while (inner := error.__cause__ or error.__context__) is not None and isinstance(inner, Exception):
        error = inner
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass(frozen=True)
class Fetched:
    """Outcome of fetching one data set.

    Attributes:
        name: the data set.
        status: ``"present"``, ``"fetched"``, ``"embedded"`` or ``"failed"``.
        path: its file; None where there is none.
        reason: the error's message of a failed one.
    """

    name: str
    status: str
    path: Path | None = None
    reason: str = ""


def fetch(tasks: Iterable[Task], *, progress: bool = False, threads: int = 4) -> list[Fetched]:
    """Bring data sets onto this machine; those complete already are left alone.

    A damaged file in the cache is replaced. One failure does not stop the others: look at each `Fetched.status` and
    `Fetched.reason`.

    Args:
        tasks: the data sets.
        progress: show a bar for each download on stderr.
        threads: downloads at a time.
    """
    display = _display(progress)

    def one(task: Task) -> Fetched:
        if task.embedded:
            return Fetched(task.name, "embedded")
        try:
            if path := _present_or_replaceable(task):
                return Fetched(task.name, "present", path)
            return Fetched(task.name, "fetched", download(task, _Bar(display, task.name)))
        except (RequestError, WorkError) as error:
            return Fetched(task.name, "failed", reason=str(error))

    with display, ThreadPoolExecutor(max_workers=threads) as pool:
        return list(pool.map(one, tasks))


def _present_or_replaceable(task: Task) -> Path | None:
    """As `present`, but a damaged file in the cache counts as absent: a person's own files are not ours to replace."""
    mirror = mirror_folder()
    try:
        return present(task)
    except WorkError:
        if task.file or (mirror and (mirror / task.local).is_file()):
            raise
        return None


def _display(visible: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    layout = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*layout, console=Console(stderr=True), disable=not visible)


class _Bar:
    """One line of a rich display, in the form that pooch calls."""

    def __init__(self, display: "Progress", name: str) -> None:
        self._display = display
        self._line = display.add_task(name, total=None)

    @property
    def total(self) -> float | None:
        """Size in bytes; pooch sets it when the answer's head is there."""
        return self._display.tasks[self._line].total

    @total.setter
    def total(self, size: int) -> None:
        self._display.update(self._line, total=size or None)

    def update(self, amount: int) -> None:
        self._display.update(self._line, advance=amount)

    def reset(self) -> None:
        self._display.update(self._line, completed=0)

    def close(self) -> None:
        pass
