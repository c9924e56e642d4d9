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
    from llm_adapters import evaluation, training
    from llm_adapters.cli import tables

    run = training.train(recipe, output)
    document = run.manifest
    if not json:
        tables.show_run(run)
    if recipe.evaluation.tasks:
        wanted = recipe.evaluation
        result = evaluation.evaluate(
            output,
            tasks=wanted.tasks,
            limit=wanted.limit,
            protocol=wanted.protocol,
            max_new_tokens=wanted.max_new_tokens,
            batch_size=wanted.batch_size,
        )
        document = document | {"evaluation": result.to_dict()}
        if not json:
            tables.show_evaluation(result)
    if json:
        tables.print_json(document)
