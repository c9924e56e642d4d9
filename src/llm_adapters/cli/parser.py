"""Turns typed functions into a command line: parameters become options, docstrings the help, types the checks."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_adapters.documents import load_yaml
from llm_adapters.errors import RequestError, unknown

Verb = Callable[..., None]
NAME = "llm-adapters"
LOADER = "bounded-yaml"  # our own name, as a loader is every parser's in the process


def parse(
    words: list[str], verbs: Mapping[str, str], moved: Mapping[str, str], version: str
) -> tuple[Verb, dict[str, Any]]:
    """Read the command line.

    Args:
        words: what was typed after the command's name.
        verbs: each verb (one word, or two for a group) and its function, as ``"module:function"``.
        moved: options that have become verbs, each as ``"verb --option"``, with what to type now.
        version: what `--version` prints.

    Returns:
        The verb's function and its arguments.

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
    verb = _verb(words, verbs)
    rest = words[len(verb.split()) :]
    for word in rest:
        option = word.partition("=")[0]
        if new := moved.get(f"{verb} {option}"):
            raise RequestError(f"{verb} {option} is a verb of its own now: {NAME} {new}")
    function = load(verbs[verb])
    return function, _arguments(function, rest, verb)


def load(row: str) -> Verb:
    """Import a verb's function.

    Args:
        row: ``"module:function"``.
    """
    module, _, name = row.partition(":")
    return getattr(importlib.import_module(module), name)


def _verb(words: list[str], verbs: Mapping[str, str]) -> str:
    """Verb that `words` begin with; prints the overview of a group that is named alone."""
    for count in (2, 1):
        if (verb := " ".join(words[:count])) in verbs:
            return verb
    group = {name: row for name, row in verbs.items() if name.startswith(words[0] + " ")}
    if not group:
        raise unknown("verb", words[0], {name.split()[0] for name in verbs})
    if len(words) == 1 or words[1] in ("-h", "--help"):
        print(_overview(group))
        raise SystemExit(0 if len(words) > 1 else 2)
    raise unknown(f"verb of {words[0]}", words[1], [name.split()[1] for name in group])


def _arguments(function: Verb, words: list[str], verb: str) -> dict[str, Any]:
    """Arguments for `function`; a recipe file's values are the defaults that options override."""
    recipe = next((name for name, kind in function.__annotations__.items() if kind == "Recipe"), None)
    parameters = inspect.signature(function).parameters
    if recipe is None:
        found = _parse(_parser(verb, function, typing.get_type_hints(function)), words, verb)
        return {name: _plain(found[name]) for name in parameters}
    from llm_adapters.training.recipe import Recipe, load_recipe, upgraded_options

    words = upgraded_options(words)
    sections = {f"--{name}": kind for name, kind in typing.get_type_hints(Recipe).items()}
    for word, value in zip(words, [*words[1:], ""], strict=False):
        option, equals, given = word.partition("=")
        mapping = (given if equals else value).lstrip().startswith("{")  # one way to give a section
        if option in sections and not mapping:
            key = dataclasses.fields(sections[option])[0].name
            raise RequestError(f"{option} is a section of the recipe. Did you mean {option}.{key}?")
    parser = _parser(verb, function, typing.get_type_hints(function, localns={"Recipe": Recipe}))
    found = _parse(parser, words, verb)
    if found.recipe_file is not None:
        parser.set_defaults(_flat(load_recipe(found.recipe_file).to_dict()))
        found = _parse(parser, words, verb)
    values = load_recipe({section: _plain(found[section]) for section in Recipe.__dataclass_fields__})
    return {recipe: values} | {name: _plain(found[name]) for name in parameters if name != recipe}


def _parser(verb: str, function: Verb, hints: dict[str, Any]) -> Any:
    """Parser of one verb: keyword-only parameters are options, the others are given by place."""
    from docstring_parser import parse as parse_docstring
    from jsonargparse import ArgumentParser, set_loader

    documented = parse_docstring(inspect.getdoc(function) or "")
    helps = {p.arg_name: (p.description or "").replace("%", "%%") for p in documented.params}
    set_loader(LOADER, load_yaml, (ValueError,))
    parser = ArgumentParser(
        prog=f"{NAME} {verb}",
        description=documented.short_description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=LOADER,
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
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            nargs: dict[str, Any] = {"nargs": "+"} if item else {} if required else {"nargs": "?"}
            parser.add_argument(name, type=_no_path(item or kind), **nargs, **options)
        elif item is not None:
            parser.add_argument(*_spellings(name), nargs="+", type=_no_path(item), required=required, **options)
        else:
            parser.add_argument(*_spellings(name), type=_no_path(kind), required=required, **options)
    return parser


def _parse(parser: Any, words: list[str], verb: str) -> Any:
    from argparse import ArgumentError

    from llm_adapters.compat.jsonargparse import readable

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the parser prints its whole usage at an error
            return parser.parse_args(words)
    except ArgumentError as error:
        raise RequestError(f"{readable(error)} (see {NAME} {verb} --help)") from None


def _item(kind: Any) -> Any:
    """Item type of `list[T]` and `list[T] | None`; None for other types."""
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
    """Parser's namespaces as dictionaries."""
    return value.as_dict() if hasattr(value, "as_dict") else value


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in recipe.items() for key, value in values.items()}


def _overview(verbs: Mapping[str, str]) -> str:
    width = max(map(len, verbs))
    lines = [f"usage: {NAME} VERB ...", ""]
    for name, row in verbs.items():
        summary = (inspect.getdoc(load(row)) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"  {name:<{width}}  {summary}")
    return "\n".join([*lines, "", f"{NAME} VERB --help shows a verb's options."])
