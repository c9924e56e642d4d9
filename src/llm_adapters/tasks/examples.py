"""Examples, and the tasks that they belong to."""

import dataclasses
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

Message = tuple[str, str]  # its role ("system", "user" or "assistant"), and what it says


@dataclass(frozen=True)
class Example:
    """One question, in the words of the data; the prompt renderer trims what needs trimming.

    Attributes:
        question: what is asked; of a conversation, what the user says last.
        input: a text that the question is about, empty for none.
        response: the text to train on, empty in test sets.
        answer: the gold label as the data writes it (``"15.0"``, ``"B"``, ``"solution1"``), empty for none.
        history: the messages before the question, a system message too.
    """

    question: str
    input: str = ""
    response: str = ""
    answer: str = ""
    history: tuple[Message, ...] = ()

    @property
    def questions(self) -> list[str]:
        """All that the user asks, earlier turns too: what a test set must not hold."""
        return [self.question, *(content for role, content in self.history if role == "user")]


class Examples(Sequence[Example]):
    """Examples of a data set, held as UTF-8 in one buffer: a million of 100 bytes take some 140 MB.

    Attributes:
        columns: for each field that was read, the name of its column.
        unused: the columns that were not read.
        notes: what a person should know of how they were read, each in a sentence.
    """

    def __init__(
        self, columns: Mapping[str, str] | None = None, unused: Sequence[str] = (), notes: Sequence[str] = ()
    ) -> None:
        self.columns, self.unused, self.notes = dict(columns or {}), list(unused), list(notes)
        self._text = bytearray()
        self._ends = array("Q")

    def append(self, example: Example) -> None:
        """Add an example at the end.

        Raises:
            UnicodeEncodeError: one of its texts is no text: it holds half of a character.
        """
        history = json.dumps(example.history, ensure_ascii=False) if example.history else ""
        texts = [example.question, example.input, example.response, example.answer, history]
        encoded = [text.encode() for text in texts]
        self._ends.extend(itertools.accumulate(map(len, encoded), initial=len(self._text)))
        self._ends.pop(-6)
        self._text += b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) // 5

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...

    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        index = range(len(self))[at] * 5
        ends = [self._ends[index - 1] if index else 0, *self._ends[index : index + 5]]
        texts = [self._text[start:end].decode() for start, end in itertools.pairwise(ends)]
        turns = tuple((role, content) for role, content in json.loads(texts[4])) if texts[4] else ()
        return Example(texts[0], texts[1], texts[2], texts[3], turns)

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


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
        format: one of `llm_adapters.tasks.columns.FORMATS`.
        language: the language of questions and answers (one of `llm_adapters.tasks.answers.languages.LANGUAGES`), which
            says how numbers are written; empty where only an answer's own words tell.
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
    language: str = ""
    licence: str = ""
    description: str = ""

    @property
    def embedded(self) -> bool:
        """True where the code itself holds the data."""
        return not (self.url or self.file)
