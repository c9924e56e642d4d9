"""Results of an evaluation: scores with intervals, the records behind them, and the folder where both are kept."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_adapters.documents import fits, typed
from llm_adapters.errors import RequestError, shortened, unknown
from llm_adapters.evaluation.protocols import get_protocol
from llm_adapters.evaluation.records import JOURNALS, Record, read_records, write_records
from llm_adapters.evaluation.samples import is_score, sampled_scores
from llm_adapters.evaluation.statistics import Comparison, Spread, compare, spread, wilson
from llm_adapters.files import read_json, write_json
from llm_adapters.runs import RunFolder
from llm_adapters.tasks.answers import KINDS
from llm_adapters.tasks.templates import get_template

SUMMARY = "summary.json"
TASK_NAME = re.compile(r"\w[\w.-]*")  # it names a file too


@dataclass(frozen=True)
class TaskResult:
    """The score of one task.

    Attributes:
        accuracy: `correct` of `total`, 0 to 1.
        interval: its 95 % Wilson interval, (low, high).
        correct: number of right answers.
        total: number of questions; the unanswered, unfinished and skipped ones are among them.
        kind: the kind of answer.
        unanswered: outputs without an answer.
        unfinished: outputs that met the limit of new tokens.
        skipped: prompts that were too long for the model.
        tokens: tokens generated.
        seconds: time that they took.
        batch_size: questions answered at once.
        seen: questions that are in the training data; None where that is not known.
        unseen: the score of the others alone.
        invariance: what `check_invariance` found.
        language: the language of the data, where the task names one: it decides how answers are read.
        sampled: where several answers to each question were sampled, their `samples.sampled_scores`, which stand beside
            the others in a summary. `accuracy` is then the majority vote's.
    """

    accuracy: float
    interval: tuple[float, float]
    correct: int
    total: int
    kind: str
    unanswered: int = 0
    unfinished: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    batch_size: int | None = None
    seen: int | None = None
    unseen: dict[str, Any] | None = None
    invariance: dict[str, Any] | None = None
    language: str = ""
    sampled: dict[str, Any] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, end-of-sequence tokens counted."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def questions_per_second(self) -> float:
        """Questions per second."""
        return self.total / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As the JSON document of the command line has it."""
        rates = {"tokens_per_second": self.tokens_per_second, "questions_per_second": self.questions_per_second}
        document = dataclasses.asdict(self) | {"interval": list(self.interval)} | rates
        return document | (document.pop("sampled") or {})


