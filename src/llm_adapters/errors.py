"""The ways a run can end badly, told apart because the command line's exit code depends on it; parts of messages."""

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

    names = sorted(str(name) for name in allowed)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(str(value), names, n=1)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    return RequestError(f"unknown {kind} {str(value)!r}: choose one of {', '.join(names)}.{suggestion}{hint}")


def first_line(error: BaseException) -> str:
    """First line of an error's text, to quote inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def some(names: Iterable[str]) -> str:
    """A few of `names` and how many more there are, for a message."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
