"""`evaluate`: the questions of tasks in, scores with intervals and a record per question out."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_adapters import processes
from llm_adapters.errors import RequestError
from llm_adapters.evaluation.labels import check_labels
from llm_adapters.evaluation.progress import EvaluationProgress, warn
from llm_adapters.evaluation.protocols import DEFAULT_TEMPLATE, Protocol, get_protocol
from llm_adapters.evaluation.records import Journal, Record, score, voted
from llm_adapters.evaluation.results import TASK_NAME, Evaluation, TaskResult, summarise
from llm_adapters.evaluation.samples import Sample
from llm_adapters.files import check_folder, lock, refuse_links, remove_temporaries
from llm_adapters.generation import generator as generation
from llm_adapters.generation.sampling_params import SamplingParams
from llm_adapters.models import LoadedModel, context_length, load
from llm_adapters.models.fingerprints import versions
from llm_adapters.models.untrained import check_trained
from llm_adapters.runs import RunFolder
from llm_adapters.tasks import leakage
from llm_adapters.tasks.catalog import get, load_task
from llm_adapters.tasks.examples import Example, Task
from llm_adapters.tasks.templates import clock, encode_prompt, get_template, holds_control_tokens, render_prompt
from llm_adapters.tasks.tokens import longest_token

SEEN_WARNING = 0.01  # the share of questions in the training data above which a score is called into question


def evaluate(
    run_or_model: str | os.PathLike[str] | LoadedModel,
    adapter: str | os.PathLike[str] | None = None,
    *,
    tasks: Sequence[str],
    limit: int | None = None,
    protocol: str = "default",
    template: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = "auto",
    output: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    check_invariance: int = 0,
    allow_untrained: bool = False,
    allow_other_base: bool = False,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Measure a run, an adapter on a base model, or a bare base model on `tasks`.

    `run_or_model` and `adapter` are what `llm_adapters.models.load` takes (the `Run` that `train` returned is a path
    too), or a model that it returned. `tasks` are
    names of the catalogue or paths of task files; `limit` takes the first so many questions of each. `protocol` is
    ``"default"``, ``"strict"`` or ``"paper"``. `template` None uses the one that the adapter was trained with, or
    ``alpaca`` for a bare model. `quantization` is ``"nf4"``, ``"int8"`` or None; ``"auto"`` stores the base's weights
    as they were when the adapter was trained. `batch_size` None chooses one; `max_new_tokens` None is 256.

    Records and summary are written to ``eval/<protocol>/`` under `output`, or under the run folder; for anything else
    without `output` nothing is written. An interrupted evaluation goes on where it stopped when it is asked for again.
    `progress` shows a bar on stderr; None means where that is a terminal.

    `check_invariance` N asks N questions of each task again, one at a time and in float32, and reports how many scores
    flip: what batching and the precision do to the score.

    An adapter that does nothing is refused unless `allow_untrained`; one on a base model with other weights than those
    that it was trained on, unless `allow_other_base`.

    A `temperature` above 0 samples, `samples` answers to each question, from the `top_k` most probable tokens (0: all)
    that together have the probability `top_p`. The accuracy is then that of their majority vote, and pass@k stands
    beside it. `seed` and the prompt decide each answer. Such results are in ``eval/<protocol>-sampled/``.

    Under torchrun the first process measures, and the others wait for it and return the same.

    Raises `RequestError` for anything wrong with the request, before anything is written, and `WorkError` where data
    is not available or the model computes no numbers.
    """
    return processes.once(
        lambda: _evaluate(
            run_or_model,
            adapter,
            tasks,
            limit,
            protocol,
            template,
            batch_size,
            max_new_tokens,
            dtype,
            device,
            quantization,
            output,
            progress,
            check_invariance,
            allow_untrained,
            allow_other_base,
            SamplingParams(temperature, top_p, top_k, samples, seed),
        )
    )


