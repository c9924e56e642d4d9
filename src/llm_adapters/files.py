"""Files and folders that a reader never finds half written (temporary name, flush, rename), and the cache."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from llm_adapters.errors import RequestError, first_line, shortened

COMPLETE = "complete.json"
# Earlier versions: converted models had the same document under another name, checkpoints an empty file.
_EARLIER_DOCUMENT, _EARLIER_FLAG = "conversion.json", "complete"
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mark_complete(folder: Path, ignore: str = "", **about: Any) -> None:
    """Flush the files in `folder` to disk, then write there that it is complete.

    Args:
        folder: nothing is written to it afterwards.
        ignore: pattern of names of files that do not count.
        about: kept in the mark, beside the size of each file.
    """
    _flush(folder)
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size for file in _files(folder) if not fnmatch(file.name, ignore)
    }
    write_json(folder / COMPLETE, {**about, "sizes": sizes})


def is_complete(folder: Path) -> bool:
    """Tell if `folder` was marked complete, also by an earlier version, and each of its files still has its size."""
    marker = next((folder / name for name in (COMPLETE, _EARLIER_DOCUMENT) if (folder / name).is_file()), None)
    if marker is None:
        return (folder / _EARLIER_FLAG).is_file()
    try:
        sizes = read_json(marker)["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (RequestError, OSError, KeyError, AttributeError):
        return False


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


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in `file`.

    Raises:
        RequestError: the file is missing, cannot be read or holds something else.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _flush(folder: Path) -> None:
    """Flush the files in `folder` to disk; safetensors makes private ones, and the folder is to be shared."""
    for file in _files(folder):
        file.chmod(stat.S_IMODE(file.stat().st_mode) | _shared_mode(0o666))
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _shared_mode(mode: int) -> int:
    """`mode` less the process's umask: tempfile makes private files, and a run folder is to be shared."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask
