import json
import logging
import re
import subprocess
import sys

import pytest

from llm_adapters.errors import RequestError, WorkError
from llm_adapters.tasks import catalog, download
from llm_adapters.tasks.answers import KINDS
from llm_adapters.tasks.catalog import CATALOG, get, load_task, load_training_data
from llm_adapters.tasks.examples import Example

TESTS = (
    "multiarith gsm8k addsub aqua singleeq svamp mawps mathqa boolq piqa siqa hellaswag winogrande arc-easy "
    "arc-challenge obqa wordproblems"
)
TRAINING = (
    "gsm8k-train math-7k math-10k math-14k math-50k math-data commonsense-15k commonsense-170k alpaca-cleaned "
    "mawps-train wordproblems-train"
)


def test_the_names_of_the_command_line():
    assert " ".join(name for name, task in CATALOG.items() if task.split == "test") == TESTS
    assert " ".join(name for name, task in CATALOG.items() if task.split == "train") == TRAINING


@pytest.mark.parametrize("task", CATALOG.values(), ids=CATALOG)
def test_every_row_is_pinned_and_told(task):
    assert get(task.name) is task
    assert task.kind in KINDS
    assert task.licence
    assert task.description
    assert task.size is None or task.size > 0
    assert task.split == "train" or (task.size and task.kind != "text")
    if task.embedded:
        assert (task.blob, task.local) == ("", "")
        return
    assert re.fullmatch("[0-9a-f]{40}", task.blob)
    assert re.fullmatch("[0-9a-f]{40}", task.commit)
    assert task.url == f"https://raw.githubusercontent.com/{task.repository}/{task.commit}/{task.path}"
    assert task.local.startswith(task.repository.split("/")[1] + "/")


def test_places_and_files_are_distinct():
    files = [task for task in CATALOG.values() if not task.embedded]
    for attribute in ("url", "local", "blob"):
        assert len({getattr(task, attribute) for task in files}) == len(files)


def test_importing_the_catalogue_loads_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "numpy", "pooch", "requests", "rich", "yaml"}
    code = f"import sys, llm_adapters.tasks.catalog, llm_adapters.tasks.templates; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_an_unknown_name_lists_the_names():
    with pytest.raises(
        RequestError, match=r"unknown task 'gsm9k': choose one of gsm8k, addsub, .*Did you mean 'gsm8k'\?"
    ):
        load_task("gsm9k")
    with pytest.raises(RequestError, match=r"unknown training set 'math10k'.*Did you mean 'math-10k'\?"):
        load_training_data("math10k")


def test_word_problems_need_no_file_and_hide_their_responses():
    test, train = load_task("wordproblems"), load_training_data("wordproblems-train")
    assert (len(test), len(train)) == (300, 2000)
    assert not any(example.response for example in test)
    assert all(example.response and example.answer for example in train)


def test_limit_keeps_the_first_and_a_seed_shuffles_before():
    everything = load_task("wordproblems")
    assert load_task("wordproblems", limit=7) == everything[:7]
    assert load_task("wordproblems", limit=301) == everything
    assert load_training_data("wordproblems-train", limit=7) == load_training_data("wordproblems-train")[:7]
    shuffled = load_task("wordproblems", limit=20, seed=3)
    assert shuffled == load_task("wordproblems", seed=3)[:20]
    assert shuffled != everything[:20]
    assert shuffled != load_task("wordproblems", limit=20, seed=4)
    assert set(shuffled) < set(everything)
    for limit in (0, -1):
        with pytest.raises(RequestError, match=f"limit={limit} keeps no example"):
            load_task("wordproblems", limit=limit)
        with pytest.raises(RequestError, match=f"limit={limit} keeps no example"):
            load_training_data("wordproblems-train", limit=limit)


def test_what_cannot_be_measured_or_trained_on():
    with pytest.raises(RequestError, match="'alpaca-cleaned' has no gold answers"):
        load_task("alpaca-cleaned")
    with pytest.raises(RequestError, match="'svamp' is a test set"):
        load_training_data("svamp")
    with pytest.raises(RequestError, match="column map is for your own files"):
        load_training_data("gsm8k-train", {"question": "q"})


