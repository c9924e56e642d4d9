"""Examples and tasks, and the reader of data files (.json, .jsonl, .csv or .parquet)."""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_adapters.errors import RequestError

FIELDS = ("question", "input", "response", "answer")
DEFAULT_COLUMNS = {
    "question": ("question", "instruction", "prompt"),
    "input": ("input",),
    "response": ("response", "output", "completion", "answer"),
    "answer": ("answer", "label"),
}
FORMATS = ("plain", "gsm8k")

Row = tuple[str, dict[str, Any]]  # its position ("line 3"), and its columns


@dataclass(frozen=True)
class Example:
    """One question, in the words of the data; the prompt renderer trims what needs trimming.

    Attributes:
        question: what is asked.
        input: a text that the question is about, empty for none.
        response: the text to train on, empty in test sets.
        answer: the gold label as the data writes it (``"15.0"``, ``"B"``, ``"solution1"``), empty for none.
    """

    question: str
    input: str = ""
    response: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Task:
    """One data set: the source of its bytes, the meaning of its columns, and the kind of its answers.

    A row comes from `url`, from a person's own `file`, or from neither: then the code generates it.

    Attributes:
        name: as on the command line.
        title: as in a table's head.
        kind: what an answer is (`llm_adapters.tasks.answers.KINDS`); ``"text"`` is any other text, or no one kind.
        split: ``"test"`` or ``"train"``.
        size: number of examples; None where that is not known.
        repository: the repository of `url`, as ``owner/name``.
        commit: the commit at which it is pinned.
        path: the file's path in it.
        blob: the git blob id of the file's bytes.
        url: the address of the file.
        local: its place in mirror and cache.
        file: a person's own file.
        columns: maps the fields of `Example` to the file's names.
        format: one of `FORMATS`.
        licence: the licence of the data.
        description: one line on what is in it.
    """

    name: str
    title: str
    kind: str
    split: str = "test"
    size: int | None = None
    repository: str = ""
    commit: str = ""
    path: str = ""
    blob: str = ""
    url: str = ""
    local: str = ""
    file: str = ""
    columns: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    format: str = "plain"
    licence: str = ""
    description: str = ""

    @property
    def embedded(self) -> bool:
        """True where the code itself holds the data."""
        return not (self.url or self.file)


def load_file(
    path: str | os.PathLike[str],
    columns: Mapping[str, str | None] | None = None,
    *,
    required: Iterable[str] = ("response",),
    format: str = "plain",
) -> list[Example]:
    """Read the examples of a .json (a list of objects), .jsonl, .csv or .parquet file, in file order.

    Args:
        path: the file.
        columns: maps ``question``, ``input``, ``response`` and ``answer`` to the file's names for them; None leaves a
            field out. A field not in the map is looked for under its usual names: question or instruction or prompt;
            input; response or output or completion or answer; answer or label.
        required: the fields that must not be empty in any row, beside the question.
        format: ``"gsm8k"`` where the answer column is written as GSM8K's is: worked steps with calculator marks, then
            ``#### 72``.

    Raises:
        RequestError: names the file and the line or row: a missing or unreadable file, an unknown suffix or column, a
            row that is not an object, an empty question or required field.
    """
    file = Path(path).expanduser()
    if format not in FORMATS:
        raise RequestError(f"{format!r} is not a format of data files: choose one of {', '.join(FORMATS)}.")
    rows = read_rows(file)
    needed = {"question", *required}
    names = _resolve(file, columns, rows, needed)
    examples = []
    for where, row in rows:
        values = {field: _text(file, where, name, row.get(name)) for field, name in names.items()}
        if format == "gsm8k":
            values |= _split_gsm8k(file, where, values.get("answer", ""))
        for field in FIELDS:
            if field in needed and not values.get(field, "").strip():
                raise RequestError(
                    f"{file}, {where}: the {field} (column {names[field]!r}) is empty. Fill or remove it."
                )
        examples.append(Example(**values))
    return examples


