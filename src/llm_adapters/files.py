"""Writing files so that a reader never meets half of one (temporary name, flush, rename), and where the cache is."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    On any error the temporary file is removed and `path` is left as it was. `mode` is ``"w"`` (UTF-8 text, newlines
    written as given) or ``"wb"``.
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
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; a run folder is to be shared
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic(path) as stream:
        stream.write(text)


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write `document` to `path` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def cache_folder(part: str) -> Path:
    """Where `part` of what can be had again is kept: in ``$LLM_ADAPTERS_CACHE``, or the platform's cache folder."""
    import pooch

    return Path(os.environ.get("LLM_ADAPTERS_CACHE") or pooch.os_cache("llm-adapters")).expanduser() / part