ROWS = {
    "svamp": {"instruction": "2 + 2?", "input": "", "output": "the model of old said 5", "answer": "4.0"},
    "math-data": {"instruction": "1 + 1?", "input": "", "output": "\nA: 2. The answer is 2.", "answer": "2.0"},
    "mawps-train": {"id": 1, "original_text": "3 + 3 ?", "segmented_text": "no", "equation": "x=3+3", "ans": 6.0},
    "gsm8k-train": {"question": "4 + 4?", "answer": "4 + 4 = <<4+4=8>>8\n#### 8"},
}
EXPECTED = {
    "svamp": Example("2 + 2?", answer="4.0"),
    "math-data": Example("1 + 1?", response="\nA: 2. The answer is 2."),
    "mawps-train": Example("3 + 3 ?", response="6.0", answer="6.0"),
    "gsm8k-train": Example("4 + 4?", response="4 + 4 = 8\n#### 8", answer="8"),
}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror with files of the catalogue's form and one made-up row; their blob ids are waived."""
    monkeypatch.setattr(download, "verify", lambda task, file, remedy: file)
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(tmp_path))

    def place(name, rows):
        file = tmp_path / CATALOG[name].local
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, rows)) if file.suffix == ".jsonl" else json.dumps(rows)
        file.write_text(text)

    return place


@pytest.mark.parametrize("name", ROWS)
def test_columns_of_the_catalogue(name, mirror):
    mirror(name, [ROWS[name]])
    load = load_task if CATALOG[name].split == "test" else load_training_data
    assert load(name) == [EXPECTED[name]]


def test_rows_without_a_response_are_left_out_and_counted_but_kept_for_comparing(mirror, caplog):
    empty = {**ROWS["math-data"], "instruction": "5 + 5?", "output": "\n"}
    mirror("math-data", [ROWS["math-data"], empty])
    with caplog.at_level(logging.WARNING):
        assert load_training_data("math-data") == [EXPECTED["math-data"]]
    assert "math-data: 1 of 2 examples have no response" in caplog.text
    assert [e.question for e in load_training_data("math-data", questions_only=True)] == ["1 + 1?", "5 + 5?"]
    mirror("svamp", [ROWS["svamp"]])
    assert load_training_data("svamp", questions_only=True) == [EXPECTED["svamp"]]


def test_a_persons_own_training_file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"q": "one?", "a": "1"}\n{"q": "two?", "a": ""}\n')
    columns = {"question": "q", "response": "a"}
    with pytest.raises(RequestError, match=r"own\.jsonl, line 2: the response \(column 'a'\) is empty"):
        load_training_data(path, columns)
    assert len(load_training_data(path, columns, questions_only=True)) == 2
    with pytest.raises(RequestError, match=r"no\.jsonl' does not exist"):
        load_training_data(tmp_path / "no.jsonl")


def own_task(folder, text, data='{"problem": "1 + 1?", "solution": 2}\n'):
    (folder / "data.jsonl").write_text(data)
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


OWN = "title: My task\nkind: number\nfile: data.jsonl\ncolumns: {question: problem, answer: solution}\n"


def test_a_persons_own_task(tmp_path, monkeypatch):
    path = own_task(tmp_path, OWN)
    monkeypatch.chdir("/")
    task = get(path)
    assert (task.name, task.title, task.kind, task.split) == ("mine", "My task", "number", "test")
    assert load_task(str(path)) == [Example("1 + 1?", answer="2")]
    with pytest.raises(RequestError, match="is a test set"):
        load_training_data(path)


def test_a_persons_own_training_task(tmp_path):
    text = OWN.replace("answer:", "response:").replace("kind: number", "split: train")
    assert load_training_data(own_task(tmp_path, text)) == [Example("1 + 1?", response="2")]
    with pytest.raises(RequestError, match=r"data\.jsonl, line 1: the response .* is empty"):
        load_training_data(own_task(tmp_path, text, '{"problem": "1?", "solution": ""}'))


