"""Gold labels before a measurement: can an answer equal them, and does the question show what they name?"""

import re
from collections.abc import Iterable, Sequence

from llm_adapters.errors import RequestError, some
from llm_adapters.tasks.answers.labels import is_readable
from llm_adapters.tasks.examples import Example, Task

_ARE = {
    "number": "no number (or more than one)",
    "letter": "no letter from A to H",
    "option": "no option such as answer2 or solution1",
    "boolean": "no truth value",
    "text": "empty",
}


def check_labels(task: Task, examples: Sequence[Example]) -> list[str]:
    """Compare the gold labels of a task with its kind of answer.

    Args:
        task: the task.
        examples: its questions.

    Returns:
        Sentences: on labels that can never be met, and on letters or options that no question names.

    Raises:
        RequestError: that holds for all of them, so that the score could say nothing.
    """
    notes = []
    numbered = list(enumerate(examples, 1))
    unreadable = _named(pair for pair in numbered if not _readable(task, pair[1]))
    if unreadable:
        what = (
            f"{task.name}: {len(unreadable)} of {len(examples)} gold labels are {_ARE[task.kind]}: {some(unreadable)}"
        )
        if len(unreadable) == len(examples):
            raise RequestError(f"{what}. No answer can equal them: correct the labels, or the task's `kind`.")
        notes.append(f"{what}. No answer can equal them, and they count as wrong.")
    if task.kind in ("letter", "option"):
        unnamed = _named(pair for pair in numbered if _readable(task, pair[1]) and not _shows(pair[1], task.kind))
        if unnamed:
            what = (
                f"{task.name}: {len(unnamed)} of {len(examples)} questions do not name the {task.kind} that is their "
                f"answer: {some(unnamed)}"
            )
            if len(unnamed) == len(examples):
                raise RequestError(
                    f"{what}. Are the options in another column? Name it in the task file: "
                    "`columns: {choices: COLUMN}`."
                )
            notes.append(f"{what}.")
    return notes


def _readable(task: Task, example: Example) -> bool:
    return is_readable(example.answer, task.kind, task.language)


def _shows(example: Example, kind: str) -> bool:
    if kind == "option":  # "Answer 2" is answer2
        return _letters_and_digits(example.answer) in _letters_and_digits(f"{example.question} {example.input}")
    letter = re.sub(r"[^A-Za-z]", "", example.answer).upper()
    texts = [example.question, example.input, *(content for _, content in example.history)]
    return any(
        re.search(rf"(?<![A-Za-z]){letter}(?![A-Za-z'’])|(?<!\w){letter.lower()} ?[).:]", text) for text in texts
    )


def _letters_and_digits(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _named(examples: Iterable[tuple[int, Example]]) -> list[str]:
    return [f"question {at} ({example.answer[:40]!r})" for at, example in examples]