def _evaluate(
    run_or_model: str | os.PathLike[str] | LoadedModel,
    adapter: str | os.PathLike[str] | None,
    tasks: Sequence[str],
    limit: int | None,
    protocol: str,
    template: str | None,
    batch_size: int | None,
    max_new_tokens: int | None,
    dtype: str,
    device: str,
    quantization: str | None,
    output: str | os.PathLike[str] | None,
    progress: bool | None,
    check_invariance: int,
    allow_untrained: bool,
    allow_other_base: bool,
    sampling: SamplingParams,
) -> Evaluation:
    rule = get_protocol(protocol)
    if not sampling.greedy and rule.num_beams > 1:
        raise RequestError(
            f"the protocol {protocol!r} searches with {rule.num_beams} beams: leave the temperature out, or change "
            "protocol."
        )
    asked, new_tokens = rule.resolve(template, max_new_tokens)
    if asked is not None:
        get_template(asked)
    for what, value, least in (
        ("max_new_tokens", new_tokens, 1),
        ("batch_size", batch_size, 1),
        ("check_invariance", check_invariance, 0),
    ):
        if value is not None and value < least:
            raise RequestError(f"{what}={value} is too small: give {least} or more.")
    if output is not None:
        check_folder(RunFolder(output).path, "the output")
    questions = load_questions(tasks, limit)
    if not isinstance(run_or_model, LoadedModel):
        loaded = load(
            run_or_model,
            adapter,
            dtype=dtype,
            device=device,
            quantization=quantization,
            allow_other_base=allow_other_base,
        )
    elif adapter is None:
        loaded = run_or_model
    else:
        raise RequestError("a loaded model has its adapter already: load it with the other adapter instead.")
    if not allow_untrained:
        check_trained(loaded.model, str(loaded.adapter))
    used, origin = _template(asked, rule, loaded)
    settings = _Settings(rule, used, new_tokens, batch_size, sampling)
    trained_on = _trained_on(loaded)
    work = [_prepare(loaded, task, examples, settings, trained_on) for task, examples in questions]
    folder = _folder(output, loaded, settings)
    about = _about(loaded, settings, origin)

    with _hold(folder):
        results: dict[str, TaskResult] = {}
        records: dict[str, list[Record]] = {}
        journals = []
        with EvaluationProgress(progress) as bar, _generator(loaded, settings) as generator:
            about["generation"] = generator.report
            for task in work:
                journal = Journal(folder and folder / f".{task.name}.partial.jsonl", _digest(about, task, batch_size))
                journals.append(journal)
                records[task.name], costs = _measure(generator, task, settings, journal, bar)
                scored = summarise(
                    records[task.name], task.kind, leakage_known=trained_on is not None, language=task.language
                )
                results[task.name] = dataclasses.replace(scored, **costs)
        if check_invariance:
            with _generator(_in_float32(loaded), dataclasses.replace(settings, batch_size=1)) as alone:
                for task in work:
                    found = _ask_again(alone, task, records[task.name], settings, check_invariance)
                    results[task.name] = dataclasses.replace(results[task.name], invariance=found)
        about["warnings"] = [note for task in work for note in task.notes] + _warnings(results)
        evaluation = Evaluation(results, records, about)
        if folder:
            evaluation.write(folder)
        # Only now: a journal of every task, finished ones too, is what an interrupted evaluation goes on from.
        for journal in journals:
            journal.remove()
        for message in about["warnings"]:
            warn(message)
        return evaluation


@dataclass(frozen=True)
class _Settings:
    protocol: Protocol
    template: str
    max_new_tokens: int
    batch_size: int | None
    sampling: SamplingParams


@dataclass(frozen=True)
class _Question:
    """A question, ready to be asked."""

    index: int
    example: Example
    prompt: str
    ids: list[int]
    seen: bool


@dataclass(frozen=True)
class _Work:
    """A task, ready to be measured."""

    name: str
    kind: str
    language: str
    questions: list[_Question]
    notes: list[str]


# --- before: what was asked for


