"""The ways a run can end badly, told apart by the command line's exit code; what the system says; parts of messages."""

import errno
import os
import re
from collections.abc import Iterable


class RequestError(ValueError):
    """The request is wrong: an unknown name, a missing file, a value out of range (exit code 2).

    The message is one or two sentences for a person: what was wrong (the value), what is allowed, what to do next.
    """


class WorkError(RuntimeError):
    """The request was fine but the work failed: a download broke, a loss is not finite (exit code 1)."""


class Interrupted(WorkError):
    """A signal stopped the work after a checkpoint; the same request goes on from there (exit code 130)."""


def unknown(kind: str, value: object, allowed: object, hint: str = "") -> RequestError:
    """A `RequestError` that names the offending `value` and lists what is `allowed`.

    Example: ``raise unknown("task", "gsm9k", CATALOG)`` gives
    ``unknown task 'gsm9k': choose one of addsub, aqua, ... Did you mean 'gsm8k'?``
    """
    import difflib

    said = shortened(str(value), 60)
    names = sorted({str(name) for name in allowed})  # type: ignore[attr-defined]
    close = difflib.get_close_matches(said, names, n=3)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join([*close, *(name for name in names if name not in close)])
    return RequestError(f"unknown {kind} {said!r}: choose one of {listed}.{suggestion}{hint}")


def from_system(error: BaseException) -> RequestError | WorkError | None:
    """The sentence for what the operating system refused: a full disk, a name that is too long, too little memory.

    torch and safetensors wrap what the system says in errors of their own; this is the one place that knows them.

    Args:
        error: whatever was raised.

    Returns:
        A `RequestError` where another path helps, a `WorkError` where room or memory does; None for any other error.
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        tried = _TRIED.search(str(error))
        return WorkError(
            f"there is not enough memory{f' ({tried[0]})' if tried else ''}: "
            "take a smaller model, adapter or batch, or close other programs"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home directory"):
        return RequestError("a path begins with ~ and the name of nobody here: check it")  # of Path.expanduser
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve
        return RequestError(f"a path leads through a link to itself: {first_line(error)}")
    found = _system_error(error)
    if found is None:
        return None
    path = found.filename if isinstance(found.filename, str | bytes) else None
    name = (
        "a file"
        if path is None
        else repr(shortened(path if isinstance(path, str) else path.decode("utf-8", "replace")))
    )
    reason = (found.strerror or first_line(found)).lower()
    if found.errno in _FULL:
        return WorkError(
            f"{name} could not be written: {reason}. Make room and give the same command again: "
            "a training or an evaluation goes on from what it has kept"
        )
    if found.errno == errno.ENAMETOOLONG:
        return RequestError(f"{name} cannot be the name of a file or folder: it is too long")
    if found.errno in _PATH:
        return RequestError(f"{name} cannot be used: {reason}. Check the path, or name another")
    return WorkError(f"{name}: {reason}" if path is not None else first_line(found))


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}
_PATH |= {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL}
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|Cannot allocate memory")
_TRIED = re.compile(r"tried to allocate [\d.]+ \w+")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors, tokenizers
_TORCH_WRITER = re.compile("unexpected pos|PytorchStreamWriter failed|write failed|iostream error")  # its zip file


def is_full(error: BaseException) -> bool:
    """True if `error` says, in whoever's words, that the disk is full."""
    found = _system_error(error)
    return found is not None and found.errno in _FULL


def _system_error(error: BaseException) -> OSError | None:
    if isinstance(error, OSError):
        return error
    if code := _RUST_ERROR.search(str(error)):
        return OSError(int(code[1]), os.strerror(int(code[1])))
    torch_writer = isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error))
    inner = error.__cause__ or (error.__context__ if torch_writer else None)
    if inner is not None and (found := _system_error(inner)):
        return found
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if torch_writer else None


def first_line(error: BaseException) -> str:
    """First line of an error's text, to quote inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


# A terminal obeys control characters, and names, questions and answers are other people's.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """`text` with a replacement for each control character but the ends of lines and tabs."""
    return text.translate(_CONTROLS)


def shortened(text: str, length: int = 200) -> str:
    """`text`, or its beginning and ``...`` where it has more than `length` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def some(names: Iterable[str]) -> str:
    """A few of `names` and how many more there are, for a message."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
