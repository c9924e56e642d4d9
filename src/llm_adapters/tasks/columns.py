"""From the columns of a data file to examples: which column is which field, and what becomes of the other columns.

A column that the question may need (a system message, a passage, its options) is used, or refused until the column
map says what it is; one that a response might be (a worked solution) or that holds other texts is told; the rest is
recorded.
"""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_adapters.errors import RequestError, some
from llm_adapters.tasks import conversations, options
from llm_adapters.tasks.examples import Example, Examples
from llm_adapters.tasks.files import check_file, column_names, read_rows
from llm_adapters.tasks.progress import counted

logger = logging.getLogger(__name__)

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "question": ("question", "instruction", "prompt", "problem", "query"),
    "input": ("input", "context"),
    "response": ("response", "output", "completion", "solution", "answer"),
    "answer": ("answer", "label", "answerkey", "target"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "messages": ("messages", "conversations", "conversation"),
    "choices": ("choices", "options"),
}
"""The fields, each with the names of columns under which it is looked for, in any case, the likelier first."""

FIELDS = tuple(USUAL_NAMES)
FORMATS = ("auto", "plain", "gsm8k")

_QUESTION_SIDE = ("question", "input", "system", "history", "messages", "choices")
# Columns of these names hold a part of the question, and no field is sure to be theirs.
_OF_THE_QUESTION = {name for role in _QUESTION_SIDE for name in USUAL_NAMES[role]}
_OF_THE_QUESTION |= {"passage", "document", "documents", "table", "schema", "body", "premise", "hypothesis", "story"}
_OF_THE_QUESTION |= {"article", "paragraph", "image", "images", "audio", "video", "tools", "functions"}
# Columns of these names tell of an example, also where they hold several words.
_ABOUT = {"id", "idx", "index", "uid", "unique_id", "qid", "question_id", "prompt_id", "source", "url", "license"}
_ABOUT |= {
    "licence",
    "split",
    "dataset",
    "subset",
    "topic",
    "subject",
    "category",
    "type",
    "level",
    "difficulty",
    "grade",
}
_ABOUT |= {"author", "date", "title", "metadata", "meta", "lang", "language", "name", "tag", "tags", "model", "score"}


def load_file(
    path: str | os.PathLike[str],
    columns: Mapping[str, str | None] | None = None,
    *,
    required: Iterable[str] = ("response",),
    format: str = "auto",
) -> Examples:
    """Read the examples of a .json (a list of objects), .jsonl, .csv, .tsv or .parquet file, in file order.

    Args:
        path: the file.
        columns: maps fields (``question``, ``input``, ``response``, ``answer``, ``system``, ``history``, ``messages``,
            ``choices``) to the file's names for them. A field not in the map is looked for under its `USUAL_NAMES`;
            None leaves a field out, or declares a column of that name unused.
        required: the fields that must not be empty in any row, beside the question. Where ``"response"`` is none of
            them, columns that only a response needs are nobody's concern; without ``"answer"`` too, none are.
        format: how answers are written: ``"gsm8k"``, as GSM8K's are (worked steps with calculator marks, then
            ``#### 72``); ``"plain"``, as they stand; ``"auto"``, as GSM8K's where they look like it.

    Raises:
        RequestError: names the file and the line or row: a missing or unreadable file, an unknown suffix or column, a
            row that is not an object, an empty question or required field, a column that the question may need.
    """
    if format not in FORMATS:
        raise RequestError(f"{format!r} is not a format of data files: choose one of {', '.join(FORMATS)}.")
    file = check_file(Path(path))
    needed = {"question", *required}

    def read(names: list[str]) -> Examples:
        return _Reader(file, _layout(file, columns or {}, names, needed), needed, format).read(set(names))

    # Most files have the columns of their first row alone, and need not be looked through for others.
    with contextlib.suppress(RequestError):
        for _, first in read_rows(file):
            return read(list(first))
    return read(column_names(file))


@dataclass(frozen=True)
class _Layout:
    """What each column of a file is.

    Attributes:
        names: the column of each field that has one.
        options: the columns that hold one option each, with its label.
        unused: the columns that are left.
        declared: those of them that the column map declares unused.
        replaced: usual names of fields for which the map names another column.
    """

    names: dict[str, str]
    options: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    declared: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()