@dataclass
class Evaluation:
    """Scores by task and the records behind them.

    Attributes:
        tasks: the score of each task.
        records: the records of each task.
        about: how they were measured: model, protocol, template, precision, versions, ...
        folder: where they are kept; None if nowhere.
    """

    tasks: dict[str, TaskResult]
    records: dict[str, list[Record]] = field(repr=False)
    about: dict[str, Any] = field(repr=False)
    folder: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document that ``evaluate --json`` prints and ``summary.json`` holds."""
        return {"tasks": {name: result.to_dict() for name, result in self.tasks.items()}, **self.about}

    def write(self, folder: Path) -> None:
        """Write the records of every task and the summary to `folder`; tasks measured there before stay in it.

        They stay only where everything else is the same; the summary never mixes models, protocols or versions.
        """
        for name, records in self.records.items():
            write_records(folder / f"{name}.jsonl", records)
        document = self.to_dict()
        try:
            before = read_json(folder / SUMMARY)
        except RequestError:
            before = {}
        fixed = ("model", "protocol", "template", "precision", "versions", "sampling")
        if all(before.get(key) == document.get(key) for key in fixed):
            earlier = before.get("tasks")
            document["tasks"] = (earlier if isinstance(earlier, dict) else {}) | document["tasks"]
        write_json(folder / SUMMARY, document)
        self.folder = folder


def summarise(records: Sequence[Record], kind: str, leakage_known: bool = False, language: str = "") -> TaskResult:
    """The score of `records`, of answers of `kind`, without what they cost."""
    correct = sum(record.correct for record in records)
    unseen = [record.correct for record in records if not record.seen]
    samples = [record.samples for record in records if record.samples is not None]
    return TaskResult(
        **_score(correct, len(records)),
        kind=kind,
        language=language,
        unanswered=sum(record.extracted is None for record in records),
        unfinished=sum(not (record.finished or record.skipped) for record in records),
        skipped=sum(record.skipped for record in records),
        tokens=sum(record.tokens for record in records),
        seen=len(records) - len(unseen) if leakage_known else None,
        unseen=_score(sum(unseen), len(unseen)) if leakage_known else None,
        sampled=sampled_scores(samples, [record.correct for record in records]) if samples else None,
    )


def _score(correct: int, total: int) -> dict[str, Any]:
    accuracy = correct / total if total else 0.0
    return {"accuracy": accuracy, "interval": wilson(correct, total), "correct": correct, "total": total}


# --- what is on disk


def find(folder: Path, protocol: str = "default") -> Path:
    """Folder with the results: `folder` itself or, where it is a run's, that of the protocol.

    Raises:
        RequestError: neither holds results.
    """
    for place in (folder, RunFolder(folder).evaluation(protocol)):
        if (place / SUMMARY).is_file():
            return place
    raise RequestError(f"{str(folder)!r} holds no results of the protocol {protocol!r}: no {SUMMARY}. Evaluate first.")


def measures(folder: Path, tasks: Sequence[str]) -> bool:
    """Tell if `folder` holds the results of all of `tasks`, and no journal of an evaluation that was interrupted."""
    try:
        return not any(folder.glob(JOURNALS)) and set(tasks) <= read_json(folder / SUMMARY)["tasks"].keys()
    except (RequestError, KeyError, AttributeError):
        return False


def read_evaluation(folder: Path, protocol: str = "default") -> Evaluation:
    """Read the evaluation that was written to `folder` or, where it is a run's, under the protocol.

    Raises:
        RequestError: there is none, or its files do not fit each other.
    """
    place = find(Path(folder), protocol)
    about = read_json(place / SUMMARY)
    try:
        summary = typed(_Summary, {key: value for key, value in about.items() if key in _SUMMARY})
        for section in ("model", "protocol", "template"):
            if not isinstance(getattr(summary, section).get("name"), str):
                raise ValueError(f"{section}.name must be a text")
        if not fits(summary.model.get("adapter"), str | None):
            raise ValueError("model.adapter must be a text or null")
        get_template(summary.template["name"])
        names = {field.name for field in dataclasses.fields(TaskResult)}
        tasks = {}
        for name, document in summary.tasks.items():
            if not TASK_NAME.fullmatch(name):
                raise ValueError(f"{shortened(name, 60)!r} is no name of a task")
            tasks[name] = typed(TaskResult, {key: value for key, value in document.items() if key in names})
            sampled = {key: value for key, value in document.items() if is_score(key)} or None
            tasks[name] = dataclasses.replace(tasks[name], interval=tuple(tasks[name].interval), sampled=sampled)
            if tasks[name].kind not in KINDS:
                raise unknown("kind of answer", tasks[name].kind, KINDS)
            if not fits((tasks[name].unseen or {"accuracy": 0}).get("accuracy"), float):
                raise ValueError(f"{name}: unseen.accuracy must be a number")
        del about["tasks"]
    except ValueError as error:
        raise RequestError(f"{str(place / SUMMARY)!r} is not the summary of an evaluation ({error}).") from None
    records = {name: read_records(place / f"{name}.jsonl") for name in tasks}
    for name, result in tasks.items():
        if len(records[name]) != result.total:
            raise RequestError(
                f"{name}.jsonl in {str(place)!r} has {len(records[name])} records, and the summary says {result.total}."
            )
    return Evaluation(tasks, records, about, place)


@dataclass(frozen=True)
class _Summary:
    """What is read of a summary; it holds more."""

    tasks: dict[str, dict[str, Any]]
    model: dict[str, Any]
    protocol: dict[str, Any]
    template: dict[str, Any]
    precision: str
    warnings: list[str] = field(default_factory=list)


_SUMMARY = [it.name for it in dataclasses.fields(_Summary)]


def rescore(folder: Path, protocol: str) -> Evaluation:
    """Read the answers in the records of `folder` again, under the rules of another protocol, without the model.

    Only the extraction is the other protocol's: prompts and outputs stay what they are, and the summary says so. The
    results are written to ``rescored/<protocol>/`` beside the records.
    """
    rule = get_protocol(protocol)
    old = read_evaluation(Path(folder))
    template = old.about["template"]["name"]
    tasks, records = {}, {}
    for name, result in old.tasks.items():
        language = result.language
        records[name] = [
            record.rescored(result.kind, template=template, protocol=rule, language=language)
            for record in old.records[name]
        ]
        score = summarise(records[name], result.kind, leakage_known=result.seen is not None, language=language)
        tasks[name] = dataclasses.replace(score, seconds=result.seconds, batch_size=result.batch_size)
    about = old.about | {
        "rescored": f"answers read as the protocol {protocol!r} does; prompts and outputs as they were"
    }
    about["protocol"] = about["protocol"] | {"extraction": rule.extraction}
    new = Evaluation(tasks, records, about)
    assert old.folder is not None
    new.write(old.folder / "rescored" / protocol)
    return new


def spread_evaluations(folders: Sequence[Path | Evaluation], protocol: str = "default") -> dict[str, Spread]:
    """Mean and spread of the accuracy over evaluations of the same recipe with several seeds, for each task.

    Raises:
        RequestError: there are fewer than two, or they did not measure the same questions.
    """
    found = [it if isinstance(it, Evaluation) else read_evaluation(Path(it), protocol) for it in folders]
    if len(found) < 2:
        raise RequestError(f"{len(found)} evaluation has no spread: name the folders of at least two seeds.")
    measured = [{name: result.total for name, result in it.tasks.items()} for it in found]
    if any(it != measured[0] for it in measured):
        raise RequestError(f"the seeds did not measure the same questions: {'; '.join(map(str, measured))}.")
    return {name: spread([it.tasks[name].accuracy for it in found]) for name in measured[0]}


# --- two evaluations


@dataclass(frozen=True)
class Flip:
    """A question that one of two evaluations got right and the other wrong; `gained` if the second did."""

    index: int
    question: str
    label: str
    first: float | str | None
    second: float | str | None
    gained: bool


@dataclass(frozen=True)
class TaskComparison:
    """Two evaluations of one task, question by question, and the questions that flipped."""

    comparison: Comparison
    flips: tuple[Flip, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        return self.comparison.to_dict() | {"flipped": [dataclasses.asdict(flip) for flip in self.flips]}


def compare_evaluations(first: Path | Evaluation, second: Path | Evaluation) -> dict[str, TaskComparison]:
    """Compare two evaluations, or the folders that hold them, on every task that both measured.

    Where one measured more questions of a task than the other, the questions of both are compared.

    Raises:
        RequestError: they share no task, or the question of a number in a task is not the same in both.
    """
    one, two = (it if isinstance(it, Evaluation) else read_evaluation(Path(it)) for it in (first, second))
    shared = [name for name in one.records if name in two.records]
    if not shared:
        raise RequestError(f"nothing to compare: {', '.join(one.records)} here, {', '.join(two.records)} there.")
    return {name: _compare(name, one.records[name], two.records[name]) for name in shared}


def _compare(name: str, first: Sequence[Record], second: Sequence[Record]) -> TaskComparison:
    others = {record.index: record for record in second}
    pairs = [(record, others[record.index]) for record in first if record.index in others]
    for one, two in pairs:
        if (one.question, one.label) != (two.question, two.label):
            raise RequestError(f"{name}: question {one.index} is not the same in both, so they cannot be compared.")
    comparison = compare([one.correct for one, _ in pairs], [two.correct for _, two in pairs])
    flips = tuple(
        Flip(one.index, one.question, one.label, one.extracted, two.extracted, two.correct)
        for one, two in pairs
        if one.correct != two.correct
    )
    return TaskComparison(comparison, flips)
