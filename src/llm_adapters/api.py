"""`train` as a recipe says, the same from Python and from the command line: train an adapter, then measure it."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_adapters import evaluation, processes, training
from llm_adapters.runs import RunFolder
from llm_adapters.training import Recipe, Run


def train(recipe: Recipe | Mapping[str, Any] | str | Path, output: str | Path, *, progress: bool = True) -> Run:
    """Train the adapter that `recipe` describes, write a run folder, and measure the recipe's tasks, if it names any.

    Everything that can be wrong with the request is found before anything is written. If `output` holds an interrupted
    run of the same recipe, it goes on from its last checkpoint, or with its evaluation, and ends as if it had never
    stopped.

    Args:
        recipe: a `Recipe`, nested mappings, or the path of a YAML file.
        output: the run folder; new, empty, or an interrupted run of the same recipe.
        progress: show progress on stderr.

    Returns:
        The `Run`, the same in each of several processes. Its folder holds config.yaml, adapter/, manifest.json and
        log.jsonl, and eval/ if tasks were measured.

    Raises:
        RequestError: the request is wrong.
        Interrupted: a signal stopped the run after a checkpoint.
        WorkError: the work failed (a loss that is not finite, data that is not available).
    """
    recipe = training.load_recipe(recipe)
    measured = recipe.evaluation
    if not measured.tasks:
        return training.train(recipe, output, progress=progress)
    # A wrong name is told before hours of training.
    tasks = [task.name for task, _ in evaluation.load_questions(measured.tasks, measured.limit)]
    folder = RunFolder(output)
    with contextlib.ExitStack() as held:
        if processes.once(lambda: _is_unmeasured(folder, measured.protocol, tasks, held)):
            run = training.finished_run(recipe, output)
        else:
            run = None
        run = run or training.train(recipe, output, progress=progress)
        run.evaluation = evaluation.evaluate(
            run,
            tasks=measured.tasks,
            limit=measured.limit,
            protocol=measured.protocol,
            max_new_tokens=measured.max_new_tokens,
            batch_size=measured.batch_size,
            progress=None if progress else False,
        )
    return run


def _is_unmeasured(folder: RunFolder, protocol: str, tasks: list[str], held: contextlib.ExitStack) -> bool:
    """Hold the folder, from the training to the end of the evaluation; tell if the latter is what is left to do."""
    held.enter_context(folder.lock())
    return folder.finished and not evaluation.measures(folder.evaluation(protocol), tasks)