def _layout(file: Path, columns: Mapping[str, str | None], present: list[str], needed: set[str]) -> _Layout:
    listed = ", ".join(map(repr, present))
    for name, column in columns.items():
        if name not in FIELDS and (column is not None or name not in present):
            raise RequestError(f"unknown field {name!r} in the column map: choose from {', '.join(FIELDS)}.")
        if column is not None and column not in present:
            raise RequestError(f"{file} has no column {column!r} (named for the {name}). Its columns: {listed}.")
    given: dict[str, str] = {}
    for name, column in columns.items():
        other = given.setdefault(column, name) if column is not None else name
        if other != name and {other, name} != {"response", "answer"}:
            raise RequestError(
                f"the column map gives {column!r} to {other} and to {name}: only response and answer may share one."
            )
    declared = {name for name, column in columns.items() if column is None}
    declared |= {usual for name in declared & set(FIELDS) for usual in USUAL_NAMES[name]}
    names = {name: column for name, column in columns.items() if column is not None}
    mapped = set(names.values())
    for name in FIELDS:
        if name not in columns and (column := _usual(name, present, mapped)):
            names[name] = column
    if "messages" in names and "messages" not in columns:
        if {"question", "response"} <= set(names):
            del names["messages"]
        else:  # a conversation holds them all
            names = {name: column for name, column in names.items() if name in ("messages", "system", "answer")}
    if "messages" not in names:
        _check_needed(file, names, needed, present)
    named = "choices" in names or "choices" in columns
    of_options = {} if named else options.columns_of(present, set(names.values()))
    used = {*names.values(), *of_options}
    unused = tuple(name for name in present if name not in used)
    quiet = USUAL_NAMES["question"] if "messages" in names else ()
    folded = frozenset(name for name in unused if name in declared or _fold(name) in {*declared, *quiet})
    replaced = frozenset(usual for name in columns if name in FIELDS for usual in USUAL_NAMES[name])
    return _Layout(names, of_options, unused, folded, replaced)


def _usual(field: str, present: list[str], taken: set[str]) -> str | None:
    """The column that has a usual name of `field`, unless the map has given it to another field."""
    for usual in USUAL_NAMES[field]:
        for name in sorted(present, key=lambda name: name != usual):  # the very name before one in capitals
            if _fold(name) == usual and name not in taken:
                return name
    return None


def _check_needed(file: Path, names: dict[str, str], needed: set[str], present: list[str]) -> None:
    missing = [name for name in FIELDS if name in needed and name not in names]
    if not missing:
        return
    free = [name for name in present if name not in names.values()]
    guess = dict(zip(missing, [*free, "COLUMN", "COLUMN"], strict=False))
    raise RequestError(
        f"{file} has no column for the {' and the '.join(missing)}. Its columns: {', '.join(map(repr, present))}. "
        f"{how_to_name(guess)}"
    )


def how_to_name(columns: Mapping[str, str | None]) -> str:
    """Sentence that shows what to type so that `columns` are taken for these fields."""
    text = ", ".join(f"{name}: {'null' if column is None else _quoted(column)}" for name, column in columns.items())
    return (
        f"Say which is which in the column map, such as --data.columns '{{{text}}}' (`columns: {{{text}}}` in a task "
        "file)."
    )


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[^\W\d][\w-]*", name) else f'"{name}"'


