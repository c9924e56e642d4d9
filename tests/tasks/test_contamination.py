"""What `data check` reports: the leaks of the paper's first training set, and duplicates among the test sets."""

import json
from pathlib import Path

import pytest

from llm_adapters.tasks import contamination

# facts about the paper's data, counted independently: after lower-casing and dropping all but letters and digits
FIRST_TRAINING_SET = {"multiarith": 491, "gsm8k": 1055, "addsub": 334, "aqua": 203, "singleeq": 428, "svamp": 800}
MAWPS = {"addsub": 327, "multiarith": 490, "singleeq": 436, "mawps": 28, "gsm8k": 0, "aqua": 0, "svamp": 0}


@pytest.mark.shared
@pytest.mark.parametrize(("train", "expected"), [("math-data", FIRST_TRAINING_SET), ("mawps-train", MAWPS)])
def test_the_known_leaks_are_found(
    train: str, expected: dict[str, int], shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(shared_data))
    report = contamination.check(train, list(expected))
    assert {name: r["exact"] for name, r in report.items()} == expected


@pytest.mark.shared
def test_the_test_sets_repeat_each_other(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(shared_data))
    found = contamination.duplicates(["multiarith", "addsub", "singleeq", "mawps"])
    assert (found["within"]["multiarith"], found["within"]["singleeq"]) == (20, 1)
    assert found["across"]["addsub & singleeq"] == 126
    assert {pair: n for pair, n in found["across"].items() if pair.endswith("mawps")} == {
        "multiarith & mawps": 53,
        "addsub & mawps": 58,
        "singleeq & mawps": 62,
    }


def test_a_persons_own_files_are_checked_too(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text('{"question": "What is 1 + 1?"}\n{"question": "Who are you?"}\n')
    data = tmp_path / "test.jsonl"
    data.write_text('{"question": "what is 1+1", "answer": "2"}\n{"question": "What is  1 + 1 ?", "answer": "2"}\n')
    task = tmp_path / "task.yaml"
    task.write_text(f"name: mine\nkind: number\nsplit: test\nfile: {data.name}\n")
    report = contamination.check(str(train), [str(task)])
    assert (report[str(task)]["total"], report[str(task)]["exact"]) == (2, 2)
    assert contamination.duplicates([str(task)]) == {"within": {str(task): 1}, "across": {}}


def test_a_question_of_an_earlier_turn_leaks_too(tmp_path: Path) -> None:
    test = {"question": "Tom has 3 apples. How many?", "answer": "3"}
    turns = [("user", test["question"]), ("assistant", "3"), ("user", "Sure?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": messages}))
    (tmp_path / "test.jsonl").write_text(json.dumps(test))
    (tmp_path / "test.yaml").write_text("kind: number\nfile: test.jsonl\n")
    task = str(tmp_path / "test.yaml")
    assert contamination.check(str(tmp_path / "train.jsonl"), [task])[task]["exact"] == 1
