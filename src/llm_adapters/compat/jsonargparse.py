"""Error texts of jsonargparse, which tells in no other way what was wrong, as sentences for people.

`tests/compat/test_jsonargparse.py` provokes each text in the installed release.
"""

import re

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as '[a, b]'",
    "dict": "a mapping such as '{a: 1}'",
}
_KEY = re.compile(r'^Parser key "([\w.]+)": *')
_EXPECTED = re.compile(r"Expected an? (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>)")
_VALUE = re.compile(r"(?:Got|Given) value: (.*)$")


def readable(error: Exception) -> str:
    """Message of a parser's error as one sentence in plain words.

    Args:
        error: what `jsonargparse.ArgumentParser` raised, with ``exit_on_error=False``.
    """
    text = " ".join(str(error).split())
    key, value = _KEY.search(text), _VALUE.search(text)
    wanted = [f"one of {choices}" if choices else _TYPES.get(name, name) for choices, name in _EXPECTED.findall(text)]
    wanted = [words for words in dict.fromkeys(wanted) if words != "NoneType"]
    if key and value and wanted:
        return f"{key[1]} must be {' or '.join(wanted)}, not {value[1]!r}"
    return _KEY.sub(r"\1: ", text).partition(" - Parser key")[0].rstrip(".")