class _Reader:
    """Turns the rows of one file into examples, and collects what there is to say of them."""

    def __init__(self, file: Path, layout: _Layout, needed: set[str], format: str) -> None:
        self.file, self.layout, self.needed, self.format = file, layout, needed, format
        self.marked = 0
        self.texts: dict[str, str] = {}  # unused columns that hold texts, each with the first

    def read(self, columns: set[str]) -> Examples:
        """The examples; a row with another column than `columns` is an error."""
        examples = Examples(self.layout.names, self.layout.unused)
        watched = [name for name in self.layout.unused if name not in self.layout.declared]
        if "response" not in self.needed:
            watched = [name for name in watched if _fold(name) in _OF_THE_QUESTION] if "answer" in self.needed else []
        for where, row in counted(read_rows(self.file), f"reading {self.file}"):
            if not row.keys() <= columns:
                raise RequestError(f"{self.file}, {where}: a column that no row before had.")
            example = self._example(where, row)
            for name in watched:
                if not _empty(value := row.get(name)):
                    self._unused(where, name, value)
                    watched = [other for other in watched if other != name]
            try:
                examples.append(example)
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"{self.file}, {where}: a text holds half of a character ({error.object[error.start]!r}). "
                    "Write the whole character, or take it out."
                ) from None
        examples.notes += self._notes()
        for note in examples.notes:
            logger.warning("%s", note)
        return examples

    def _example(self, where: str, row: dict[str, Any]) -> Example:
        names = self.layout.names
        if "messages" in names:
            example = self._conversation(where, row)
        else:
            values = {name: self._text(where, names[name], row.get(names[name])) for name in _TEXTS if name in names}
            example = Example(**values, history=self._history(where, row))
        example = self._worked(where, example)
        if self.layout.options or "choices" in names:
            example = self._with_choices(where, row, example)
        for name in ("question", "response", "answer"):
            if name in self.needed and not getattr(example, name).strip():
                column = names.get(name) or names.get("messages")
                raise RequestError(f"{self.file}, {where}: the {name} (column {column!r}) is empty. Fill or remove it.")
        return example

    def _text(self, where: str, name: str, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise RequestError(f"{self.file}, {where}: column {name!r} holds {value}, which is no number.")
            return str(value)
        raise RequestError(
            f"{self.file}, {where}: column {name!r} holds a {type(value).__name__}; a text or a number is needed."
        )

    # --- conversations

    def _conversation(self, where: str, row: dict[str, Any]) -> Example:
        name = self.layout.names["messages"]
        turns = conversations.read_messages(row.get(name), f"{self.file}, {where}: column {name!r}")
        answer = self.layout.names.get("answer")
        label = self._text(where, answer, row.get(answer)) if answer else ""
        return conversations.as_example([*self._system(where, row, turns), *turns], label, f"{self.file}, {where}")

    def _history(self, where: str, row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        name = self.layout.names.get("history")
        turns = conversations.read_history(row.get(name), f"{self.file}, {where}: column {name!r}") if name else []
        return (*self._system(where, row, turns), *turns)

    def _system(self, where: str, row: dict[str, Any], turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        name = self.layout.names.get("system")
        text = self._text(where, name, row.get(name)) if name else ""
        if text.strip() and any(role == "system" for role, _ in turns):
            raise RequestError(
                f"{self.file}, {where}: there are two system messages, one in column {name!r}. Leave one out, with "
                f"--data.columns '{{system: null}}' that one."
            )
        return [("system", text)] if text.strip() else []

    # --- answers as GSM8K writes them

    def _worked(self, where: str, example: Example) -> Example:
        """`example` with a worked answer's steps and number apart, and without calculator marks."""
        name = self.layout.names.get("answer")
        looks_like_it = _ENDS_IN_MARK.search(example.response or example.answer)
        if self.format == "plain" or (self.format == "auto" and not looks_like_it):
            return example
        worked = example.answer if self.format == "gsm8k" or not example.response else example.response
        _, mark, answer = worked.rpartition("####")
        if not mark:
            raise RequestError(
                f"{self.file}, {where}: the answer does not end in '#### NUMBER' as the gsm8k format needs."
            )
        steps = _CALCULATOR_MARK.sub("", worked)
        self.marked += steps != worked or self.format == "auto"
        own_label = name is not None and name != self.layout.names.get("response")
        label = example.answer if own_label and self.format == "auto" and example.answer != worked else answer.strip()
        return replace(example, response=steps, answer=label)

    # --- options

    def _with_choices(self, where: str, row: dict[str, Any], example: Example) -> Example:
        """`example` with its options after the question, unless the question shows them already."""
        name = self.layout.names.get("choices")
        if name is None:
            columns = {label: row.get(column) for column, label in self.layout.options.items()}
            value: Any = {label: text for label, text in columns.items() if not _empty(text)}
        else:
            value = row.get(name)
        if _empty(value):
            return example
        choices = {} if isinstance(value, str) else options.read(value, f"{self.file}, {where}: column {name!r}")
        names = self.layout.names
        gold = row.get(names.get("answer", ""))
        answer = options.label_of(example.answer, gold, choices, value)
        question = options.with_choices(example.question, value if isinstance(value, str) else choices)
        # A position is no response: the prompt shows letters.
        is_position = isinstance(gold, int) and names.get("response") == names.get("answer")
        return replace(example, question=question, answer=answer, response=answer if is_position else example.response)

    # --- what is not used

    def _unused(self, where: str, name: str, value: Any) -> None:
        if _fold(name) in _OF_THE_QUESTION - self.layout.replaced:
            use = "input" if "input" not in self.layout.names else "question"
            raise RequestError(
                f"{self.file}, {where}: the column {name!r} is not used, and the question may need it. "
                f"{how_to_name({use: name})} `{{{_quoted(name)}: null}}` declares it unused."
            )
        if isinstance(value, str) and len(value.split()) > 1 and _fold(name) not in _ABOUT:
            self.texts[name] = value

    def _notes(self) -> list[str]:
        notes = []
        if self.texts:
            known = next((name for name in self.texts if _fold(name) in USUAL_NAMES["response"]), None)
            shown = {"response": known} if known else {"input": next(iter(self.texts))}
            unused = some(map(repr, self.texts))
            notes.append(f"{self.file}: texts in columns that are not used: {unused}. {how_to_name(shown)}")
        if self.marked and self.format == "auto":
            notes.append(
                f"{self.file}: {self.marked} answers are as GSM8K's are ('#### 7' at the end): calculator marks "
                "(<<1+2=3>>) are taken out and the number is the label, as in gsm8k-train."
            )
        return notes


_TEXTS = ("question", "input", "response", "answer")
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_ENDS_IN_MARK = re.compile(r"^#### ?\S[^\n]{0,40}\s*\Z", re.MULTILINE)


def _empty(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | dict) and not value)
    )


def _fold(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")
