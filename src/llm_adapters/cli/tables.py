"""Output on stdout: tables for a person, one JSON document for a program."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_adapters.errors import harmless

if TYPE_CHECKING:
    from llm_adapters.evaluation import Evaluation, TaskResult
    from llm_adapters.evaluation.statistics import Spread
    from llm_adapters.inspection import Inspection
    from llm_adapters.tasks.download import Fetched
    from llm_adapters.training import Run


def print_json(document: dict[str, Any]) -> None:
    """Print a result for a program.

    Args:
        document: what `--json` promises.
    """
    print(json.dumps(document, ensure_ascii=False, allow_nan=False))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table; the first column is text that stays whole, the others are numbers.

    Args:
        title: printed above the table.
        columns: their heads.
        rows: as many cells each as there are columns.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Names are shown as they are: what looks like markup in them is none.
    table = Table(title=Text(harmless(title)), title_justify="left")
    for number, column in enumerate(columns):
        whole = not number and len(columns) > 2  # a name to copy: the others give way
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(Text(harmless(cell)) for cell in row))
    Console().print(table)


def score(result: "TaskResult") -> str:
    """``"31.0 % (26-36)"``: accuracy with its 95 % interval."""
    return percent(result.accuracy, result.interval)


def percent(accuracy: float, interval: Sequence[float]) -> str:
    """``"31.0 % (26-36)"``: a share and its interval."""
    low, high = interval
    return f"{100 * accuracy:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def size(count: float) -> str:
    """Number of bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def show_run(run: "Run") -> None:
    """Print what a training run was, and its folder."""
    m = run.manifest
    adapter, data = m["adapter"], m["data"]
    share = 100 * adapter["trainable_parameters"] / adapter["all_parameters"]
    rows = [
        ("base model", m["base_model"]["name"]),
        ("adapter", f"{adapter['method']}, {adapter['trainable_parameters']:,} parameters ({share:.2f} %)"),
        ("trained on", f"{data['train_examples']:,} examples of {data['name']}, {data['train_tokens']:,} tokens"),
        ("steps", f"{m['steps']} in {m['seconds']:.0f} s, {m['tokens_per_second']:.0f} tokens/s"),
        ("last loss", f"{m['final_loss']:.4f}"),
        ("peak memory", size(m["peak_memory_bytes"])),
        ("run folder", str(run.folder)),
    ]
    if data["dropped_too_long"]:
        rows.insert(3, ("left out as too long", f"{data['dropped_too_long']:,} examples"))
    show("training", ("", ""), rows)


def show_evaluation(evaluation: "Evaluation") -> None:
    """Print the scores of every task."""
    about = evaluation.about
    rows = [
        (
            name,
            score(result),
            f"{result.correct}/{result.total}",
            str(result.unanswered),
            str(result.unfinished),
            f"{result.tokens_per_second:.0f}",
        )
        for name, result in evaluation.tasks.items()
    ]
    title = f"{about['model']['name']}, {about['precision']}, prompt {about['template']['name']}"
    sampled = any(result.sampled for result in evaluation.tasks.values())
    accuracy = "majority vote (95 %)" if sampled else "accuracy (95 %)"
    show(title, ("task", accuracy, "correct", "no answer", "cut off", "tokens/s"), rows)
    if sampled:
        show_sampled(evaluation)
    for name, result in evaluation.tasks.items():
        if result.unseen and result.seen:
            share = 100 * result.unseen["accuracy"]
            print(f"{name}: {result.seen} questions were in the training data; without them {share:.1f} %")
    if evaluation.folder:
        print(f"records: {evaluation.folder}")