def test_a_persons_own_task_by_address(tmp_path):
    blob = "0" * 40
    text = f"kind: letter\nurl: http://127.0.0.1:9/folder/data.json\nblob: '{blob}'\n"
    path = own_task(tmp_path, text)
    assert get(path).local == "mine/data.json"
    with pytest.raises(WorkError, match=r"fetching it from http://127\.0\.0\.1:9/folder/data\.json failed"):
        load_task(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN + "answer_kind: number", r"mine\.yaml: unknown key 'answer_kind': choose one of blob, columns, .*kind"),
        (OWN.replace("number", "digit"), r"mine\.yaml: unknown kind 'digit': choose one of boolean, letter, number"),
        (OWN + "split: dev", r"unknown split 'dev': choose one of test, train"),
        (OWN + "format: gsm", r"unknown format 'gsm': choose one of gsm8k, auto, plain"),
        (OWN.replace("kind: number\n", ""), r"add `kind`, one of number, letter"),
        (OWN.replace("title: My task", "title: 3"), r"title must be a text, not 3"),
        (OWN + "size: many", r"size must be a whole number, not 'many'"),
        (OWN.replace("{question: problem, answer: solution}", "[problem]"), r"columns must map"),
        (OWN.replace("problem", "prblem"), r"data\.jsonl has no column 'prblem'.*'problem', 'solution'"),
        (OWN.replace("question: problem", "query: problem"), r"unknown field 'query'"),
        (OWN.replace(", answer: solution", ""), r"no column for the answer.*'problem', 'solution'"),
        (OWN.replace("answer: solution", "answer: null"), r"'mine' has no gold answers"),
        (OWN.replace("data.jsonl", "none.jsonl"), r"none\.jsonl' of task 'mine' does not exist"),
        ("kind: number", r"either `file`, a path, or `url`"),
        (OWN + "url: http://a/b.json", r"either `file`, a path, or `url`"),
        ("kind: number\nurl: http://a/b.json", r"needs `blob`"),
        ("kind: number\nurl: ftp://a/b.json\nblob: " + "ab" * 20, r"is an http\(s\) address"),
        (f"name: ../up\nkind: number\nurl: http://a/b.json\nblob: {'ab' * 20}", r"'\.\./up/b\.json' does not"),
        ("- a\n- b", r"must hold a task"),
        ("kind: [", r"mine\.yaml' is not a YAML file"),
        (OWN + f"blob: {'ab' * 20}", None),
    ],
)
def test_what_can_be_wrong_with_a_task_file(tmp_path, text, message):
    path = own_task(tmp_path, text)
    with pytest.raises(RequestError if message else WorkError, match=message or "does not hold") as caught:
        load_task(path)
    assert "\n" not in str(caught.value)


def test_a_task_file_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=r"none\.yaml' does not exist"):
        get(tmp_path / "none.yaml")


@pytest.mark.shared
def test_the_shared_sets_have_the_size_that_the_catalogue_says(shared_data, monkeypatch):
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(shared_data))
    seen = 0
    for task in CATALOG.values():
        if task.embedded or not (shared_data / task.local).is_file():
            continue
        seen += 1
        if task.kind != "text":
            examples = load_task(task.name)
            assert all(example.answer for example in examples)
        examples = load_training_data(task.name, questions_only=True)
        assert len(examples) == task.size, task.name
    assert seen >= 17


@pytest.mark.shared
def test_the_shared_training_sets_have_responses(shared_data, monkeypatch):
    monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(shared_data))
    gsm8k = load_training_data("gsm8k-train")
    assert len(gsm8k) == 7473
    assert not any("<<" in example.response for example in gsm8k)
    assert all(example.response.endswith(f"#### {example.answer}") for example in gsm8k)
    assert len(load_training_data("math-data")) == 3257  # three of its 3,260 have no output


def test_no_two_rows_have_one_name():
    assert len(catalog.CATALOG) == len(list(catalog._rows()))
