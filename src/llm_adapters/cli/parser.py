"""Turns typed functions into a command line: parameters become options, docstrings the help, types the checks."""

import contextlib
import inspect
import io
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_adapters.errors import RequestError, unknown

Verb = Callable[..., None]
NAME = "llm-adapters"


def parse(
    words: list[str], verbs: Mapping[str, Verb], positional: Mapping[str, Mapping[str, str | None]], version: str
) -> tuple[str, dict[str, Any]]:
    """Read the command line.

    Args:
        words: what was typed after the command's name.
        verbs: each verb (one word, or two for a group) and its function.
        positional: for a verb, its parameters that are given by place, with argparse's `nargs`.
        version: what `--version` prints.

    Returns:
        The verb and the arguments for its function.

    Raises:
        RequestError: unknown verb or option, or a value of the wrong type; one sentence that names it.
        SystemExit: after printing help or version.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_overview(verbs))
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        print(version)
        raise SystemExit(0)
    verb = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in verbs), None)
    if verb is None:
        group = {name: function for name, function in verbs.items() if name.startswith(words[0] + " ")}
        if group and (len(words) == 1 or words[1] in ("-h", "--help")):
            print(_overview(group))
            raise SystemExit(0 if len(words) > 1 else 2)
        if group:
            raise unknown(
                f"verb of {words[0]}", words[1] if len(words) > 1 else "", [name.split()[1] for name in group]
            )
        raise unknown("verb", words[0], {name.split()[0] for name in verbs})
    from llm_adapters.training.recipe import (  # not for the overview, which is to be instant
        Recipe,
        load_recipe,
        upgraded_options,
    )

    rest = upgraded_options(words[len(verb.split()) :])
    hints = typing.get_type_hints(verbs[verb], localns={"Recipe": Recipe})
    parser = _parser(verb, verbs[verb], hints, positional.get(verb, {}))
    asked = _parse(parser, rest, verb)
    parameters = inspect.signature(verbs[verb]).parameters
    recipe_name = next((name for name, kind in hints.items() if kind is Recipe), None)
    if recipe_name is None:
        return verb, {name: _plain(asked[name]) for name in parameters}
    if asked.recipe_file is not None:
        # The file's values become the defaults, which the options of the command line then override.
        parser.set_defaults(_flat(load_recipe(asked.recipe_file).to_dict()))
        asked = _parse(parser, rest, verb)
    recipe = load_recipe({section: _plain(asked[section]) for section in Recipe.__dataclass_fields__})
    return verb, {recipe_name: recipe} | {name: _plain(asked[name]) for name in parameters if name != recipe_name}


def _parser(verb: str, function: Verb, hints: dict[str, Any], places: Mapping[str, str | None]) -> Any:
    from docstring_parser import parse as parse_docstring
    from jsonargparse import ArgumentParser

    documented = parse_docstring(inspect.getdoc(function) or "")
    helps = {p.arg_name: (p.description or "").replace("%", "%%") for p in documented.params}
    parser = ArgumentParser(
        prog=f"{NAME} {verb}", description=documented.short_description, exit_on_error=False, allow_abbrev=False
    )
    for name, parameter in inspect.signature(function).parameters.items():
        kind, text = hints[name], helps.get(name, "")
        required = parameter.default is inspect.Parameter.empty
        item = _item(kind)
        options: dict[str, Any] = {"help": text} if required else {"help": text, "default": parameter.default}
        if hasattr(kind, "__dataclass_fields__"):
            parser.add_argument("recipe_file", nargs="?", type=str, metavar="RECIPE.yaml", help=text)
            parser.add_class_arguments(kind)
        elif kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        elif name in places:
            nargs: dict[str, Any] = {"nargs": places[name]} if places[name] else {}
            parser.add_argument(name, type=_no_path(item or kind), **nargs, **options)
        elif item is not None:
            parser.add_argument(*_spellings(name), nargs="+", type=_no_path(item), required=required, **options)
        else:
            parser.add_argument(*_spellings(name), type=_no_path(kind), required=required, **options)
    return parser


def _parse(parser: Any, words: list[str], verb: str) -> Any:
    from argparse import ArgumentError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the parser prints its whole usage at an error
            return parser.parse_args(words)
    except ArgumentError as error:
        raise RequestError(f"{_sentence(error)} (see {NAME} {verb} --help)") from None


def _sentence(error: Exception) -> str:
    """The parser's message as one sentence in plain words."""
    text = " ".join(str(error).split())
    if union := re.search(r"^(.*?): Does not validate against any of the Union subtypes.*Given value: (.*)$", text):
        types = [t for t in re.findall(r"<class '(\w+)'>", text.partition("Errors:")[0]) if t != "NoneType"]
        text = f"{union[1]}: Expected a {' or '.join(dict.fromkeys(types))}. Got value: {union[2]}"
    text = re.sub(r'^Parser key "([\w.]+)": *', r"\1: ", text)
    text = re.sub(r"Expected an? typing\.Literal\[(.*?)\]\.", r"choose one of \1.", text)
    text = re.sub(r"Expected an? (?:<class '(\w+)'>|([^.]+))\.", lambda m: f"a {m[1] or m[2]} is needed.", text)
    return re.sub(r"\s*Got value: (.*)", r" Got \1", text).rstrip(".")


def _item(kind: Any) -> Any:
    """The item type of `list[T]` and `list[T] | None`; None for other types."""
    for option in (kind, *typing.get_args(kind)):
        if typing.get_origin(option) is list:
            return typing.get_args(option)[0]
    return None


def _spellings(name: str) -> list[str]:
    """``--max-new-tokens``, and ``--max_new_tokens`` for those who think of the Python parameter."""
    return list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))


def _no_path(kind: Any) -> Any:
    """Paths are read as text, whose defaults the parser shows as they are; a function takes either."""
    return str if Path in (kind, *typing.get_args(kind)) else kind


def _plain(value: Any) -> Any:
    """The parser's namespaces as dictionaries."""
    return value.as_dict() if hasattr(value, "as_dict") else value


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in recipe.items() for key, value in values.items()}


def _overview(verbs: Mapping[str, Verb]) -> str:
    width = max(map(len, verbs))
    lines = [f"usage: {NAME} VERB ...", ""]
    for name, function in verbs.items():
        summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"  {name:<{width}}  {summary}")
    return "\n".join([*lines, "", f"{NAME} VERB --help shows a verb's options."])
