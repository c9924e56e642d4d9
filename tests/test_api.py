"""A recipe means the same from Python and from the command line; what `train` returns can be evaluated as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

import llm_adapters
from llm_adapters.cli import main
from llm_adapters.errors import RequestError
from llm_adapters.runs import RunFolder

TASKS = {"tasks": ["wordproblems"], "limit": 4, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def recipe(model: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "adapter": {"method": "series", "options": {"bottleneck_size": 8}},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 16, "max_length": 256},
        "training": {"epochs": 1, "batch_size": 8},
        **sections,
    }


def test_the_tasks_of_a_recipe_are_measured_from_python_as_from_the_command_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = recipe(model, evaluation=TASKS)
    run = llm_adapters.train(document, tmp_path / "python", progress=False)
    assert run.evaluation.tasks["wordproblems"].total == 4
    assert (run.folder / "eval/default/summary.json").is_file()
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))  # JSON is YAML
    assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "shell"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["final_loss"] == run.manifest["final_loss"]
    for key in ("correct", "total", "tokens"):
        shell = printed["evaluation"]["tasks"]["wordproblems"][key]
        assert shell == run.evaluation.to_dict()["tasks"]["wordproblems"][key]
    records = [(tmp_path / name / "eval/default/wordproblems.jsonl").read_text() for name in ("python", "shell")]
    assert records[0] == records[1]


def test_a_run_is_evaluated_as_train_returns_it(model: Path, tmp_path: Path) -> None:
    run = llm_adapters.train(recipe(model), tmp_path / "run", progress=False)
    assert run.evaluation is None
    assert not (run.folder / "eval").exists()
    found = llm_adapters.evaluate(run, **TASKS)
    assert found.folder == run.folder / "eval/default"
    assert found.about["template"] == {"name": "plain", "origin": "the adapter's own"}
    assert found.tasks["wordproblems"].seen == 0  # the manifest knows the questions trained on
    assert found.about["versions"].items() <= run.manifest["versions"].items()  # one spelling of each name
    by_folder = llm_adapters.evaluate(llm_adapters.load(run.folder), **TASKS)
    assert by_folder.records == found.records
    assert llm_adapters.load(run).adapter == llm_adapters.load(RunFolder(run.folder)).adapter == run.adapter


def test_a_task_that_does_not_exist_is_told_before_anything_is_trained(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="gsm9k"):
        llm_adapters.train(recipe(model, evaluation={"tasks": ["gsm9k"]}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "message"), [(3, "of type int is not a model"), ("x" * 5000, "5000 characters"), ("a\0b", "character")]
)
def test_what_cannot_name_a_model(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm_adapters.evaluate(value, **TASKS)


def test_a_run_that_was_killed_in_its_evaluation_goes_on_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_adapters.evaluation.records import Journal

    class Killed(BaseException):
        pass

    document = recipe(model, evaluation=TASKS)
    whole = llm_adapters.train(document, tmp_path / "whole", progress=False)
    added = Journal.add

    def add(self: Journal, *record: Any) -> None:
        added(self, *record)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", add)
        with pytest.raises(Killed):
            llm_adapters.train(document, tmp_path / "cut", progress=False)
    (tmp_path / "cut" / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # killed before it was deleted, too
    (tmp_path / "cut" / "eval" / "default" / ".summary.json.abcd1234.tmp").touch()
    run = llm_adapters.train(document, tmp_path / "cut", progress=False)
    assert run.manifest["final_loss"] == whole.manifest["final_loss"]
    assert run.log[-1]["step"] == whole.log[-1]["step"]
    results = [
        {file.relative_to(it.folder): file.read_text() for file in it.folder.rglob("eval/default/*.jsonl")}
        for it in (run, whole)
    ]
    assert results[0] == results[1]
    names = [sorted(file.relative_to(it.folder) for file in it.folder.rglob("*")) for it in (run, whole)]
    assert names[0] == names[1]
    with pytest.raises(RequestError, match="already holds a finished run"):
        llm_adapters.train(document, tmp_path / "cut", progress=False)


def test_an_unknown_task_is_told_before_the_training(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="wordproblem"):
        llm_adapters.train(recipe(model, evaluation={"tasks": ["wordproblem"]}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
