"""Gold labels: what one is worth, and whether any answer can equal it."""

import math
import re

from llm_adapters.tasks.answers import languages, numbers

TOLERANCE = 1e-3  # absolute, as `miss` in the paper's code
_OF_SMALL, _OF_LARGE = 0.01, 1e-7
_LONGEST = 200  # characters of a number with its unit

# What may stand beside the number of a label: units, of which none says that it is another number.
_AROUND = r"[\s.,;:{}$()%\"'*]*"
_UNIT = re.compile(
    rf"{_AROUND}(?:(?:[^\W\d_]{{2,}}\.?|[mgslhtLkK])(?:\^?[23])?(?:[\s/.{{}}$,-]+|\Z)){{0,6}}[\s.,;{{}}$()%\"'*]*"
)
_NO_UNIT = re.compile(
    r"\b(?:million|billion|trillion|thousand|hundred|dozen|half|halves|third|thirds|quarter|quarters|and|or|to|times|plus"
    r"|minus|more|less|squared|cubed|root|pi|sqrt|sin|cos|tan|log|ln|undefined|infinity|over|of)\b",
    re.IGNORECASE,
)


def number(label: object, language: str = "") -> float | None:
    """Number that a label is; None where it is none, or more than one number with its unit.

    ``"15.0"``, ``"1,000"``, ``"3/4"``, ``"$5"``, ``"25%"`` and ``"5 kg"`` are numbers; ``"\\sqrt{2}"``, ``"3x"``,
    ``"16:35"``, ``"2.5 million"`` and ``"3 to 5"`` are none.

    Args:
        label: the label as the data writes it.
        language: of the data, for decimal commas; empty where it is not known.
    """
    text = str(label).strip()
    row = languages.LANGUAGES.get(language)
    if row is not None and row.decimal_comma:
        text = languages.with_decimal_points(text)
    try:
        value = float(re.sub(r"(?<=\d),(?=\d{3}(?:\D|\Z))", "", text))
    except ValueError:
        value = _with_unit(numbers.normalise(text).strip())
    return value if math.isfinite(value) else None


def _with_unit(text: str) -> float:
    found = numbers.find(text)
    if len(found) != 1 or "\\" in text or len(text) > _LONGEST:
        return math.nan
    before, own, after = text[: found[0].start], text[found[0].start : found[0].end], text[found[0].end :]
    plain = not before.strip(" {}$(\"'*") and ":" not in own and _UNIT.fullmatch(after) and not _NO_UNIT.search(after)
    return found[0].value if plain else math.nan


def tolerance(label: float, protocol: str) -> float:
    """Difference from a label within which a number equals it.

    The paper's is absolute, whatever the size. Otherwise a label with decimals counts by its size too: a hundredth of a
    small one, and the rounding of a large one.

    Args:
        label: the number.
        protocol: one of `llm_adapters.tasks.answers.PROTOCOLS`.
    """
    if protocol == "paper" or label == round(label):
        return TOLERANCE
    return max(min(TOLERANCE, _OF_SMALL * abs(label)), _OF_LARGE * abs(label))


def truth(label: str) -> str:
    """Truth value that a label is, ``"true"`` or ``"false"``; the label itself where it is none.

    Args:
        label: the label as the data writes it: a word of any of the languages, or 1 and 0.
    """
    text = label.strip(" .!\"'").casefold()
    return {"1": "true", "0": "false", "1.0": "true", "0.0": "false", "t": "true", "f": "false"}.get(
        text, languages.TRUTH.get(text, text)
    )


def is_readable(label: str, kind: str, language: str = "") -> bool:
    """Tell if an answer of a kind can equal a label.

    Args:
        label: the label as the data writes it.
        kind: the kind of answer.
        language: as for `number`.
    """
    plain = re.sub(r"[^a-z0-9]", "", label.lower())
    match kind:
        case "number":
            return number(label, language) is not None
        case "letter":
            return re.fullmatch("[a-h]", plain) is not None
        case "option":
            return re.fullmatch("(?:answer|solution|ending|option)[1-9]", plain) is not None
        case "boolean":
            return truth(label) in ("true", "false")
    return bool(label.strip())
