"""Test questions that occur in a training set, and those that test sets repeat."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from llm_adapters.tasks import catalog, leakage
from llm_adapters.tasks.progress import counted


def check(train: str, against: Sequence[str], columns: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Count the test questions that a training set holds, exactly (after normalisation) and nearly.

    Args:
        train: a data set of the catalogue, or a file.
        against: test sets of the catalogue, or task files.
        columns: for a file, which column holds the question.

    Returns:
        For each test set `total`, `exact`, `near` and `examples` of both.

    Raises:
        RequestError: an unknown name, or a file that cannot be read.
        WorkError: a data set that is not available.
    """
    for name in against:
        catalog.get(name)  # an unknown name is told before a training set is downloaded
    training = catalog.load_training_data(train, columns, questions_only=True)
    tests = {name: _questions(name) for name in against}
    asked = (question for example in counted(training, f"comparing {train}") for question in example.questions)
    found = leakage.overlaps(asked, tests)
    return {name: overlap.to_dict() for name, overlap in found.items()}


def duplicates(tasks: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count the questions (after normalisation) that a test set repeats, and those that two test sets share.

    Args:
        tasks: test sets of the catalogue, or task files.

    Returns:
        ``within``: for each set with any, how many of its questions repeat an earlier one. ``across``: for each pair
        with any (``"addsub & singleeq"``), how many distinct questions are in both.

    Raises:
        RequestError: an unknown name.
        WorkError: a data set that is not available.
    """
    questions = {name: [leakage.normalise(question) for question in _questions(name)] for name in tasks}
    within = {name: len(texts) - len(set(texts)) for name, texts in questions.items()}
    across = {f"{a} & {b}": len(set(questions[a]) & set(questions[b])) for a, b in itertools.combinations(questions, 2)}
    return {
        "within": {name: count for name, count in within.items() if count},
        "across": {pair: count for pair, count in across.items() if count},
    }


def _questions(task: str) -> list[str]:
    return [example.question for example in catalog.load_task(task)]
