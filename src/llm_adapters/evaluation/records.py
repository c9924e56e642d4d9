"""A record per question, in full: enough to look at every error, to score again, and to go on after an interruption."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llm_adapters.errors import RequestError
from llm_adapters.files import write_text
from llm_adapters.tasks.answers import extract, is_correct
from llm_adapters.tasks.templates import response_of


@dataclass(frozen=True)
class Record:
    """One question and what became of it.

    `index` is its place in the test set. `output` is all that was generated after `prompt`, `extracted` the answer read
    from it (None: no answer). `finished` says that the model ended it within the limit, `tokens` how many it generated.
    `skipped`: the prompt was too long for the model, and nothing was generated. `seen`: the question is in the
    adapter's training data.
    """

    index: int
    question: str
    prompt: str
    output: str
    extracted: float | str | None
    label: str
    correct: bool
    finished: bool
    tokens: int
    skipped: bool = False
    seen: bool = False

    def rescored(self, kind: str, template: str, extraction: str) -> "Record":
        """The same output, read under another rule (see `read_answer`)."""
        extracted = None if self.skipped else read_answer(self.output, kind, template, extraction)
        return dataclasses.replace(self, extracted=extracted, correct=is_correct(extracted, self.label, kind))


def read_answer(output: str, kind: str, template: str, extraction: str) -> float | str | None:
    """The answer of `kind` in what was generated after a prompt of `template`; None where there is none.

    `extraction` is a protocol of `llm_adapters.tasks.answers`. The paper's code reads the text between the first
    ``### Response:``, with which its prompt ends, and the next, whatever else runs on.
    """
    if "paper" in (template, extraction):
        response = response_of(f"### Response:{output}", "paper")
    else:
        response = response_of(output, template)
    return extract(response, kind, extraction)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a JSON line per record, atomically."""
    write_text(path, "".join(_line(record) for record in records))


def read_records(path: Path) -> list[Record]:
    """The records in `path`; `RequestError` names file and line of what is not one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the records {str(path)!r} cannot be read ({error}).") from None
    records = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                records.append(_record(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise RequestError(f"line {number} of {str(path)!r} is not a record ({error}).") from None
    return records


class Journal:
    """The records of an evaluation under way, on disk as they come: an interrupted one goes on where it stopped.

    `settings` is a fingerprint of everything that decides an answer: records of other settings are not taken up.
    Without a `path` nothing is kept.
    """

    def __init__(self, path: Path | None, settings: str):
        self.path, self.settings = path, settings

    def resume(self) -> list[tuple[Record, float]]:
        """The records of an earlier attempt with these settings, each with the seconds that it took."""
        found = self._read()
        if self.path:
            # Written anew: a line that broke off in the middle must not stand before the next one.
            header = json.dumps({"settings": self.settings}) + "\n"
            write_text(self.path, header + "".join(_line(record, seconds) for record, seconds in found))
        return found

    def add(self, record: Record, seconds: float) -> None:
        """Keep one more record; the file is complete up to it when this returns."""
        if self.path:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                stream.write(_line(record, seconds))

    def remove(self) -> None:
        """The evaluation is complete and its records are written: the journal has done its work."""
        if self.path:
            self.path.unlink(missing_ok=True)

    def _read(self) -> list[tuple[Record, float]]:
        found: list[tuple[Record, float]] = []
        if not self.path or not self.path.is_file():
            return found
        header, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(header)["settings"] == self.settings:
                for line in lines:
                    document = json.loads(line)  # the first that is not whole ends it
                    seconds = float(document.pop("seconds"))
                    found.append((_record(document), seconds))
        return found


def _line(record: Record, seconds: float | None = None) -> str:
    document = dataclasses.asdict(record) | ({} if seconds is None else {"seconds": seconds})
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def _record(document: object) -> Record:
    if not isinstance(document, dict):
        raise TypeError("not an object")
    return Record(**document)
