"""A page to look at the errors with: one HTML file, no script, nothing fetched from anywhere."""

from html import escape
from pathlib import Path

from llm_adapters.evaluation.records import Record
from llm_adapters.evaluation.results import Evaluation, TaskResult, read_evaluation
from llm_adapters.files import write_text

_KINDS = (("right", "right"), ("wrong", "wrong"), ("none", "no answer"))

_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
article { border-left: .3rem solid; padding: .2rem 1rem; margin: 1rem 0; }
article.right { border-color: #2a8a3e; }
article.wrong { border-color: #c6362c; }
article.none { border-color: #b07d00; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; padding: .5rem; background: #8882; }
h3, dl { margin: .3rem 0; font-size: 1rem; } dt { font-weight: bold; float: left; margin-right: .5rem; }
fieldset { position: sticky; top: 0; background: Canvas; border: 1px solid #8888; }
label { margin-right: 1rem; }
"""


def render(evaluation: Evaluation) -> str:
    """The page for `evaluation`: every question with output, extracted answer and gold label, to filter by outcome."""
    every = [record for records in evaluation.records.values() for record in records]
    counts = {kind: sum(_outcome(record) == kind for record in every) for kind, _ in _KINDS}
    model, title = evaluation.about["model"], "Evaluation"
    adapter = model.get("adapter")
    name = f"{model['name']}, adapter {adapter}" if adapter else f"{model['name']}, no adapter"
    protocol, template = evaluation.about["protocol"]["name"], evaluation.about["template"]["name"]
    choices = [("all", "all", len(every)), *((kind, words, counts[kind]) for kind, words in _KINDS)]
    buttons = "".join(
        f'<label><input type="radio" name="show" id="show-{kind}"{" checked" if kind == "all" else ""}> '
        f"{words} ({count})</label>"
        for kind, words, count in choices
    )
    # What is not chosen is hidden by a style rule, so that the page works where scripts are forbidden.
    rules = "".join(f"body:has(#show-{kind}:checked) article:not(.{kind}) {{ display: none; }}\n" for kind, _ in _KINDS)
    sections = "".join(_section(task, evaluation.tasks[task], records) for task, records in evaluation.records.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: {escape(name)}</title>\n<style>{_STYLE}{rules}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<p>{escape(name)}; protocol {escape(protocol)}, template {escape(template)}, "
        f"{escape(evaluation.about['precision'])}</p>\n"
        f"<fieldset><legend>Show</legend>{buttons}</fieldset>\n{sections}</body>\n</html>\n"
    )


def write_report(folder: Path, protocol: str = "default") -> Path:
    """Write ``errors.html`` beside the records in `folder` (a run's, or that of results) and return its path.

    Raises:
        RequestError: there are no results.
    """
    evaluation = read_evaluation(Path(folder), protocol)
    assert evaluation.folder is not None
    page = evaluation.folder / "errors.html"
    write_text(page, render(evaluation))
    return page


def _outcome(record: Record) -> str:
    if record.correct:
        return "right"
    return "none" if record.extracted is None else "wrong"


def _section(task: str, result: TaskResult, records: list[Record]) -> str:
    low, high = result.interval
    return (
        f"<section>\n<h2>{escape(task)}: {result.accuracy:.1%}</h2>\n"
        f"<p>{result.correct} of {result.total}, 95 % interval {low:.1%} to {high:.1%}</p>\n"
        f"{''.join(map(_article, records))}</section>\n"
    )


def _article(record: Record) -> str:
    answer = "no answer" if record.extracted is None else str(record.extracted)
    notes = [
        *(["the limit of new tokens was met"] if not (record.finished or record.skipped) else []),
        *(["the prompt was too long to be asked"] if record.skipped else []),
        *(["the question is in the training data"] if record.seen else []),
    ]
    note = f"<p>{escape('; '.join(notes))}</p>" if notes else ""
    return (
        f'<article class="{_outcome(record)}">\n<h3>Question {escape(str(record.index))}</h3>\n'
        f"<pre>{escape(record.question)}</pre>\n<h3>Output</h3>\n<pre>{escape(record.output)}</pre>\n{note}"
        f"<dl><dt>Extracted</dt><dd>{escape(answer)}</dd><dt>Gold</dt><dd>{escape(record.label)}</dd></dl>\n"
        f"{_samples(record)}<details><summary>Prompt</summary><pre>{escape(record.prompt)}</pre></details>\n</article>\n"
    )


def _samples(record: Record) -> str:
    if record.samples is None:
        return ""
    outputs = "".join(
        f"<p>{number}: {'right' if sample.correct else 'wrong'}, {escape(str(sample.extracted))}</p>"
        f"<pre>{escape(sample.output)}</pre>"
        for number, sample in enumerate(record.samples)
    )
    right = sum(sample.correct for sample in record.samples)
    return f"<details><summary>{right} of {len(record.samples)} samples are right</summary>{outputs}</details>"
