"""Every error text of jsonargparse that `compat.jsonargparse` turns into a sentence, made by the installed release.

A failure here after an upgrade means: the library words this mistake otherwise now. Correct the pattern of that name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from llm_adapters.compat.jsonargparse import readable


def message(kind: Any, *words: str) -> str:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--key", type=kind, required=not words)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(list(words))
    return readable(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "words", "sentence"),
    [
        ("type", int, ["--key", "few"], "key must be a whole number, not 'few'"),
        ("type or none", float | None, ["--key", "few"], "key must be a number, not 'few'"),
        ("union", int | bool, ["--key", "few"], "key must be a whole number or true or false, not 'few'"),
        ("choice", Literal["a", "b"], ["--key", "c"], "key must be one of 'a', 'b', not 'c'"),
        ("choice or none", Literal["a", "b"] | None, ["--key", "c"], "key must be one of 'a', 'b', not 'c'"),
        ("mapping or none", dict[str, int] | None, ["--key", "{a"], "key must be a mapping such as '{a: 1}', not '{a'"),
        ("value of a mapping", dict[str, int], ["--key", "{a: b}"], "key must be a whole number, not 'b'"),
        ("list", list[str], ["--key", "a"], "key must be a list such as '[a, b]', not 'a'"),
        ("unknown option", int, ["--kez", "1"], "unrecognized arguments: --kez 1"),
        ("no value", int, ["--key"], "argument --key: expected one argument"),
        ("missing option", int, [], "the following arguments are required: key"),
    ],
)
def test_a_mistake_reads_as_a_sentence(name: str, kind: Any, words: list[str], sentence: str) -> None:
    found = message(kind, *words)
    assert found == sentence, f"jsonargparse words the mistake {name!r} otherwise"


def test_a_group_that_is_no_mapping_is_named() -> None:
    @dataclass
    class Settings:
        size: int = 1

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Settings, "group")
    for words, sentence in (
        (["--group", "3"], "group: Unable to load config '3'"),
        (["--group", "{width: 3}"], "Group 'group' does not accept option 'width'"),
    ):
        with pytest.raises(ArgumentError) as caught:
            parser.parse_args(words)
        assert readable(caught.value) == sentence


def test_the_ceiling_is_there() -> None:
    """The texts are no interface: a new release is tried here before it is let in."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert any("jsonargparse" in line and "<" in line for line in project.splitlines())
