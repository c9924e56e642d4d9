"""Readers of data files, one row at a time: .json (a list of objects), .jsonl, .csv, .tsv and .parquet."""

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from llm_adapters.errors import RequestError, first_line
from llm_adapters.tasks.progress import counted

Row = tuple[str, dict[str, Any]]  # its position ("line 3"), and its columns
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

# How a file begins that only stands for another, or is of another kind than its name says.
_MISTAKEN = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, which stands for the file: `git lfs pull` in its repository brings the file itself",
    ),
    (
        b"/annex/objects/",
        "is a git-annex pointer, which stands for the file: `git annex get` brings the file itself",
    ),
    (b"\x1f\x8b", "is compressed (gzip): unpack it"),
    (b"PK\x03\x04", "is a ZIP archive (or a spreadsheet): unpack it, or save it as CSV"),
    (b"<!doctype html", "is a web page: download the file itself"),
    (b"<html", "is a web page: download the file itself"),
)


def check_file(path: Path) -> Path:
    """Tell if `path` is a data file that can be read, without reading it.

    Args:
        path: a .json, .jsonl, .csv, .tsv or .parquet file; ``~`` stands for the home folder.

    Returns:
        The path, with ``~`` replaced.

    Raises:
        RequestError: a missing file, one that cannot be opened, an unknown suffix, or a file that stands for another.
    """
    try:
        file = path.expanduser()
        exists, is_file = file.exists(), file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name; the home of nobody; a null character
        raise RequestError(
            f"the data file {_short(path)!r} cannot be found ({_reason(error)}). Check the path."
        ) from None
    if not exists:
        raise RequestError(f"the data file {str(file)!r} does not exist. Check the path.")
    if not is_file:
        raise RequestError(f"{str(file)!r} is not a file. Name one {_suffixes('or')} file.")
    if file.suffix.lower() not in _READERS:
        raise RequestError(f"{file}: unknown suffix {file.suffix!r}. Data files end in {_suffixes('or')}.")
    try:
        with file.open("rb") as stream:
            head = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({_reason(error)}).") from None
    for beginning, what in _MISTAKEN:
        if head.startswith(beginning.lower()):
            raise RequestError(f"{file} {what}.")
    return file


def read_rows(file: Path) -> Iterator[Row]:
    """Read the rows of a data file in order, each with its position; only one is held at a time (of .json, all are).

    Args:
        file: what `check_file` returned.

    Raises:
        RequestError: the file cannot be read, with the line or row.
    """
    try:
        yield from _READERS[file.suffix.lower()](file)
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({_reason(error)}).") from None


def column_names(file: Path) -> list[str]:
    """Names of the columns of a data file, in the order in which they first occur.

    Args:
        file: what `check_file` returned.

    Raises:
        RequestError: the file cannot be read, or holds no row.
    """
    names: dict[str, None] = {}
    empty = True
    for _, row in counted(read_rows(file), f"looking through {file}"):
        empty = False
        names.update(dict.fromkeys(row))
    if empty:
        raise RequestError(f"{file} is empty: it holds no examples.")
    return list(names)


def delimiter(file: Path) -> str:
    """Character that parts the cells of a .csv or .tsv file: the suffix's, or the one that parts the heading.

    Args:
        file: the file.
    """
    own = "\t" if file.suffix.lower() == ".tsv" else ","
    for _, line in _lines(file):
        counts = {other: _cells(line, other) for other in DELIMITERS}
        return own if counts[own] > 1 else max(counts, key=lambda other: (counts[other], other == own))
    return own


# --- one reader for each suffix


def _read_json(file: Path) -> Iterator[Row]:
    text = _decode(file, file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if not text.strip():
        return
    document = _parse(text, lambda line: f"{file}, line {line}", whole=True)
    if not isinstance(document, list):
        raise RequestError(f"{file} holds one {_json_type(document)}; a list of objects is needed.")
    for number, item in enumerate(document, start=1):
        yield _object(file, f"item {number}", item)


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if line.strip():
            where = f"line {number}"
            yield _object(file, where, _parse(line, lambda _, where=where: f"{file}, {where}"))  # type: ignore[misc]


def _read_csv(file: Path) -> Iterator[Row]:
    between = delimiter(file)
    # Line ends stay in the text as they are: a quoted cell may hold some.
    reader = csv.reader((line + "\n" for _, line in _lines(file)), strict=True, delimiter=between)
    try:
        header = next(reader, [])
        if repeated := [name for at, name in enumerate(header) if name in header[:at]]:
            raise RequestError(f"{file}: two columns have the same name {repeated[0]!r}. Rename one of them.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise RequestError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells under a header of {len(header)} columns."
                )
            yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise RequestError(f"{file}, line {reader.line_num}: not CSV ({error}).") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in _parquet_rows(file, batch, number):
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{file} is not a Parquet file that can be read ({first_line(error)}).") from None


def _parquet_rows(file: Path, batch: Any, before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(len(batch)):
            for name in batch.schema.names:
                with contextlib.suppress(KeyError):
                    try:
                        batch.column(name)[at].as_py()
                    except UnicodeDecodeError:
                        raise RequestError(
                            f"{file}, row {before + at + 1}: column {name!r} is not UTF-8 text. Save it as UTF-8."
                        ) from None
        raise


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".tsv": _read_csv,
}


# --- text and JSON


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    r"""Lines with their numbers, without their ends. Only ``\n`` ends one: JSON may hold U+2028, a cell ``\r``."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, _decode(file, line.removesuffix(b"\n"), number)


def _decode(file: Path, data: bytes, line: int = 1) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise RequestError(f"{file}, line {line}: not UTF-8 text. Save the file as UTF-8.") from None


class _NotJson(Exception):
    """Something that Python's reader takes for JSON and that is none; its text says what."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(f"{name} is no JSON number. Leave the row out, or write null or a text")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _NotJson(f"an object has the name {repeated!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _parse(text: str, place: Callable[[int], str], whole: bool = False) -> Any:
    """JSON value in `text`; `place` gives the words for a line of it."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        hint = " One object per line? Then name it .jsonl." if whole and error.msg == "Extra data" else ""
        raise RequestError(f"{place(error.lineno)}: not JSON ({error.msg}).{hint}") from None
    except _NotJson as error:
        found = re.search(r"(?<![\w\"])-?(?:NaN|Infinity)\b", text) if "is no JSON number" in str(error) else None
        line = text.count("\n", 0, found.start()) + 1 if found else 1
        raise RequestError(f"{place(line)}: not JSON ({error}).") from None
    except RecursionError:
        raise RequestError(f"{place(1)}: not JSON that can be read (lists or objects nested too deeply).") from None
    except ValueError:  # Python reads no integer of more digits
        found = re.search(r"\d{4301,}", text)
        line = text.count("\n", 0, found.start()) + 1 if found else 1
        digits = f"of {len(found[0])} digits" if found else "too long"
        raise RequestError(f"{place(line)}: a number {digits}. Write it as a text, in quotes.") from None


def _object(file: Path, where: str, item: Any) -> Row:
    if not isinstance(item, dict):
        raise RequestError(f"{file}, {where}: a {_json_type(item)} where an object is needed.")
    return where, item


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _cells(line: str, between: str) -> int:
    with contextlib.suppress(csv.Error):
        return len(next(csv.reader(io.StringIO(line), delimiter=between), []))
    return 0


def _suffixes(last: str) -> str:
    *names, final = sorted(_READERS)
    return f"{', '.join(names)} {last} {final}"


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:100]}..."


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or first_line(error)).rstrip(".")
