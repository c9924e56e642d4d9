"""docs/capabilities.md says what the tests prove, no more and no less, and so do the rows of the methods."""

import subprocess
import sys
from pathlib import Path

import pytest
from capabilities import Claim, cells, table

from llm_adapters.methods import CAPABILITIES, METHODS

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "capabilities.md"


def test_the_table_is_what_the_tests_prove(tmp_path: Path) -> None:
    file = tmp_path / "capabilities.md"
    tests = [str(f) for f in sorted(ROOT.glob("tests/**/test_*.py")) if "@pytest.mark.proves(" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-m", "proves", "--capabilities", str(file)]
    subprocess.run([*command, *tests], check=True, capture_output=True, cwd=ROOT)
    proven, committed = cells(file.read_text()), cells(COMMITTED.read_text())
    differing = [cell for cell in proven.keys() | committed.keys() if proven.get(cell) != committed.get(cell)]
    assert not differing, "write it again: pytest -m proves --capabilities docs/capabilities.md"
    assert file.read_text() == COMMITTED.read_text()


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_the_rows_of_the_methods_say_the_same(row) -> None:
    committed = cells(COMMITTED.read_text())
    properties = dict(zip(CAPABILITIES, ("merges", "mixed batch", "gradient checkpointing"), strict=True))
    for capability, name in properties.items():
        declared = None if row.can is None else capability in row.can
        shown = committed[row.name, name]
        assert {True: len(shown) == 1, False: shown.startswith(("refused ", "no ")), None: shown == "untested"}[
            declared
        ]


def test_a_table_says_who_was_seen_where() -> None:
    text = table(
        [
            Claim("lora", "llama", "merges"),
            Claim("lora", "bloom", "merges"),
            Claim("series", "llama", "merges", "refused"),
            Claim("fusion", "llama", "formula"),
        ]
    )
    shown = cells(text)
    assert shown["lora", "merges"] == "A"
    assert shown["series", "merges"] == "refused B"
    assert shown["fusion", "formula"] == "B"
    assert shown["fusion", "starts as the base"] == "n/a"
    assert shown["lora", "formula"] == shown["series", "quantised base"] == "untested"
    assert "**A**, 2 families: llama, bloom\n" in text
    assert "**B**, 1 family: llama\n" in text
    with pytest.raises(ValueError, match="both proven and not on llama"):
        table([Claim("lora", "llama", "merges"), Claim("lora", "llama", "merges", "no")])


BAD = {"method": "serial", "family": "lama", "property": "merged"}


@pytest.mark.parametrize("what", BAD)
def test_a_claim_of_something_else_is_an_error(what: str) -> None:
    from capabilities import claims_of

    claim = {"method": "lora", "family": "llama", "property": "merges"} | {what: BAD[what]}

    class Item:
        nodeid = "test.py::test"

        def iter_markers(self, name: str):
            yield pytest.mark.proves(claim["property"], method=claim["method"], family=claim["family"]).mark

    with pytest.raises(ValueError, match=f"the table has no '{BAD[what]}'"):
        list(claims_of(Item()))
