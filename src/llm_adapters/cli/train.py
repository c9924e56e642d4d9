"""`llm-adapters train`: from a recipe to a run folder."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_adapters.training.recipe import Recipe


def train(recipe: "Recipe", *, output: Path, json: bool = False) -> None:
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
        tables.print_json({**run.manifest, **measured})
        return
    tables.show_run(run)
    if run.evaluation:
        tables.show_evaluation(run.evaluation)
