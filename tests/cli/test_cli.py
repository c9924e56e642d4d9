"""The command line: help, exit codes, one sentence per mistake, and whole programs on a tiny model."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from llm_adapters.cli import MOVED, VERBS, main
from llm_adapters.cli.parser import load

COMMAND = [sys.executable, "-m", "llm_adapters.cli"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


def overrides(model: Path, **more: Any) -> list[str]:
    values = {
        "model.name": model,
        "data.train": "wordproblems-train",
        "data.template": "plain",
        "data.limit": 16,
        "training.epochs": 1,
        "training.batch_size": 8,
        "training.micro_batch_size": 8,
        **more,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_no_help_loads_torch() -> None:
    """A verb's help takes a second and a half with torch, and a tenth of that without."""
    code = """
import sys
from llm_adapters.cli import VERBS, main
for verb in ["", *VERBS]:
    try:
        main([*verb.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, verb
    loaded = {"torch", "transformers", "peft", "numpy", "datasets", "matplotlib"} & set(sys.modules)
    assert not loaded, (verb, loaded)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_each_of_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    import inspect

    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    function = load(VERBS[verb])
    for name in inspect.signature(function).parameters:
        assert name == "recipe" or name in shown.replace("-", "_")
        if name != "recipe":
            assert f"{name}:" in (function.__doc__ or "")


@pytest.mark.parametrize("option", sorted(MOVED))
@pytest.mark.parametrize("tail", [["a", "b"], []])
def test_an_option_that_became_a_verb_names_the_verb(
    option: str, tail: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    verb, _, flag = option.partition(" ")
    assert main([verb, flag, *tail]) == 2
    assert main([verb, f"{flag}=a", "--json"]) == 2
    (sentence, again) = capsys.readouterr().err.splitlines()
    assert sentence == again
    new = sentence.partition("is a verb of its own now: llm-adapters ")[2]
    assert " ".join(new.split()[:2]) in VERBS


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "unknown verb 'trian'"),
        (["data", "lst"], "unknown verb of data 'lst'"),
        (["train", "--output", "x", "--training.epoch", "3"], "--training.epoch"),
        (
            ["train", "--output", "x", "--training.epochs", "many"],
            "training.epochs must be a number above 0, not 'many'",
        ),
        (["train", "--output", "x", "--data.template", "chatty"], "must be one of 'alpaca', 'chat', 'plain', 'paper'"),
        (["train"], "output"),
        (["train", "--output", "x", "--model", "smollm2-135m"], "Did you mean --model.name?"),
        (["train", "--output", "x", "--training=3"], "Did you mean --training.epochs?"),
        (["train", "--output", "x", "--adapter.method", "lorra"], "choose one of lora, "),
        (["train", "--output", "x", "--adapter.options", "{a: &x {b: *x}}"], "adapter.options must be a mapping"),
        (["train", "--output", "y" * 300], "the name is too long"),
        (["train", "--output", "/dev/null/x"], "Not a directory"),
        (["evaluate", "--model", "x", "--tasks", "wordproblems", "--output", "/dev/null"], "'/dev/null' is a file"),
        (["convert", "x", "/dev/null/y"], "Not a directory"),
        (["demo", "--quick", "--output", "/dev/null/y"], "Not a directory"),
        (["train", "missing.yaml", "--output", "x"], "no recipe file 'missing.yaml'"),
        (["train", "--output", "x", "--adapter.method", "serial"], "unknown method 'serial'"),
        (["train", "--output", "x", "--adapter.options", "{rank: 3}"], "unknown option of lora 'rank'"),
        (["train", "--output", "x", "--model.name", "./no-such-folder"], "no-such-folder"),
        (["train", "--output", "x", "--data.train", "gsm9k"], "gsm9k"),
        (["train", "--output", "x", "--data.train", "missing.json"], "missing.json"),
        (["evaluate", "--model", "./no-such-folder", "--tasks", "wordproblems"], "no-such-folder"),
        (["evaluate", "--model", "x", "--tasks", "gsm9k"], "unknown"),
        (["evaluate", "--model", "x"], "no tasks given"),
        (["evaluate", "--tasks", "gsm8k"], "either a run folder or --model"),
        (
            ["evaluate", "--model", "x", "--tasks", "gsm8k", "--limit", "few"],
            "limit must be a whole number, at least 1",
        ),
        (
            ["evaluate", "--model", "x", "--tasks", "gsm8k", "--protocol", "p"],
            "must be one of 'default', 'strict', 'paper'",
        ),
        (
            ["evaluate", "--model", "x", "--tasks", "gsm8k", "--template", "t"],
            "template must be one of 'alpaca', 'chat'",
        ),
        (["evaluate", "--model", "x", "--tasks", "gsm8k", "--max-new-tokens", "-4"], "not '-4'"),
        (["chat", "--max-new-tokens", "0"], "at least 1"),
        (["results", "compare", "./no-such-folder", "./nor-this"], "'no-such-folder' holds no results"),
        (["results", "compare", "./no-such-folder"], "second"),
        (["results", "compare", "a", "b", "c"], "c"),
        (["results", "spread", "./no-such-folder", "b"], "no-such-folder"),
        (["results", "rescore", "./no-such-folder"], "no-such-folder"),
        (["results", "rescore", "x", "--protocol", "lenient"], "must be one of 'default', 'strict', 'paper'"),
        (["inspect", "./no-such-folder"], "no-such-folder"),
        (["convert", "./no-such-folder", "y"], "no-such-folder"),
        (["demo", "--quick", "--method", "serial"], "serial"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.strip().splitlines()[-1].startswith("llm-adapters: ")
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("training: {epochs: many}", "training.epochs must be a number above 0, not 'many'"),
        ("data: {limit: [1]}", "data.limit must be a whole number, at least 1 (and below 2^31), not '[1]'"),
        ("data: {template: chatty}", "data.template must be one of 'alpaca', 'chat', 'plain', 'paper', not 'chatty'"),
        ("training: {epoch: 1}", "unknown key of training 'epoch'"),
    ],
)
def test_a_wrong_value_in_a_recipe_is_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_an_unknown_test_set_is_told_before_the_training_set_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(tmp_path))
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path))
    assert main(["data", "check", "gsm8k-train", "--against", "svam"]) == 2
    assert "unknown task 'svam'" in capsys.readouterr().err


BAD_FILES = {
    "not-json.json": ("[{", "not JSON"),
    "no-column.json": ('[{"text": "a"}]', "no column for the question"),
    "empty.json": ("[]", "holds no examples"),
    "lines.jsonl": ('{"question": "a", "response": "b"}\n{"question"', "line 2"),
}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_a_bad_data_file_is_told(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, sentence = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    words = overrides(model, **{"data.train": tmp_path / name})
    assert main(["train", "--output", str(tmp_path / "run"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
def test_the_whole_way_from_recipe_to_scores(family: str, tmp_path: Path) -> None:
    """train, evaluate, compare with the base, in processes of their own, as a person would."""
    folder = save_tiny(tmp_path / family, family)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("adapter: {method: parallel, options: {bottleneck_size: 8}}\ntraining: {learning_rate: 0.01}\n")
    run = tmp_path / "run"

    def call(*words: object) -> dict[str, Any]:
        done = subprocess.run([*COMMAND, *map(str, words), "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # one document and nothing else

    manifest = call("train", recipe, "--output", run, *overrides(folder))
    assert manifest["adapter"]["method"] == "parallel"
    options = ("--tasks", "wordproblems", "--limit", 4, "--max-new-tokens", 4)
    scores = call("evaluate", run, *options)
    assert scores["tasks"]["wordproblems"]["total"] == 4
    assert len((run / "eval/default/wordproblems.jsonl").read_text().splitlines()) == 4
    assert json.loads((run / "eval/default/summary.json").read_text())["tasks"]["wordproblems"]["total"] == 4
    base = call("evaluate", "--model", folder, *options, "--output", tmp_path / "base")
    same = call("evaluate", "--model", folder, "--adapter", run / "adapter", *options)
    assert same["tasks"]["wordproblems"]["correct"] == scores["tasks"]["wordproblems"]["correct"]
    compared = call("results", "compare", tmp_path / "base", run)
    assert "wordproblems" in compared["tasks"]
    assert base["tasks"]["wordproblems"]["total"] == 4


def test_inspect_counts_what_training_would_train(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--method", "series", "--options", "{bottleneck_size: 8}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainable"] == 2 * (32 * 8 + 8 * 32)
    assert found["places"] == {"model.layers.*.mlp": 2}
    assert found["layers"] == 2


def test_data_list_names_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["datasets"]}
    assert {"multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp", "wordproblems", "gsm8k-train"} <= names


def test_chat_answers_until_the_input_ends(model: Path) -> None:
    words = [*COMMAND, "chat", str(model), "--template", "plain", "--max-new-tokens", "4"]
    done = subprocess.run(words, input="What is 2 plus 2?\nAnd 3?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_chat_draws_anew_for_a_question_that_is_asked_again(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*options: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 plus 2?\n" * 3))
        assert main(["chat", str(model), "--template", "plain", "--max-new-tokens", "6", *options]) == 0
        return capsys.readouterr().out.split("\n")[:3]

    drawn = told("--temperature", "2", "--top-k", "50", "--seed", "7")
    assert len(set(drawn)) == 3
    assert told("--temperature", "2", "--top-k", "50", "--seed", "8")[:2] == drawn[1:]
    assert main(["chat", str(model), "--top-k", "50"]) == 2
    assert "do nothing at temperature 0" in capsys.readouterr().err


def test_the_quick_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--output", str(tmp_path / "demo"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["before"]["total"] == result["after"]["total"] == 4
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    assert (Path(result["run"]) / "adapter" / "adapter_model.safetensors").is_file()


def test_tables_say_what_the_documents_say(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")

    def shown(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    run = tmp_path / "run"
    assert "16 examples of wordproblems-train" in shown("train", "--output", run, *overrides(model))
    options = ("--tasks", "wordproblems", "--limit", 3, "--max-new-tokens", 3)
    table = shown("evaluate", run, *options, "--html")
    assert "/3" in table
    assert "eval/default" in table
    assert (run / "eval/default/errors.html").read_text().startswith("<!doctype html>")
    shown("evaluate", "--model", model, *options, "--output", tmp_path / "base")
    assert "wordproblems" in shown("results", "compare", tmp_path / "base", run)
    assert "/3" in shown("results", "rescore", run, "--protocol", "strict", "--html")
    assert (run / "eval/default/rescored/strict/errors.html").is_file()
    assert "mean accuracy" in shown("results", "spread", tmp_path / "base", run)
    spread = json.loads(shown("results", "spread", tmp_path / "base", run, "--json"))
    assert spread["tasks"]["wordproblems"]["count"] == 2
    assert main(["results", "spread", str(run)]) == 2
    assert "model.layers.*.self_attn.q_proj" in shown("inspect", model, "--method", "lora")
    assert "grade-school" not in shown("data", "list")
    assert "embedded" in shown("data", "fetch", "wordproblems")
    checked = shown("data", "check", "wordproblems-train", "--against", "wordproblems")
    assert [word for word in checked.split() if word.isdigit()][:3] == ["300", "0", "0"]


def test_an_html_page_needs_a_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(model), "--tasks", "wordproblems", "--html"]) == 2
    assert "give --output" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 50, 30])
def test_a_name_to_copy_stays_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_adapters.tasks.catalog import CATALOG

    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in CATALOG)


def test_names_that_look_like_markup_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from llm_adapters.cli import tables

    tables.show("a [b] c [/red]", ("[bold]", "x"), [("[link=file:///etc]y[/]", "[/]"), ("\x1b]0;title\x07\x9bJ", "é")])
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\x9b") & set(shown)
    assert "\ufffd]0;title\ufffd\ufffdJ" in shown
    assert all(word in shown for word in ("a [b] c [/red]", "[bold]", "[link=file:///etc]y[/]", "[/]"))
