"""Files and folders that a reader never finds half written (temporary name, flush, rename), locks, and the cache."""

import atexit
import contextlib
import contextvars
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llm_adapters.errors import RequestError, first_line, shortened

logger = logging.getLogger(__name__)

COMPLETE = "complete"
LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what file systems without locks say
_EARLIER_DOCUMENT = "conversion.json"  # of converted models in earlier versions, with sizes alone
_LONGEST_NAME = 255  # bytes, on the file systems of today


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    On any error the temporary file is removed and `path` is left as it was.

    Args:
        path: the file to write; its folder is made if need be.
        mode: ``"w"`` (UTF-8 text, newlines written as given) or ``"wb"``.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, _shared_mode(0o666))
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path` to fill; on success flush its files to disk and rename it to `path`.

    On any error the temporary folder is removed and `path` is left as it was.

    Args:
        path: the folder to write; nothing is there yet, or an empty folder.
        replace: replace whatever folder is at `path`, unless it is marked complete: then another process was faster,
            and its folder stays.

    Raises:
        OSError: the folder cannot be written, or `path` is not empty and not to be replaced.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(_shared_mode(0o777))
        if replace and is_complete(target):
            return
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        elif target.exists():
            target.rmdir()
        temporary.rename(target)
        _flush_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append(path: str | os.PathLike[str], text: str, flush: bool = False) -> None:
    """Append `text` (UTF-8) to the file `path`, which is no link.

    Args:
        path: the file; made if need be.
        text: whole lines.
        flush: return only when it is on disk.

    Raises:
        OSError: it cannot be written, or is a link.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o666), "ab") as stream:
        stream.write(text.encode())
        stream.flush()
        if flush:
            os.fsync(stream.fileno())


def remove_temporaries(folder: Path, *names: str) -> None:
    """Delete what a killed process has left of writing the files or folders `names` to `folder`; of any, without."""
    for name in names or ("*",):
        for left in folder.glob(f".{name}.*.tmp"):
            remove(left)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, if it is there and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def refuse_links(*paths: Path) -> None:
    """Make sure that none of `paths` is a link: what is written there would land elsewhere.

    Raises:
        RequestError: names the link.
    """
    for path in paths:
        if path.is_symlink():
            raise RequestError(
                f"{str(path)!r} is a link, and nothing is written through it: put a folder in its place."
            )


_held: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar("held", default=frozenset())


@contextlib.contextmanager
def lock(folder: Path, busy: str) -> Iterator[None]:
    """Hold `folder` for this process alone, until the block ends or the process does; it may be taken again inside.

    Args:
        folder: made if need be, and deleted in the end if it was, and is empty.
        busy: what to say where another process holds it.

    Raises:
        RequestError: another process holds it, or it cannot be made (see `check_folder`).
    """
    from filelock import FileLock, Timeout

    where = folder.resolve()
    if where in _held.get():
        yield
        return
    made = _make(folder)
    guard = FileLock(folder / LOCK, blocking=False, mode=_shared_mode(0o666))
    try:
        guard.acquire()
    except Timeout:
        raise RequestError(busy) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): see to it that no other process writes there", folder, error)
    token = _held.set(_held.get() | {where})
    try:
        yield
    finally:
        _held.reset(token)
        if sys.platform == "win32":  # an open file cannot be deleted there
            guard.release()
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # before it is let go of: whoever takes it then sees that it is gone
        guard.release()
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make `folder` and those above it; returns the new ones, the innermost first."""
    check_folder(folder, "the output")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def mark_complete(folder: Path, **about: Any) -> None:
    """Flush the files in `folder` to disk, then write there that it is complete.

    Args:
        folder: nothing is written to it afterwards.
        about: kept in the mark, beside size and SHA-256 of each file.
    """
    _flush(folder)
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": file_digest(file)}
        for file in _files(folder)
        if file.name != COMPLETE
    }
    document = {**about, "files": files}
    write_json(folder / COMPLETE, {**document, "digest": _digest(document)})


def damage(folder: Path, digests: bool = True) -> str | None:
    """What is wrong with a `folder` that should be complete; None if it is as it was when `mark_complete` marked it.

    Args:
        folder: the folder.
        digests: compare each file's SHA-256 too, and not its size alone.
    """
    marker = next((folder / name for name in (COMPLETE, _EARLIER_DOCUMENT) if (folder / name).is_file()), None)
    if marker is None:
        return "it is not complete"
    try:
        document = read_json(marker)
        if digests and document.pop("digest", None) != _digest(document):
            return f"{marker.name} is not what was written"
        files = document.get("files") or {name: {"size": size} for name, size in document["sizes"].items()}
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes and should have {expected['size']}"
            if digests and file_digest(folder / name) != expected.get("sha256"):
                return f"the bytes of {name} are not those that were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (RequestError, OSError, KeyError, TypeError, AttributeError) as error:
        return first_line(error) if isinstance(error, RequestError | OSError) else f"{marker.name} is not whole"
    return None


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def is_complete(folder: Path) -> bool:
    """Tell if `folder` was marked complete, also by an earlier version, and each of its files still has its size."""
    return damage(folder, digests=False) is None


def check_folder(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a folder that could not be made or written to, before any work is done for it; nothing is made.

    Args:
        path: the folder, which need not exist.
        what: what it is for, in the message ("the output").

    Raises:
        RequestError: it or a folder above it is a file or a link to nothing, its name is too long, or it is not ours.
    """
    name = repr(shortened(os.fspath(path)))
    try:
        if b"\0" in os.fsencode(path):
            raise RequestError(f"{what} {name} cannot be a folder: it has a character that no path may have")
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(path).parts):
            raise RequestError(f"{what} {name} cannot be a folder: the name is too long. Name another")
        for place in (Path(path), *Path(path).absolute().parents):
            try:
                place.lstat()
            except FileNotFoundError:
                continue
            if not place.is_dir():
                kind = "a link to nothing" if not place.exists() else "a file"
                raise RequestError(f"{what} {name} cannot be a folder: {str(place)!r} is {kind}. Name another")
            if not os.access(place, os.W_OK | os.X_OK):
                raise RequestError(
                    f"{what} {name} cannot be written: {str(place)!r} is not yours to write to. Name another"
                )
            return
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"{what} {name} cannot be a folder ({reason}). Name another") from None


def load_json(text: str, constants: bool = False) -> Any:
    """Value of a JSON document.

    Args:
        text: the document.
        constants: take NaN and infinity, which are not JSON but stand in configs.

    Raises:
        ValueError: it is not JSON, nested too deeply, or has a number of too many digits or half a character.
    """
    try:
        document = json.loads(text, parse_constant=float if constants else _no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower():  # half of a character, unless the other half follows, can be written nowhere
        json.dumps(document, ensure_ascii=False).encode()
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in `file`.

    Raises:
        RequestError: the file is missing, cannot be read or holds something else.
    """
    try:
        document = load_json(file.read_text(encoding="utf-8"), constants=True)
    except (OSError, ValueError) as error:
        raise RequestError(f"{shortened(str(file))!r} cannot be read ({first_line(error)}).") from None
    if not isinstance(document, dict):
        raise RequestError(f"{str(file)!r} does not hold a JSON object.")
    return document


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic(path) as stream:
        stream.write(text)


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write `document` to `path` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_digest(file: Path) -> str:
    """SHA-256 of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder(part: str) -> Path:
    """Folder for a `part` of what can be made or fetched again: in ``$LLM_ADAPTERS_CACHE`` or the platform's cache."""
    import pooch

    return Path(os.environ.get("LLM_ADAPTERS_CACHE") or pooch.os_cache("llm-adapters")).expanduser() / part


@functools.cache
def private_folder() -> Path:
    """Folder of this process, the user's alone and gone at its end, in place of a cache that cannot be written."""
    folder = tempfile.mkdtemp(prefix="llm-adapters-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _flush(folder: Path) -> None:
    """Flush the files in `folder` to disk; safetensors makes private ones, and the folder is to be shared."""
    for file in _files(folder):
        file.chmod(stat.S_IMODE(file.stat().st_mode) | _shared_mode(0o666))
        # Windows flushes only what is open for writing; elsewhere that may not be allowed.
        with file.open("r+b" if sys.platform == "win32" else "rb") as stream:
            os.fsync(stream.fileno())
    for inside in (*(place for place in folder.rglob("*") if place.is_dir()), folder):
        _flush_folder(inside)


def _flush_folder(folder: Path) -> None:
    """Flush the names of the files in `folder`, on systems that can."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):  # some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _shared_mode(mode: int) -> int:
    """`mode` less the process's umask: tempfile makes private files, and a run folder is to be shared."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask
