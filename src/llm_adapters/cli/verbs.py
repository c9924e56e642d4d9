"""The command line: one typed function per verb; its signature and docstring are the options and the help."""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_adapters._version import __version__
from llm_adapters.errors import Interrupted, RequestError, WorkError

if TYPE_CHECKING:
    from llm_adapters.training.recipe import Recipe

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130


def demo(output: Path | None = None, quick: bool = False, method: str = "lora", json: bool = False) -> None:
    """Train an adapter on arithmetic word problems and show what it bought, offline and in minutes.

    Args:
        output: the run folder; demo-run by default, or with a number behind it if that is taken.
        quick: a tiny random model and a few steps, in seconds, to try the machinery.
        method: the adapter: lora, series, parallel, ...
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import demo as study

    result = study.run(output, quick=quick, method=method)
    _print(result, json) if json else study.show(result, quick=quick)


def train(recipe: "Recipe", output: Path, json: bool = False) -> None:
    """Fine-tune an adapter as a recipe says and write a run folder; an interrupted run goes on where it stopped.

    Args:
        recipe: the YAML file; any of its keys can be given as an option instead (--training.epochs 1).
        output: the run folder.
        json: print the manifest as one JSON document on stdout.
    """
    from llm_adapters import api
    from llm_adapters.cli import tables

    run = api.train(recipe, output)
    if json:
        measured = {"evaluation": run.evaluation.to_dict()} if run.evaluation else {}
        _print({**run.manifest, **measured}, json)
        return
    tables.show_run(run)
    if run.evaluation:
        tables.show_evaluation(run.evaluation)


def evaluate(
    run: str | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    protocol: Literal["default", "strict", "paper"] = "default",
    template: Literal["alpaca", "chat", "plain", "paper"] | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    output: Path | None = None,
    check_invariance: int = 0,
    compare: list[Path] | None = None,
    spread: list[Path] | None = None,
    rescore: Path | None = None,
    html: bool = False,
    json: bool = False,
) -> None:
    """Measure a run, an adapter on a base model, or the bare base model on test sets.

    Args:
        run: a run folder.
        model: a base model instead: a folder, a short name or a hub id.
        adapter: an adapter's folder, to go on the model.
        tasks: test sets of the catalogue, or task files.
        limit: the first so many questions of each.
        protocol: default (the declared answer, else the last), strict (only a declared one) or paper (its rules).
        template: the prompt template; by default the one that the adapter was trained with.
        batch_size: questions answered at once; chosen by free memory if not given.
        max_new_tokens: the longest answer, in tokens; 256 if not given.
        dtype: precision; auto is bfloat16 where the hardware multiplies it natively, else float32.
        device: where to run; auto takes an accelerator if there is one.
        output: where to write records and summary; a run's own folder if not given.
        check_invariance: ask so many questions again, alone and in float32, and report how many scores flip.
        compare: two folders with results: the paired difference, instead of measuring.
        spread: folders with results of several seeds: mean and spread, instead of measuring.
        rescore: a folder with results: score its records again under the protocol, without the model.
        html: write errors.html beside the records, a page to read questions, outputs and answers in.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import evaluation
    from llm_adapters.cli import tables
    from llm_adapters.evaluation import report

    if html and not (run or output or rescore):
        raise RequestError("--html needs a folder for the page: give --output")
    if spread:
        found = evaluation.spread_evaluations([Path(folder) for folder in spread], protocol)
        document = {name: dataclasses.asdict(task) for name, task in found.items()}
        _print({"tasks": document}, json) if json else tables.show_spread(found)
        return
    if compare or rescore:
        if compare and len(compare) != 2:
            raise RequestError(f"--compare takes two folders with results, got {len(compare)}")
        if compare:
            compared = evaluation.compare_evaluations(*map(Path, compare))
            document = {name: task.to_dict() for name, task in compared.items()}
            _print({"tasks": document}, json) if json else tables.show_comparison(compared)
            return
        assert rescore is not None
        result = evaluation.rescore(Path(rescore), protocol)
    else:
        if (run is None) == (model is None):
            raise RequestError("name either a run folder or --model, and not both")
        if run is not None and adapter is not None:
            raise RequestError("a run has its own adapter: give --adapter only with --model")
        if not tasks:
            raise RequestError("no tasks given: name at least one after --tasks, such as gsm8k or wordproblems")
        result = evaluation.evaluate(
            run or model or "",
            adapter,
            tasks=tasks,
            limit=limit,
            protocol=protocol,
            template=template,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            device=device,
            output=output,
            check_invariance=check_invariance,
        )
    if html and result.folder:
        report.write_report(result.folder)
    _print(result.to_dict(), json) if json else tables.show_evaluation(result)