def show_sampled(evaluation: "Evaluation") -> None:
    """Print pass@k and majority vote of every task."""
    rows, columns = [], []
    for name, result in evaluation.tasks.items():
        scores = {key: value for key, value in (result.sampled or {}).items() if key != "samples"}
        rows.append((name, *(percent(value["accuracy"], value["interval"]) for value in scores.values())))
        columns = ["task", *scores]
    said = evaluation.about["sampling"]
    title = f"{said['n']} samples, temperature {said['temperature']:g}"
    title += f", top-p {said['top_p']:g}" * (said["top_p"] < 1) + f", top-k {said['top_k']}" * (said["top_k"] > 0)
    show(f"{title}, seed {said['seed']} (95 %)", columns, rows)


def show_comparison(comparison: dict[str, Any]) -> None:
    """Print two evaluations side by side, with the exact McNemar test."""
    rows = []
    for name, task in comparison.items():
        c = task.to_dict()
        rows.append([name, *(f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in c.items() if k != "flipped")])
        columns = ["task", *(k.replace("_", " ") for k in c if k != "flipped")]
    for name, task in comparison.items():  # first: there may be hundreds, and the table is what is looked for
        for flip in task.flips:
            print(f"{name} {flip.index}: {'gained' if flip.gained else 'lost'}  {harmless(flip.question[:90])}")
    show("paired comparison", columns, rows)


def show_inspection(found: "Inspection") -> None:
    """Print the places and the costs of adapters."""
    rows = [
        ("family", f"{found.family}{' (found by structure, it has no row)' if found.discovered else ''}"),
        ("layers x width", f"{found.layers} x {found.hidden_size}"),
        ("parameters", f"{found.parameters:,} ({size(found.base_bytes)} in {found.dtype})"),
    ]
    for role, module in found.roles.items():
        if module:
            rows.append((role, module if isinstance(module, str) else ", ".join(module)))
    show(found.model, ("", "in a decoder layer"), rows)
    if found.method:
        places = [(place, str(count)) for place, count in found.places.items()]
        show(f"{found.method}: {found.trainable:,} trained parameters", ("place", "count"), places)
        print(f"adapter, gradient and optimiser: {size(found.training_bytes)}, activations on top")


def show_catalogue(rows: Sequence[dict[str, Any]]) -> None:
    """Print the data sets that can be named."""
    shown = [
        (r["name"], r["split"], r["kind"], f"{r['size']:,}" if r["size"] else "?", r["here"], r["licence"])
        for r in rows
    ]
    show("data sets", ("name", "split", "answer", "size", "on this machine", "licence"), shown)


def show_fetched(fetched: "Sequence[Fetched]") -> None:
    """Print what became of each data set."""
    show("data sets", ("name", "", "where"), [(f.name, f.status, str(f.path or "")) for f in fetched])


def show_spread(found: "dict[str, Spread]") -> None:
    """Print mean and spread of the accuracy over several seeds."""
    rows = []
    for name, s in found.items():
        deviation = f"{100 * s.deviation:.1f}" if s.deviation is not None else ""
        extremes = f"{100 * s.least:.1f}-{100 * s.most:.1f}"
        rows.append((name, str(s.count), f"{100 * s.mean:.1f} %", deviation, extremes))
    show("several seeds", ("task", "seeds", "mean accuracy", "standard deviation", "range"), rows)


def show_contamination(train: str, report: dict[str, dict[str, Any]], repeated: dict[str, dict[str, int]]) -> None:
    """Print the test questions that occur in the training data, with examples, and those that test sets repeat."""
    rows = [(name, str(r["total"]), str(r["exact"]), str(r["near"])) for name, r in report.items()]
    show(f"test questions that occur in {train}", ("task", "questions", "exact", "near"), rows)
    for name, count in repeated["within"].items():
        print(f"{name}: {count} of its questions repeat an earlier one")
    for pair, count in repeated["across"].items():
        print(f"{pair} share {count} questions")
    for name, r in report.items():
        for kind in ("exact", "near"):
            for example in [e for e in r["examples"] if e["kind"] == kind][:1]:
                print(f"\n{name}, {kind} ({example['similarity']:.2f})")
                for side in ("test", "train"):
                    print(f"  {side + ':':<6} {harmless(' '.join(example[side].split())[:200])}")
