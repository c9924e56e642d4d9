"""The rules of the paper's evaluation code (commit 8166572), its faults included.

They read the last number of a text, and else the first name that occurs anywhere in it: ``3/4`` is 4, and "Answer: B"
is A.
"""

import math
import re

_PATTERNS = {
    "number": re.compile(r"-?\d+\.?\d*"),
    "letter": re.compile(r"A|B|C|D|E"),
    # the code picks one of these four sets by data set; a response names options of one set only
    "option": re.compile(r"solution[12]|answer[1-5]|ending[1-4]|option[12]"),
    "boolean": re.compile(r"true|false"),
}


def extract(text: str, kind: str) -> float | str | None:
    """Answer of `kind` in `text`, as the paper's code reads it.

    Args:
        text: a response.
        kind: ``"number"``, ``"letter"``, ``"option"``, ``"boolean"`` or ``"text"``.

    Returns:
        A finite float for numbers, else a text; None where there is no answer.
    """
    if kind == "text":
        return text.strip() or None
    if kind != "number":
        match = _PATTERNS[kind].search(text)
        return match[0] if match else None
    found = _PATTERNS[kind].findall(text.replace(",", ""))
    number = float(found[-1]) if found else math.inf  # infinity is how that code says "no answer"
    return number if math.isfinite(number) else None
