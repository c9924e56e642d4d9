"""A fast sample of the bad inputs; all of them: python tests/support/bad_inputs.py --show."""

import json
import subprocess
import sys
from pathlib import Path

import bad_inputs
import pytest


def test_the_seed_decides_the_cases_and_there_are_thousands() -> None:
    every = bad_inputs.generate(3, 10**6)
    assert len(every) >= 2000
    assert {case.kind for case in every} >= {
        "command line",
        "recipe",
        "data",
        "task",
        "adapter",
        "model",
        "legacy",
        "run",
    }
    names = [(case.kind, case.name) for case in bad_inputs.generate(3, 100)]
    assert names == [(case.kind, case.name) for case in bad_inputs.generate(3, 100)]
    assert names != [(case.kind, case.name) for case in bad_inputs.generate(4, 100)]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it forks")
def test_a_sample_of_bad_inputs_is_refused_in_a_sentence(tmp_path: Path) -> None:
    words = [sys.executable, bad_inputs.__file__, "--cases", "32", "--seed", "5"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    result = json.loads(done.stdout)
    assert result["faults"] == []
    assert done.returncode == 0
    assert result["must_be_refused"] > 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it forks")
@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("raise KeyError('x')", "a traceback"),
        ("return 0", "taken: exit code 0"),
        ("open('run.tmp', 'w'); print('no'); return 2", "left behind: ['run.tmp']"),
        ("import os; os.mkdir('out'); print('no'); return 2", "half-written: ['out']"),
        ("return 2", "no word"),
        ("import time; time.sleep(60)", "no end within 0.5 s"),
        ("print('no'); return 2", None),
    ],
)
def test_the_judge_sees_each_fault(
    body: str, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space: dict[str, object] = {}
    exec(f"def main(words):\n {body}", space)
    monkeypatch.setattr("llm_adapters.cli.main", space["main"])
    monkeypatch.setattr(bad_inputs, "SECONDS", 0.5 if "time" in body else 30.0)
    folder = tmp_path / "case"
    folder.mkdir()
    faults = bad_inputs.judge(bad_inputs.Case("x", "x", ("x",), True), folder, tmp_path / "log")
    assert (fault in faults) if fault else faults == []
