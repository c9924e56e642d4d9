"""Documents that others may have written: YAML, read within bounds, and the types that YAML and JSON must have.

Nothing in them can make a reader fail in another way than with a `RequestError`, run without end or fill the memory.
"""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

from llm_adapters.errors import RequestError, first_line, shortened

LONGEST = 1_000_000  # characters of a YAML document that people write
_MOST_ITEMS = 100_000  # with each alias written out
_DEEPEST = 50


def read_yaml(path: Path, what: str) -> Any:
    """Read the YAML document in `path`.

    Args:
        path: the file.
        what: what it should be, for the message ("recipe").

    Raises:
        RequestError: the file cannot be read or is not YAML (with the line), or `load_yaml` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"the {what} {shortened(str(path))!r} does not exist. Check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise RequestError(f"the {what} {shortened(str(path))!r} cannot be read ({reason})") from None
    try:
        return load_yaml(text)
    except ValueError as error:
        raise RequestError(f"{str(path)!r} is not a YAML file that can be read: {error}") from None


def load_yaml(text: str) -> Any:
    """Plain values of a YAML document: texts, numbers, truth values, lists and mappings; dates stay texts.

    Raises:
        ValueError: it is not YAML, too long or too deep, refers to itself, or is too large with aliases written out.
    """
    import yaml

    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, and at most {LONGEST:,} are read")
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        _measure(node)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "").split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes 1e-4 for a number and a date for a text, as YAML 1.2 does; its errors have a line."""

        yaml_implicit_resolvers = {  # noqa: RUF012 -- PyYAML's own attribute
            letter: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
            for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=deep)
            except (yaml.YAMLError, RecursionError):
                raise
            except Exception as error:  # int("x"), {}["x"], ... of a value that is not what its tag says
                raise yaml.constructor.ConstructorError(
                    problem=f"{shortened(str(node.value), 40)!r} is no {node.tag.rpartition(':')[2]}",
                    problem_mark=node.start_mark,
                ) from error

    exponent = re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return Loader


def _measure(root: Any) -> None:
    """Count the items below a node, those of an alias each time, and refuse too many or too deep ones."""
    import yaml

    count, waiting = 0, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep, or refers to itself")
        if count > _MOST_ITEMS:
            raise ValueError(f"it has more than {_MOST_ITEMS:,} items once its aliases are written out")
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]


def typed(kind: type, document: object) -> Any:
    """Instance of the dataclass `kind` with the values of `document`; its keys and types are compared with the fields.

    Raises:
        ValueError: it is no mapping, a key is missing or unknown, or a value has another type.
    """
    if not isinstance(document, dict):
        raise ValueError(f"it is {_said(document)}, not an object")
    fields, required = _fields(kind)
    for name in required:
        if name not in document:
            raise ValueError(f"{name} is missing")
    for name, value in document.items():
        if name not in fields:
            raise ValueError(f"it has {shortened(str(name), 40)!r}, which is not one of {', '.join(fields)}")
        if not fits(value, fields[name]):
            raise ValueError(f"{name} is {_said(value)}: it must be {_words(fields[name])}")
    return kind(**document)


def fits(value: object, hint: Any) -> bool:
    """Tell if `value`, as JSON or YAML gives it, is of the type that `hint` names; numbers are finite."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inside)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(fits(item, inside[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inside) and all(map(fits, value, inside))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else hint)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


@functools.cache
def _fields(kind: type) -> tuple[dict[str, Any], list[str]]:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    unset = dataclasses.MISSING
    required = [f.name for f in fields if f.default is unset and f.default_factory is unset]
    return {f.name: hints[f.name] for f in fields}, required


_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}


def _words(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(hint))
    origin = typing.get_origin(hint) or hint
    return _WORDS.get(hint) or {dict: "an object", list: "a list", tuple: "a list"}.get(origin, str(hint))


def _said(value: object) -> str:
    return shortened(json.dumps(value, ensure_ascii=True, default=repr), 60)