def convert(legacy: Path, output: Path, model: str | None = None, json: bool = False) -> None:
    """Turn a checkpoint of the paper's own code into a PEFT checkpoint.

    Args:
        legacy: the folder that the paper's code wrote.
        output: the folder to write.
        model: the base model; the checkpoint is compared with it, and the result names it as its base.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import legacy as old

    written = old.convert(legacy, output, model=model)
    _print({"adapter": str(written)}, json)


def inspect(model: str, method: str | None = None, options: dict[str, Any] | None = None, json: bool = False) -> None:
    """Show where adapters would go on a model, how many parameters and how much memory, without loading its weights.

    Args:
        model: a folder, a short name or a hub id.
        method: the method to place: lora, series, parallel, ...
        options: the method's options, as a mapping ('{r: 8}').
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import inspection
    from llm_adapters.cli import tables

    found = inspection.inspect(model, method, **(options or {}))
    _print(found.to_dict(), json) if json else tables.show_inspection(found)


def data_list(json: bool = False) -> None:
    """Show every data set of the catalogue: kind of answer, size, licence, and whether it is here.

    Args:
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import tables
    from llm_adapters.tasks import catalog, download

    rows = []
    for task in catalog.CATALOG.values():
        here = "embedded" if task.embedded else ("here" if download.present(task) else "")
        rows.append({"name": task.name, "split": task.split, "kind": task.kind, "size": task.size, "here": here})
        rows[-1] |= {"licence": task.licence, "origin": task.url, "description": task.description}
    _print({"datasets": rows}, json) if json else tables.show_catalogue(rows)


def data_fetch(names: list[str], json: bool = False) -> None:
    """Download data sets into the cache and verify them; what is there already is only verified.

    Args:
        names: data sets of the catalogue, or all.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import tables
    from llm_adapters.tasks import catalog, download

    chosen = list(catalog.CATALOG) if names == ["all"] else names
    fetched = download.fetch([catalog.get(name) for name in chosen], progress=True)
    document = {
        item.name: {"status": item.status, "path": str(item.path) if item.path else None, "reason": item.reason}
        for item in fetched
    }
    _print({"datasets": document}, json) if json else tables.show_fetched(fetched)
    failed = [item for item in fetched if item.status == "failed"]
    if failed:
        raise WorkError(f"{len(failed)} of {len(fetched)} could not be fetched. {failed[0].name}: {failed[0].reason}")


def data_check(train: str, against: list[str], columns: dict[str, str] | None = None, json: bool = False) -> None:
    """Report which test questions occur in a training set, exactly or nearly.

    Args:
        train: a training set of the catalogue, or a file.
        against: test sets of the catalogue.
        columns: for a file, which column holds the question.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import tables
    from llm_adapters.tasks import contamination

    report = contamination.check(train, against, columns)
    repeated = contamination.duplicates(against)
    if json:
        _print({"train": train, "tasks": report, "duplicates": repeated}, json)
    else:
        tables.show_contamination(train, report, repeated)


def chat(
    model: str = "smollm2-135m",
    adapter: Path | None = None,
    template: Literal["alpaca", "chat", "plain", "paper"] | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Talk to a base model, an adapter or a run in the terminal; an empty line or Ctrl-D ends it.

    Args:
        model: a run folder, a model folder, a short name or a hub id.
        adapter: an adapter's folder, to go on the model.
        template: the prompt template; by default the adapter's own, or chat for a bare model that has one.
        max_new_tokens: the longest answer, in tokens.
    """
    from llm_adapters.cli import chat as terminal

    terminal.talk(model, adapter, template=template, max_new_tokens=max_new_tokens)


VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "convert": convert,
    "inspect": inspect,
    "data list": data_list,
    "data fetch": data_fetch,
    "data check": data_check,
    "chat": chat,
}
# Which parameters of a verb are given by place, and how many words each takes.
POSITIONAL: dict[str, dict[str, str | None]] = {
    "evaluate": {"run": "?"},
    "convert": {"legacy": None, "output": None},
    "inspect": {"model": None},
    "data fetch": {"names": "+"},
    "data check": {"train": None},
    "chat": {"model": "?"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 the work failed, 2 the request was wrong).

    Args:
        arguments: the words after the command's name; None for the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # What changes in a coming release of a library is for us to mend, and noise to a user.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        from llm_adapters.cli import parser as commandline

        verb, values = commandline.parse(words, VERBS, POSITIONAL, __version__)
        VERBS[verb](**values)
    except (RequestError, WorkError) as error:
        print(f"llm-adapters: {error}", file=sys.stderr)
        if isinstance(error, Interrupted):
            return INTERRUPTED
        return WRONG_REQUEST if isinstance(error, RequestError) else FAILED
    except KeyboardInterrupt:
        print("llm-adapters: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away (a pager that was closed)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return DONE


def _print(document: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, ensure_ascii=False, allow_nan=False))
    elif isinstance(document, dict):
        for key, value in document.items():
            print(f"{key}: {value}")
