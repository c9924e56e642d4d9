"""Options of multiple-choice questions in data: the shapes that they come in, and how a prompt shows them."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llm_adapters.errors import RequestError

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COLUMN = re.compile(r"(?:option|choice|sol|solution|ending|answer|op)[ _-]?([a-h]|[1-9])", re.IGNORECASE)


def columns_of(names: Sequence[str], used: Collection[str]) -> dict[str, str]:
    """Columns that hold an option each, with its label: A, B, ...; option_a, option_b, ...; sol1, sol2.

    Args:
        names: all columns.
        used: those that hold something else.
    """
    letters = {name: name.upper() for name in names if name.upper() in tuple(_LETTERS[:8])}
    named = {}
    for name in names:
        if (found := _COLUMN.fullmatch(name.strip())) and name not in used:
            named[name] = found[1].upper() if found[1].isalpha() else _LETTERS[int(found[1]) - 1]
    for columns in (letters, named):
        if len(columns) > 1 and columns.keys().isdisjoint(used) and len(set(columns.values())) == len(columns):
            return columns
    return {}


def read(value: Any, where: str) -> dict[str, str]:
    """Label and text of each option; labels 1, 2, ... become letters.

    Args:
        value: a list of texts (labelled A, B, ...), an object of labels and texts, one with the lists ``label`` and
            ``text``, or a list of objects with both.
        where: file, row and column, for messages.

    Raises:
        RequestError: something else.
    """
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict) and {"label", "text"} <= set(value):
        if isinstance(value["label"], list) and isinstance(value["text"], list):
            pairs = list(zip(value["label"], value["text"], strict=False))
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(item, dict) and {"label", "text"} <= set(item) for item in value):
        pairs = [(item["label"], item["text"]) for item in value]
    elif isinstance(value, list) and len(value) <= len(_LETTERS):
        pairs = list(zip(_LETTERS, value, strict=False))
    if not pairs or not all(isinstance(text, str | int | float) for _, text in pairs):
        raise RequestError(
            f"{where} holds no options that can be read: a list of texts is needed, or an object of labels and texts."
        )
    choices = {str(label).strip(): str(text).strip() for label, text in pairs}
    if all(re.fullmatch("[1-9]", label) for label in choices):
        choices = {_LETTERS[int(label) - 1]: text for label, text in choices.items()}
    own = {label: re.match(rf"\(?{re.escape(label)}\s*[).:]\s*", text) for label, text in choices.items()}
    if all(own.values()):  # "A)21": the texts repeat their labels
        return {
            label: text[found.end() :]
            for (label, text), found in zip(choices.items(), own.values(), strict=True)
            if found
        }
    return choices


def with_choices(question: str, choices: Mapping[str, str] | str) -> str:
    """Question that shows its options, as the prompts of AQuA do; one that shows them already stays as it is.

    Args:
        question: the question.
        choices: the options, or a text that lists them.
    """
    texts = [choices.strip()] if isinstance(choices, str) else list(choices.values())
    if all(text in question for text in texts):
        return question
    shown = texts[0] if isinstance(choices, str) else " ".join(f"({label}) {text}" for label, text in choices.items())
    return f"{question.rstrip()}\nAnswer Choices: {shown}"


def label_of(answer: str, value: Any, choices: Mapping[str, str], given: Any) -> str:
    """Label of the option that is the gold answer; `answer` itself where it is a label, or no option.

    Args:
        answer: the gold answer as a text.
        value: the same as the data has it: a whole number is a position in a list, from 0.
        choices: the options as they were read.
        given: the options as the data has them.
    """
    if not choices or answer in choices:
        return answer
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(given, list) and 0 <= value < len(choices):
        return list(choices)[value]
    if re.fullmatch("[1-9]", answer) and isinstance(given, dict) and _LETTERS[int(answer) - 1] in choices:
        return _LETTERS[int(answer) - 1]
    same = [label for label, text in choices.items() if text == answer.strip()]
    return same[0] if len(same) == 1 else answer
