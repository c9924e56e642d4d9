"""A record per question, in full: enough to look at every error, to score again, and to go on after an interruption."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_adapters.documents import typed
from llm_adapters.errors import RequestError, first_line
from llm_adapters.evaluation.protocols import Protocol
from llm_adapters.evaluation.samples import Sample, vote
from llm_adapters.files import append, load_json, write_text
from llm_adapters.tasks.answers import extract, is_correct
from llm_adapters.tasks.templates import get_template

JOURNALS = ".*.partial.jsonl"  # pattern of their names


def score(
    output: str, label: str, kind: str, *, template: str, protocol: Protocol, language: str = ""
) -> tuple[float | str | None, bool]:
    """Answer in what was generated after a prompt, and its comparison with the gold label.

    This is the one place where an output is scored. A protocol that fixes a template reads a response to that
    template's stop, whatever template the prompt had.

    Args:
        output: all that was generated.
        label: the gold answer, as the data writes it.
        kind: the kind of answer.
        template: the template of the prompt.
        protocol: says how the answer is read.
        language: of the data, where it is known.

    Returns:
        The answer (None where there is none), and True where it is the right one.
    """
    stop = get_template(protocol.template or template).stop
    answer = extract(output, kind, protocol.extraction, stop, language)
    return answer, is_correct(answer, label, kind, protocol.extraction, language)


@dataclass(frozen=True)
class Record:
    """One question and what became of it.

    Attributes:
        index: the question's position in the test set.
        question: the question.
        prompt: what the model was given.
        output: all that was generated after it.
        extracted: the answer read from the output; None where it holds none.
        label: the gold answer.
        correct: the answer is the right one.
        finished: the model ended its output within the limit.
        tokens: number of generated tokens.
        skipped: the prompt was too long for the model, and nothing was generated.
        seen: the question is in the adapter's training data.
        samples: all answers where several were sampled; `output`, `extracted`, `correct` and `finished` are then those
            of the first that gives the majority's answer, and `tokens` are those of all. None without sampling.
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
    samples: list[Sample] | None = None

    def rescored(self, kind: str, *, template: str, protocol: Protocol, language: str = "") -> "Record":
        """Same output, scored again.

        Args:
            kind: the kind of answer.
            template: the template of the prompt.
            protocol: says how the answer is read.
            language: of the data, where it is known.
        """

        def scored(output: str) -> dict[str, Any]:
            answer, correct = score(output, self.label, kind, template=template, protocol=protocol, language=language)
            return {"extracted": answer, "correct": correct}

        if self.samples is None:
            return dataclasses.replace(self, **scored(self.output))
        samples = [dataclasses.replace(sample, **scored(sample.output)) for sample in self.samples]
        return dataclasses.replace(self, **voted(samples, kind, protocol))


def voted(samples: list[Sample], kind: str, protocol: Protocol) -> dict[str, Any]:
    """Fields of the `Record` of a question with several answers, by their majority.

    Args:
        samples: the answers.
        kind: the kind of answer.
        protocol: says how they were read.
    """
    won = samples[vote([sample.extracted for sample in samples], kind, protocol.extraction)]
    tokens = sum(sample.tokens for sample in samples)
    return {field.name: getattr(won, field.name) for field in dataclasses.fields(Sample)} | {
        "samples": samples,
        "tokens": tokens,
    }


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a JSON line per record, atomically.

    Args:
        path: the file; a file of this name is replaced.
        records: in the order of the lines.
    """
    write_text(path, "".join(_line(record) for record in records))


def read_records(path: Path) -> list[Record]:
    """Read what `write_records` wrote.

    Args:
        path: the file.

    Raises:
        RequestError: names the file, and the line of what is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the records {str(path)!r} cannot be read ({first_line(error)}).") from None
    records = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                records.append(_read(Record, line))
            except ValueError as error:
                raise RequestError(f"line {number} of {str(path)!r} is not a record ({error}).") from None
    return records


class Journal:
    """Records of an unfinished evaluation, on disk as they come: an interrupted one goes on where it stopped.

    Args:
        path: the file; None keeps nothing.
        settings: a fingerprint of everything that decides an answer. Records of other settings are not resumed.
    """

    def __init__(self, path: Path | None, settings: str):
        self.path, self.settings = path, settings

    def resume(self) -> list[tuple[Record, float]]:
        """Records of an earlier attempt with these settings, each with the seconds that it took."""
        found = self._read()
        if self.path:
            # Written again: a line that broke off in the middle must not come before the next one.
            header = json.dumps({"settings": self.settings}) + "\n"
            write_text(self.path, header + "".join(_line(record, seconds) for record, seconds in found))
        return found

    def add(self, record: Record, seconds: float) -> None:
        """Keep one more record; the file is complete up to it when this returns.

        Args:
            record: the record.
            seconds: what it took to generate its output.
        """
        if self.path:
            append(self.path, _line(record, seconds))

    def remove(self) -> None:
        """Delete the file: the evaluation is complete and its records are written."""
        if self.path:
            self.path.unlink(missing_ok=True)

    def _read(self) -> list[tuple[Record, float]]:
        found: list[tuple[Record, float]] = []
        if not self.path or not self.path.is_file():
            return found
        header, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        with contextlib.suppress(ValueError):
            if typed(_Header, load_json(header)).settings == self.settings:
                for line in lines:
                    kept = _read(_Kept, line)  # the first that is not whole ends it
                    values = {field.name: getattr(kept, field.name) for field in dataclasses.fields(Record)}
                    found.append((Record(**values), kept.seconds))
        return found


@dataclass(frozen=True)
class _Header:
    settings: str


@dataclass(frozen=True, kw_only=True)
class _Kept(Record):
    """A record in a journal."""

    seconds: float


def _line(record: Record, seconds: float | None = None) -> str:
    document = dataclasses.asdict(record) | ({} if seconds is None else {"seconds": seconds})
    if record.samples is None:
        del document["samples"]
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def _read(kind: type, line: str) -> Any:
    """Record, or kind of one, in a line; raises `ValueError` where it is none."""
    document = load_json(line)
    if isinstance(document, dict) and isinstance(samples := document.get("samples"), list):
        if not samples:
            raise ValueError("samples is empty")
        document["samples"] = [typed(Sample, sample) for sample in samples]
    return typed(kind, document)