def read_rows(file: Path) -> list[Row]:
    """Read the rows of a data file.

    Args:
        file: a .json, .jsonl, .csv or .parquet file.

    Returns:
        The rows in order, each with its position; at least one.

    Raises:
        RequestError: a missing, unreadable or empty file, or an unknown suffix.
    """
    if not file.exists():
        raise RequestError(f"the data file {str(file)!r} does not exist. Check the path.")
    if not file.is_file():
        raise RequestError(f"{str(file)!r} is not a file. Name one .json, .jsonl, .csv or .parquet file.")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise RequestError(f"{file}: unknown suffix {file.suffix!r}. Data files end in {', '.join(sorted(_READERS))}.")
    try:
        rows = reader(file)
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror or error}).") from None
    if not rows:
        raise RequestError(f"{file} is empty: it holds no examples.")
    return rows


def _resolve(file: Path, columns: Mapping[str, str | None] | None, rows: list[Row], needed: set[str]) -> dict[str, str]:
    """Names of the columns that hold the fields."""
    present = list(dict.fromkeys(name for _, row in rows for name in row))
    listed = ", ".join(map(repr, present)) or "none"
    columns = columns or {}
    for field in columns:
        if field not in FIELDS:
            raise RequestError(f"unknown field {field!r} in the column map: choose from {', '.join(FIELDS)}.")
    names: dict[str, str] = {}
    for field in FIELDS:
        if field in columns:
            name = columns[field]
            if name is not None and name not in present:
                raise RequestError(f"{file} has no column {name!r} (named for the {field}). Its columns: {listed}.")
        else:
            name = next((usual for usual in DEFAULT_COLUMNS[field] if usual in present), None)
        if name is not None:
            names[field] = name
        elif field in needed:
            raise RequestError(
                f"{file} has no column for the {field}. Its columns: {listed}; name the right one in the column map."
            )
    return names


def _text(file: Path, where: str, name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    raise RequestError(
        f"{file}, {where}: column {name!r} holds a {type(value).__name__}; a text or a number is needed."
    )


def _split_gsm8k(file: Path, where: str, worked: str) -> dict[str, str]:
    """Split a worked answer into its steps without calculator marks, up to ``#### 72``, and the answer alone."""
    _, mark, answer = worked.rpartition("####")
    if not mark:
        raise RequestError(f"{file}, {where}: the answer does not end in '#### NUMBER' as the gsm8k format needs.")
    return {"response": re.sub(r"<<[^<>]*>>", "", worked), "answer": answer.strip()}


def _read_json(file: Path) -> list[Row]:
    text = _decode(file)
    if not text.strip():
        return []
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object per line? Then name it .jsonl." if error.msg == "Extra data" else ""
        raise RequestError(f"{file}, line {error.lineno}: not JSON ({error.msg}).{hint}") from None
    if not isinstance(document, list):
        raise RequestError(f"{file} holds one {_json_type(document)}; a list of objects is needed.")
    return [_object(file, f"item {number}", item) for number, item in enumerate(document, start=1)]


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{file}, line {number}: not JSON ({error.msg}).") from None
        rows.append(_object(file, f"line {number}", item))
    return rows


def _read_csv(file: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_decode(file), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise RequestError(f"{file}: two columns have the same name in the header: {', '.join(header)}.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise RequestError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells under a header of {len(header)} columns."
                )
            rows.append((f"line {reader.line_num}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise RequestError(f"{file}, line {reader.line_num}: not CSV ({error}).") from None
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        items = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise RequestError(f"{file} is not a Parquet file that can be read ({str(error).splitlines()[0]}).") from None
    return [(f"row {number}", item) for number, item in enumerate(items, start=1)]


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{file}, line {line}: not UTF-8 text. Save the file as UTF-8.") from None


def _object(file: Path, where: str, item: Any) -> Row:
    if not isinstance(item, dict):
        raise RequestError(f"{file}, {where}: a {_json_type(item)} where an object is needed.")
    return where, item


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
