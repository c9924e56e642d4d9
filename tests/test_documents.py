"""Documents from others: whatever is in them, a value of the right type comes out, or one sentence."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llm_adapters.documents import LONGEST, fits, load_yaml, read_yaml, typed
from llm_adapters.errors import RequestError
from llm_adapters.files import load_json, read_json

MERGED = "base: &base {a: 1}\nmore: {<<: *base, b: [*base, *base]}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("a: 2026-01-02", {"a": "2026-01-02"}),
        ("", None),
        ("[1, 2.5, true, null, x]", [1, 2.5, True, None, "x"]),
        (MERGED, {"base": {"a": 1}, "more": {"a": 1, "b": [{"a": 1}, {"a": 1}]}}),
    ],
)
def test_what_people_write_is_read(text: str, value: Any) -> None:
    assert load_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: !!float x", "'x' is no float.*line 2"),
        ("a: !!python/object:os.system x", "line 1"),
        ("a: " + "9" * 6000, "is no int.*line 1"),
        ("a: !!timestamp 2026-99-99", "is no timestamp"),
        ("a: &a {b: *a}", "refers to itself"),
        ("? [1, 2]\n: 3", "line 1"),
        ("{" * 4000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested more than 50"),
        ("x: &a [" + "1," * 900 + "]\ny: [" + "*a," * 900 + "]", "aliases are written out"),
        ("a" * (LONGEST + 1), "at most"),
        ("a: \x00", "position|special characters"),
        ("a: [", "line"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_yaml(text)
    assert "\n" not in str(error.value)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RequestError, match="is not a YAML file that can be read"):
        read_yaml(tmp_path / "x.yaml", "recipe")


@pytest.mark.parametrize("path", ["none.yaml", "a" * 300, "\0", "."])
def test_a_file_that_cannot_be_opened_is_told(path: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot be read|does not exist"):
        read_yaml(tmp_path / path, "recipe")


@pytest.mark.parametrize(
    "text", ["NaN", "[" * 100_000, '{"a": -Infinity}', "9" * 5000, "{", '"\\uDBFF"', '{"\\ud800": 1}']
)
def test_json_that_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        load_json(text)


def test_json_that_people_write_is_read(tmp_path: Path) -> None:
    assert load_json('{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}') == {"a": "\U0001f600", "b": "\\ud800"}
    (tmp_path / "config.json").write_text('{"limits": [0.0, Infinity]}')  # as some models' configs have it
    assert read_json(tmp_path / "config.json") == {"limits": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(RequestError, match="nested too deeply"):
        read_json(tmp_path / "config.json")


@dataclass
class Row:
    name: str
    size: int | None
    share: float = 0.5
    seen: bool = False
    tags: dict[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] = (0, 1)


def test_a_document_of_the_right_types_becomes_an_object() -> None:
    assert typed(Row, {"name": "a", "size": None, "share": 1, "interval": [0.1, 2]}).share == 1


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "not an object"),
        ({"name": "a"}, "size is missing"),
        ({"name": 5, "size": 1}, "name is 5: it must be a text"),
        ({"name": "a", "size": True}, "size is true: it must be a whole number or null"),
        ({"name": "a", "size": 1, "share": float("nan")}, "share is NaN: it must be a finite number"),
        ({"name": "a", "size": 1, "share": 10**400}, "share is 1000.*: it must be a finite number"),
        ({"name": "a", "size": 1, "seen": 1}, "seen is 1: it must be true or false"),
        ({"name": "a", "size": 1, "tags": []}, "must be an object"),
        ({"name": "a", "size": 1, "interval": [1]}, "must be a list"),
        ({"name": "a", "size": 1, "colour": 1}, "'colour', which is not one of name, size"),
    ],
)
def test_a_document_of_other_types_is_told(document: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        typed(Row, document)


def test_a_list_fits_only_with_all_its_items() -> None:
    assert fits(["a"], list[str])
    assert not fits(["a", 1], list[str])