def load_questions(tasks: Sequence[str], limit: int | None = None) -> list[tuple[Task, list[Example]]]:
    """Load the questions of `tasks`, the first `limit` of each.

    Raises:
        RequestError: a task is unknown, is a training set, has no label that an answer can equal, or the name of
            another; or none is named.
        WorkError: the data is not available.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise RequestError("no tasks to evaluate on: name at least one, such as gsm8k.")
    rows: dict[str, tuple[Task, str]] = {}
    for name in names:
        row = get(name)
        other = rows.setdefault(row.name.casefold(), (row, name))[1]  # their records are files: case tells none apart
        if str(other) != str(name):
            raise RequestError(
                f"{str(other)!r} and {str(name)!r} are both called {row.name!r}: give one another `name`."
            )
    for row, _ in rows.values():
        if not TASK_NAME.fullmatch(row.name):
            raise RequestError(f"the task name {row.name!r} cannot name a file: use letters, digits, '-', '_' and '.'.")
        if row.split != "test":
            raise RequestError(f"{row.name!r} is a training set: evaluate on a test set.")
    questions = [(row, load_task(name, limit=limit)) for row, name in rows.values()]
    for row, examples in questions:
        check_labels(row, examples)
    return questions


def _template(asked: str | None, rule: Protocol, loaded: LoadedModel) -> tuple[str, str]:
    """The prompt template, and why it is this one."""
    if asked is not None:
        return asked, f"protocol {rule.name}" if rule.template else "asked for"
    if loaded.template is not None:
        get_template(loaded.template)
        return loaded.template, "the adapter's own"
    return DEFAULT_TEMPLATE, "default, as the adapter names none" if loaded.adapter else "default for a bare model"


def _folder(output: str | os.PathLike[str] | None, loaded: LoadedModel, settings: _Settings) -> Path | None:
    place = output if output is not None else loaded.run
    if place is None:
        return None
    name = settings.protocol.name
    folder = RunFolder(place).evaluation(name if settings.sampling.greedy else f"{name}-sampled")
    check_folder(folder, "the folder for the results")
    return folder


@contextlib.contextmanager
def _hold(folder: Path | None) -> Iterator[None]:
    """Hold the folder of results for this process alone, without what one that was killed has left."""
    if folder is None:
        yield
        return
    refuse_links(folder.parent, folder)
    busy = f"another process is writing results to {str(folder)!r}: wait for it, or name another folder as the output"
    with lock(folder, busy):
        remove_temporaries(folder)
        yield


def _about(loaded: LoadedModel, settings: _Settings, origin: str) -> dict[str, Any]:
    """Circumstances of the measurement: everything of the summary but the numbers."""
    import torch

    date = {"date": told} if (told := clock(settings.template)) else {}
    return {
        "model": {
            "name": loaded.name,
            "source": loaded.source,
            "fingerprint": loaded.fingerprint(),
            "adapter": str(loaded.adapter) if loaded.adapter else None,
            "adapter_fingerprint": loaded.adapter_fingerprint(),
            "base_of_adapter": loaded.base_of_adapter,
            "tokenizer_fingerprint": loaded.tokenizer_fingerprint(),
        },
        "protocol": dataclasses.asdict(settings.protocol) | {"max_new_tokens": settings.max_new_tokens},
        "template": {"name": settings.template, "origin": origin, **date},
        "precision": str(loaded.dtype).removeprefix("torch."),
        "quantization": loaded.quantization.to_dict() if loaded.quantization else None,
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **({} if settings.sampling.greedy else {"sampling": dataclasses.asdict(settings.sampling)}),
    }


def _prepare(
    loaded: LoadedModel,
    task: Task,
    examples: list[Example],
    settings: _Settings,
    trained_on: leakage.Fingerprint | None,
) -> _Work:
    """Render and encode; raises `RequestError` where the model cannot take the prompts."""
    texts = [example.question for example in examples]
    seen = leakage.seen(trained_on, texts) if trained_on else [False] * len(texts)
    most = 2 * (context_length(loaded.model) or sys.maxsize) * longest_token(loaded.tokenizer)
    questions = []
    for index, (example, known) in enumerate(zip(examples, seen, strict=True)):
        prompt = render_prompt(
            settings.template, example.question, example.input, tokenizer=loaded.tokenizer, history=example.history
        )
        # A prompt that is too long in any case is skipped: its length need not be known.
        ids = encode_prompt(
            loaded.tokenizer, prompt[:most] if len(prompt) > most else prompt, template=settings.template
        )
        questions.append(_Question(index, example, str(prompt), ids, bool(known)))
    generation.check_prompts(loaded.model, [question.ids for question in questions], settings.max_new_tokens)
    notes = check_labels(task, examples)
    if held := sum(holds_control_tokens(loaded.tokenizer, example) for example in examples):
        notes.append(f"{task.name}: {held} questions hold control tokens of the tokenizer, which are read as text.")
    return _Work(task.name, task.kind, task.language, questions, notes)


def _digest(about: dict[str, Any], task: _Work, batch_size: int | None) -> str:
    """A fingerprint of everything that decides what is generated after a given prompt."""
    model = {key: value for key, value in about["model"].items() if key.endswith("fingerprint")}
    fixed = {key: about[key] for key in ("protocol", "template", "precision", "device", "versions")}
    text = json.dumps([model, fixed, task.kind, batch_size, about.get("sampling")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- the measurement


def _generator(loaded: LoadedModel, settings: _Settings) -> generation.Generator:
    return generation.Generator(
        loaded.model,
        loaded.tokenizer,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.protocol.num_beams,
        batch_size=settings.batch_size,
    )


def _measure(
    generator: generation.Generator, task: _Work, settings: _Settings, journal: Journal, bar: EvaluationProgress
) -> tuple[list[Record], dict[str, Any]]:
    """A record per question in the order of the task, and what they cost: seconds, batch size."""
    done: dict[int, Record] = {}
    total_seconds = 0.0
    bar.task(task.name, len(task.questions))
    for kept, seconds in journal.resume():
        question = task.questions[kept.index] if 0 <= kept.index < len(task.questions) else None
        if question and kept.prompt == question.prompt:
            # How it is judged may have changed since; what the model wrote has not.
            record = dataclasses.replace(kept, label=question.example.answer, seen=question.seen)
            done[kept.index] = record.rescored(
                task.kind, template=settings.template, protocol=settings.protocol, language=task.language
            )
            total_seconds += seconds
            bar.question(done[kept.index].correct, kept.tokens, 0.0)
    todo = [question for question in task.questions if question.index not in done]
    for question, answers in _ask(generator, todo, settings):
        record, seconds = _record(task, question, answers, settings), sum(answer.seconds for answer in answers)
        done[record.index] = record
        journal.add(record, seconds)
        bar.question(record.correct, record.tokens, seconds)
        total_seconds += seconds
    records = [done[question.index] for question in task.questions]
    size = generator.size([question.ids for question in task.questions])
    return records, {"seconds": total_seconds, "batch_size": size}


def _ask(
    generator: generation.Generator, questions: Sequence[_Question], settings: _Settings
) -> Iterator[tuple[_Question, list[generation.Generation]]]:
    """Questions and all answers to each, as they are complete."""
    sampling = settings.sampling
    options = {} if sampling.greedy else dataclasses.asdict(sampling)
    waiting: dict[int, list[generation.Generation]] = {}
    for at, answer in generator.generate([question.ids for question in questions], **options):
        waiting.setdefault(at, []).append(answer)
        if len(waiting[at]) == sampling.n:
            yield questions[at], sorted(waiting.pop(at), key=lambda one: one.sample)


def _record(task: _Work, question: _Question, answers: Sequence[generation.Generation], settings: _Settings) -> Record:
    samples = []
    for answer in answers:
        extracted, correct = score(
            answer.text,
            question.example.answer,
            task.kind,
            template=settings.template,
            protocol=settings.protocol,
            language=task.language,
        )
        samples.append(Sample(answer.text, extracted, correct, answer.finished, answer.computed))
    outcome = vars(samples[0]) if settings.sampling.greedy else voted(samples, task.kind, settings.protocol)
    return Record(
        index=question.index,
        question=question.example.question,
        prompt=question.prompt,
        label=question.example.answer,
        skipped=answers[0].skipped,
        seen=question.seen,
        **outcome,
    )


# --- after: is the number to be trusted?


def _in_float32(loaded: LoadedModel) -> LoadedModel:
    import torch

    if loaded.dtype == torch.float32:
        return loaded
    device = str(loaded.device)
    source, adapter = (loaded.run, None) if loaded.run else (loaded.name, loaded.adapter)
    return load(
        source,
        adapter,
        dtype="float32",
        device=device,
        quantization=loaded.quantization,
        allow_other_base=True,
    )


def _ask_again(
    alone: generation.Generator, task: _Work, records: Sequence[Record], settings: _Settings, count: int
) -> dict[str, Any]:
    """Ask `count` questions, evenly spread, one at a time, and compare with the `records` of the measurement."""
    possible = [question for question in task.questions if not records[question.index].skipped]
    count = min(count, len(possible))
    chosen = [possible[at * len(possible) // count] for at in range(count)]
    differ = flipped = 0
    for question, answers in _ask(alone, chosen, settings):
        before, after = records[question.index], _record(task, question, answers, settings)
        differ += _outputs(after) != _outputs(before)
        flipped += after.correct != before.correct
    return {"questions": count, "differ": differ, "flipped": flipped, "share": flipped / count if count else 0.0}


def _outputs(record: Record) -> list[str]:
    return [record.output] if record.samples is None else [sample.output for sample in record.samples]


def _trained_on(loaded: LoadedModel) -> leakage.Fingerprint | None:
    """The questions that the adapter was trained on, from the manifest of its run; None where nothing is known."""
    if loaded.adapter is None:
        return None
    run = RunFolder.around(loaded.adapter)  # also where the adapter alone was named
    if not run.finished:
        return None
    data = run.read_manifest().get("data")
    if not isinstance(data, dict) or "questions" not in data:
        return None
    try:
        return leakage.Fingerprint.from_dict(data["questions"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{str(run.manifest)!r} has no proper fingerprint of its data ({error}).") from None


def _warnings(results: dict[str, TaskResult]) -> list[str]:
    found = []
    for name, result in results.items():
        if result.seen and result.unseen and result.seen > SEEN_WARNING * result.total:
            found.append(
                f"{name}: {result.seen} of {result.total} questions are in the training data. Accuracy is "
                f"{result.accuracy:.1%} on all, {result.unseen['accuracy']:.1%} on the other {result.unseen['total']}."
            )
        if result.skipped:
            found.append(
                f"{name}: {result.skipped} of {result.total} prompts are too long for the model and count as wrong."
            )
        if result.unfinished > result.total / 2:
            found.append(
                f"{name}: {result.unfinished} of {result.total} outputs met the limit of new tokens before they ended."
            )
    return found
