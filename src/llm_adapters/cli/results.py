"""`llm-adapters results ...`: work on stored answers, without a model."""

import dataclasses
from pathlib import Path

from llm_adapters.tasks.answers import ProtocolName


def compare(first: Path, second: Path, *, json: bool = False) -> None:
    """Compare two evaluations question by question: the paired difference, with McNemar's exact test.

    Args:
        first: a folder with results, or a run folder.
        second: the same for the other evaluation.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import evaluation
    from llm_adapters.cli import tables

    compared = evaluation.compare_evaluations(Path(first), Path(second))
    if json:
        tables.print_json({"tasks": {name: task.to_dict() for name, task in compared.items()}})
    else:
        tables.show_comparison(compared)


def spread(folders: list[Path], *, protocol: ProtocolName = "default", json: bool = False) -> None:
    """Show mean and spread of the accuracy over several seeds.

    Args:
        folders: a folder with results, or a run folder, for each seed.
        protocol: the protocol of the results.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import evaluation
    from llm_adapters.cli import tables

    found = evaluation.spread_evaluations([Path(folder) for folder in folders], protocol)
    if json:
        tables.print_json({"tasks": {name: dataclasses.asdict(task) for name, task in found.items()}})
    else:
        tables.show_spread(found)


def rescore(folder: Path, *, protocol: ProtocolName = "default", html: bool = False, json: bool = False) -> None:
    """Score stored answers again under another protocol.

    Args:
        folder: a folder with results, or a run folder.
        protocol: default (the declared answer, else the last), strict (only a declared one) or paper (its rules).
        html: write errors.html beside the records, a page to read questions, outputs and answers in.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import evaluation
    from llm_adapters.cli import tables
    from llm_adapters.evaluation.report import write_report

    result = evaluation.rescore(Path(folder), protocol)
    if html and result.folder:
        write_report(result.folder)
    if json:
        tables.print_json(result.to_dict())
    else:
        tables.show_evaluation(result)
