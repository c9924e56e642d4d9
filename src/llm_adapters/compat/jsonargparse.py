"""Error texts of jsonargparse, which tells in no other way what was wrong, as sentences for people.

`tests/compat/test_jsonargparse.py` provokes each text in the installed release.
"""

import re
from typing import TYPE_CHECKING, TypeAlias

from jsonargparse.typing import restricted_number_type

from llm_adapters.errors import shortened

# Numbers within bounds, for the types of options; "inf" and "nan" are in none of them.
if TYPE_CHECKING:
    Count: TypeAlias = int
    Seed: TypeAlias = int
    Positive: TypeAlias = float
    NotNegative: TypeAlias = float
    Decay: TypeAlias = float
else:
    Count = restricted_number_type("Count", int, [(">=", 1), ("<=", 2**31 - 1)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])
    Positive = restricted_number_type("Positive", float, [(">", 0), ("<", float("inf"))])
    NotNegative = restricted_number_type("NotNegative", float, [(">=", 0), ("<", float("inf"))])
    Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])

_TYPES = {
    "Count": "a whole number, at least 1 (and below 2^31)",
    "Seed": "a whole number from 0 to 2^32 - 1",
    "Positive": "a number above 0",
    "NotNegative": "a number that is at least 0",
    "Decay": "a number that is at least 0 and below 1",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as '[a, b]'",
    "dict": "a mapping such as '{a: 1}'",
}
_KEY = re.compile(r'^Parser key "([\w.]+)": *')
_EXPECTED = re.compile(r"(?:Expected an? |Not of type )(?:typing\.Literal\[(.*?)\]|<class '(\w+)'>|(\w+):)")
_VALUE = re.compile(r"Given value: (.*)$|Got value: ((?:(?! Given value).)*)$")
_REFUSED = re.compile(r"Not of type \w+: (?:(\S+) (?:does not|not a)|.*: '(.*)'$|.*not '(\w+)'$)")


def readable(error: Exception) -> str:
    """Message of a parser's error as one sentence in plain words.

    Args:
        error: what `jsonargparse.ArgumentParser` raised, with ``exit_on_error=False``.
    """
    text = " ".join(str(error).split())
    key, value = _KEY.search(text), _VALUE.search(text) or _REFUSED.search(text)
    wanted = [
        f"one of {choices}" if choices else _TYPES.get(name or restricted, name or restricted)
        for choices, name, restricted in _EXPECTED.findall(text)
    ]
    wanted = [words for words in dict.fromkeys(wanted) if words != "NoneType"]
    if key and value and wanted:
        given = next(group for group in value.groups() if group is not None)
        return f"{key[1]} must be {' or '.join(wanted)}, not {shortened(given, 60)!r}"
    return _KEY.sub(r"\1: ", text).partition(" - Parser key")[0].rstrip(".")
