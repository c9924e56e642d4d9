import json
import types

import peft
import pytest
import torch
import yaml
from tiny import POSITIONS, save_tiny

from llm_adapters.errors import RequestError
from llm_adapters.evaluation import compare_evaluations, evaluate, read_evaluation, rescore, runner
from llm_adapters.generation import generator as generation
from llm_adapters.generation.generator import Generation
from llm_adapters.models import load_base
from llm_adapters.tasks import leakage
from llm_adapters.tasks.templates import encode_prompt, render_prompt

OUTPUTS = {
    "one": "1 + 4 = 5\nThe answer is 5.",  # right
    "two": "The answer is 6. No: 7.",  # wrong; the last number, which the paper's rule takes, is right
    "three": "I do not know.",  # no answer
    "four": "so 4 and 4 make 9",  # right, but declared nowhere
}
LABELS = {"one": "5.0", "two": "7", "three": "1", "four": "9"}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def task(tmp_path):
    """A person's own task of four questions."""
    lines = [{"question": question, "answer": label} for question, label in LABELS.items()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.yaml").write_text("kind: number\nfile: own.jsonl\n")
    return str(tmp_path / "own.yaml")


@pytest.fixture
def scripted(monkeypatch):
    """Answers come from OUTPUTS; the list holds the questions in the order in which they were asked."""
    asked = []

    def generate(generator, prompts, on_token=None):
        options = {name: getattr(generator, name) for name in ("max_new_tokens", "num_beams", "batch_size")}
        for index, ids in enumerate(prompts):
            prompt = generator.tokenizer.decode(ids)
            question = next(word for word in OUTPUTS if f"\n{word}\n" in prompt or f" {word}\n" in prompt)
            asked.append(types.SimpleNamespace(question=question, prompt=prompt, **options))
            yield (
                index,
                Generation(
                    OUTPUTS[question], tuple(range(10)), "length" if question == "three" else "stop", seconds=0.5
                ),
            )

    monkeypatch.setattr(generation.Generator, "generate", generate)
    return asked


def make_run(base, run, template="plain", manifest=None, trained=True):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=not trained)
    adapted = peft.get_peft_model(load_base(base).model, config)
    adapted.save_pretrained(run / "adapter")
    config = {"model": {"name": str(base), "dtype": "float32"}, "data": {"template": template}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if manifest is not None:
        (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_the_whole_way_on_a_tiny_model(base, tmp_path):
    found = evaluate(base, tasks=["wordproblems"], limit=6, max_new_tokens=12, output=tmp_path, batch_size=4)
    loaded = load_base(base)
    records = found.records["wordproblems"]
    prompts = [render_prompt("alpaca", record.question) for record in records]
    encoded = [encode_prompt(loaded.tokenizer, prompt, template="alpaca") for prompt in prompts]
    answers = dict(generation.generate(loaded.model, loaded.tokenizer, encoded, max_new_tokens=12, batch_size=1))
    assert [record.index for record in records] == list(range(6))
    assert [record.prompt for record in records] == prompts
    assert [record.output for record in records] == [answers[index].text for index in range(6)]
    assert [record.tokens for record in records] == [answers[index].computed for index in range(6)]
    result = found.tasks["wordproblems"]
    assert result.total == 6
    assert result.correct == sum(record.correct for record in records)
    assert result.tokens == sum(record.tokens for record in records)
    assert result.batch_size == 4
    assert result.seconds > 0
    again = read_evaluation(tmp_path)
    assert again.records == found.records
    assert again.tasks == found.tasks
    assert sorted(path.name for path in found.folder.iterdir()) == ["summary.json", "wordproblems.jsonl"]


def test_an_adapter_that_does_nothing_is_measured_only_if_that_is_allowed(base, task, tmp_path, scripted):
    run = make_run(base, tmp_path / "run", trained=False)
    with pytest.raises(RequestError, match=r"does nothing.*allow_untrained=True"):
        evaluate(run, tasks=[task])
    assert not (run / "eval").exists()
    assert not scripted
    assert evaluate(run, tasks=[task], allow_untrained=True).tasks["own"].total == 4


def test_the_summary_says_whether_the_base_is_the_adapters_own(base, task, tmp_path, scripted):
    run = make_run(base, tmp_path / "run")
    assert evaluate(run, tasks=[task]).about["model"]["base_of_adapter"] == "not known"
    note = {"template": "plain", "base_weights": load_base(base).weights_fingerprint()}
    (run / "adapter" / "llm_adapters.json").write_text(json.dumps(note))
    assert evaluate(run, tasks=[task]).about["model"]["base_of_adapter"] == "the same"
    twin = save_tiny(tmp_path / "twin", seed=3)
    with pytest.raises(RequestError, match="another base model"):
        evaluate(twin, run / "adapter", tasks=[task])
    found = evaluate(twin, run / "adapter", tasks=[task], allow_other_base=True, check_invariance=1, dtype="bfloat16")
    assert found.about["model"]["base_of_adapter"] == "another"


def test_scores_and_summary(base, task, tmp_path, scripted):
    found = evaluate(base, tasks=[task], output=tmp_path / "out", dtype="float32")
    result = found.to_dict()["tasks"]["own"]
    assert (result["correct"], result["total"], result["accuracy"]) == (2, 4, 0.5)
    # Wilson by hand for 2 of 4: z² / n = 3.8415 / 4 = 0.96036; (0.5 + 0.48018 ± 1.96 sqrt(0.0625 + 0.06002)) / 1.96036
    assert result["interval"] == pytest.approx([0.15004, 0.84996], abs=1e-5)
    assert (result["unanswered"], result["unfinished"], result["skipped"]) == (1, 1, 0)
    assert result["tokens"] == 4 * 10 + 3
    assert result["seconds"] == 4 * 0.5
    assert result["tokens_per_second"] == 43 / 2
    assert [record.extracted for record in found.records["own"]] == [5.0, 6.0, None, 9.0]
    summary = json.loads((tmp_path / "out" / "eval" / "default" / "summary.json").read_text())
    assert summary == found.to_dict()
    assert summary["precision"] == "float32"
    assert summary["template"] == {"name": "alpaca", "origin": "default for a bare model"}
    assert summary["protocol"]["max_new_tokens"] == 256
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["model"]["fingerprint"] == load_base(base).fingerprint()


def test_a_bare_model_without_output_leaves_nothing(base, task, tmp_path, scripted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = evaluate(base, tasks=[task])
    assert found.folder is None
    assert sorted(tmp_path.rglob("*")) == before
    assert evaluate(load_base(base), tasks=task).tasks["own"].correct == 2  # a loaded model, and a task by itself


def test_a_run_is_evaluated_with_its_own_template_and_in_its_folder(base, task, tmp_path, scripted):
    run = make_run(base, tmp_path / "run")
    found = evaluate(run, tasks=[task])
    assert found.folder == run / "eval" / "default"
    assert found.about["template"] == {"name": "plain", "origin": "the adapter's own"}
    assert scripted[0].prompt == "Question: one\nAnswer:\n"
    other = evaluate(run, tasks=[task], template="alpaca", output=tmp_path / "other")
    assert other.folder == tmp_path / "other" / "eval" / "default"
    assert other.about["template"] == {"name": "alpaca", "origin": "asked for"}


def test_an_adapter_on_a_base_uses_the_template_beside_its_weights(base, task, tmp_path, scripted):
    adapter = make_run(base, tmp_path / "run") / "adapter"
    assert evaluate(base, adapter, tasks=[task]).about["template"]["name"] == "alpaca"
    (adapter / "llm_adapters.json").write_text('{"template": "plain"}')
    found = evaluate(base, adapter, tasks=[task])
    assert found.about["template"]["name"] == "plain"
    assert found.about["model"]["adapter"] == str(adapter)
    assert found.folder is None


def test_protocols_differ_in_prompt_search_and_reading(base, task, tmp_path, scripted):
    found = {
        name: evaluate(base, tasks=[task], protocol=name, output=tmp_path) for name in ("default", "strict", "paper")
    }
    correct = {name: [record.correct for record in each.records["own"]] for name, each in found.items()}
    assert correct == {
        "default": [True, False, False, True],
        "strict": [True, False, False, False],
        "paper": [True, True, False, True],
    }
    assert [(each.num_beams, each.max_new_tokens) for each in scripted[::4]] == [(1, 256), (1, 256), (4, 256)]
    assert scripted[8].prompt == render_prompt("paper", "one")
    assert found["paper"].about["template"] == {"name": "paper", "origin": "protocol paper"}
    assert "4 beams" in found["paper"].about["protocol"]["changes"]
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["default", "paper", "strict"]


def test_rescoring_equals_having_asked_so(base, task, tmp_path, scripted):
    evaluate(base, tasks=[task], output=tmp_path)
    strict = evaluate(base, tasks=[task], output=tmp_path, protocol="strict")
    asked = len(scripted)
    again = rescore(tmp_path, "strict")
    assert len(scripted) == asked
    assert again.records == strict.records
    assert again.tasks["own"].correct == strict.tasks["own"].correct
    assert again.folder == tmp_path / "eval" / "default" / "rescored" / "strict"
    assert "strict" in read_evaluation(again.folder).about["rescored"]
    assert [record.correct for record in rescore(tmp_path, "paper").records["own"]] == [True, True, False, True]
    assert read_evaluation(tmp_path).tasks["own"].correct == 2  # the original stays
    with pytest.raises(RequestError, match="unknown protocol 'old'"):
        rescore(tmp_path, "old")
    with pytest.raises(RequestError, match="holds no results"):
        rescore(tmp_path / "eval", "strict")


def test_comparing_two_evaluations(base, task, tmp_path, scripted):
    evaluate(base, tasks=[task], output=tmp_path / "a")
    evaluate(base, tasks=[task], output=tmp_path / "b", protocol="paper")
    found = compare_evaluations(tmp_path / "a", tmp_path / "b" / "eval" / "paper")["own"].to_dict()
    assert (found["first"], found["second"], found["gained"], found["lost"]) == (0.5, 0.75, 1, 0)
    assert found["flipped"] == [
        {"index": 1, "question": "two", "label": "7", "first": 6.0, "second": 7.0, "gained": True}
    ]
    fewer = evaluate(base, tasks=[task], limit=1)
    assert compare_evaluations(fewer, tmp_path / "a")["own"].comparison.total == 1
    fewer.records["own"][0] = fewer.records["own"][0].__class__(**vars(fewer.records["own"][0]) | {"question": "other"})
    with pytest.raises(RequestError, match="own: question 0 is not the same"):
        compare_evaluations(fewer, tmp_path / "a")


def test_an_interrupted_evaluation_goes_on_where_it_stopped(base, task, tmp_path, scripted, monkeypatch):
    expected = evaluate(base, tasks=[task]).records
    calls = []
    original = runner._record

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_record", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            evaluate(base, tasks=[task], output=tmp_path)
    folder = tmp_path / "eval" / "default"
    assert [path.name for path in folder.iterdir()] == [".own.partial.jsonl"]
    del scripted[:]
    found = evaluate(base, tasks=[task], output=tmp_path)
    assert [each.question for each in scripted] == ["three", "four"]
    assert found.records == expected
    assert sorted(path.name for path in folder.iterdir()) == ["own.jsonl", "summary.json"]
    del scripted[:]
    evaluate(base, tasks=[task], output=tmp_path)  # a complete one is done again when it is asked for again
    assert len(scripted) == 4


def test_a_finished_task_of_an_interrupted_evaluation_is_not_asked_again(base, task, tmp_path, scripted, monkeypatch):
    second = tmp_path / "second.yaml"
    second.write_text("kind: number\nfile: own.jsonl\n")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_warnings", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(base, tasks=[task, str(second)], output=tmp_path)
    del scripted[:]
    found = evaluate(base, tasks=[task, str(second)], output=tmp_path)
    assert scripted == []
    assert [result.correct for result in found.tasks.values()] == [2, 2]


@pytest.mark.parametrize(
    "changed", [{"protocol": "strict"}, {"max_new_tokens": 9}, {"template": "plain"}, {"dtype": "bfloat16"}]
)
def test_other_settings_begin_anew(base, task, tmp_path, scripted, monkeypatch, changed):
    def interrupt(*_):
        raise KeyboardInterrupt

    options = {"dtype": "float32"}
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_warnings", interrupt)
        patch.setattr(runner, "_folder", lambda *_: tmp_path)
        with pytest.raises(KeyboardInterrupt):
            evaluate(base, tasks=[task], **options)
    del scripted[:]
    monkeypatch.setattr(runner, "_folder", lambda *_: tmp_path)
    evaluate(base, tasks=[task], **options | changed)
    assert len(scripted) == 4


def test_tasks_measured_before_stay_in_the_summary_while_all_else_is_the_same(base, task, tmp_path, scripted):
    second = tmp_path / "second.yaml"
    second.write_text("kind: number\nfile: own.jsonl\n")
    evaluate(base, tasks=[task], output=tmp_path)
    evaluate(base, tasks=[str(second)], output=tmp_path)
    assert list(read_evaluation(tmp_path).tasks) == ["own", "second"]
    evaluate(base, tasks=[str(second)], output=tmp_path, template="plain")
    assert list(read_evaluation(tmp_path).tasks) == ["second"]


def test_invariance_check_counts_what_flips(base, task, monkeypatch):
    def generate(generator, prompts):
        for index in range(len(prompts)):
            alone = generator.batch_size == 1
            yield (
                index,
                Generation("The answer is 5." if index == 0 else f"The answer is {1 if alone else 2}.", (), "stop"),
            )

    monkeypatch.setattr(generation.Generator, "generate", generate)
    result = evaluate(base, tasks=[task], check_invariance=3, batch_size=4).tasks["own"]
    # Of questions 0, 1 and 2 (labels 5, 7, 1): the first is the same, the others differ, and the third flips to right.
    assert result.invariance == {"questions": 3, "differ": 2, "flipped": 1, "share": pytest.approx(1 / 3)}


def test_invariance_of_bfloat16_is_checked_in_float32(base, task, tmp_path, monkeypatch):
    run, dtypes = make_run(base, tmp_path / "run"), []

    def generate(generator, prompts):
        model = generator.model
        dtypes.append((model.dtype, generator.batch_size, hasattr(model, "peft_config")))
        return ((index, Generation("5", (), "stop")) for index in range(len(prompts)))

    monkeypatch.setattr(generation.Generator, "generate", generate)
    evaluate(run, tasks=[task], check_invariance=2, dtype="bfloat16", batch_size=4)
    evaluate(base, run / "adapter", tasks=[task], check_invariance=2, dtype="bfloat16", batch_size=4)
    assert dtypes == [(torch.bfloat16, 4, True), (torch.float32, 1, True)] * 2


def test_in_float32_a_tiny_model_is_invariant(base):
    result = evaluate(base, tasks=["wordproblems"], limit=6, max_new_tokens=12, check_invariance=6).tasks[
        "wordproblems"
    ]
    assert result.invariance == {"questions": 6, "differ": 0, "flipped": 0, "share": 0.0}


def test_questions_in_the_training_data_are_told_apart(base, task, tmp_path, scripted, capsys):
    known = leakage.fingerprint(["ONE!", "three", "something else"]).to_dict()
    run = make_run(base, tmp_path / "run", manifest={"data": {"questions": known}})
    for found in (evaluate(run, tasks=[task]), evaluate(base, run / "adapter", tasks=[task])):
        result = found.tasks["own"]
        assert (result.seen, result.correct, result.total) == (2, 2, 4)
        # Not seen: "two", answered wrongly, and "four", answered right.
        assert (result.unseen["correct"], result.unseen["total"], result.unseen["accuracy"]) == (1, 2, 0.5)
        assert [record.seen for record in found.records["own"]] == [True, False, True, False]
        assert any("own: 2 of 4 questions are in the training data" in warning for warning in found.about["warnings"])
    assert capsys.readouterr().err.count("2 of 4 questions are in the training data") == 2
    assert rescore(run, "strict").tasks["own"].unseen["correct"] == 0
    clean = make_run(
        base, tmp_path / "clean", manifest={"data": {"questions": leakage.fingerprint(["other"]).to_dict()}}
    )
    result = evaluate(clean, tasks=[task]).tasks["own"]
    assert (result.seen, result.unseen["total"]) == (0, 4)
    assert capsys.readouterr().err == ""
    without = make_run(base, tmp_path / "without", manifest={"data": {}})
    assert evaluate(without, tasks=[task]).tasks["own"].seen is None


@pytest.mark.parametrize("manifest", [{"data": {"questions": {"scheme": "other"}}}, {"data": {"questions": 5}}])
def test_a_manifest_that_was_damaged(base, task, tmp_path, manifest):
    with pytest.raises(RequestError, match="fingerprint"):
        evaluate(make_run(base, tmp_path / "run", manifest=manifest), tasks=[task])


def test_prompts_that_are_too_long_are_counted_and_told(base, tmp_path, capsys):
    questions = [{"question": "one", "answer": "5"}, {"question": "x " * POSITIONS, "answer": "5"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    (tmp_path / "long.yaml").write_text("kind: number\nfile: long.jsonl\n")
    found = evaluate(base, tasks=[str(tmp_path / "long.yaml")], max_new_tokens=8, output=tmp_path)
    result, record = found.tasks["long"], found.records["long"][1]
    assert (result.total, result.skipped, result.unanswered >= 1) == (2, 1, True)
    assert (record.skipped, record.output, record.correct, record.finished) == (True, "", False, False)
    assert "long: 1 of 2 prompts are too long" in capsys.readouterr().err
    (tmp_path / "long.jsonl").write_text(json.dumps(questions[1]) + "\n")
    with pytest.raises(RequestError, match="every prompt is too long"):
        evaluate(base, tasks=[str(tmp_path / "long.yaml")], max_new_tokens=8, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": []}, "no tasks"),
        ({"tasks": ["gsm9k"]}, "unknown task 'gsm9k'.*'gsm8k'"),
        ({"tasks": ["gsm8k-train"]}, "is a training set"),
        ({"limit": 0}, "limit=0"),
        ({"protocol": "old"}, "unknown protocol 'old'.*paper"),
        ({"template": "alpacca"}, "unknown template 'alpacca'.*'alpaca'"),
        ({"protocol": "paper", "template": "alpaca"}, "'paper' fixes template='paper'"),
        ({"protocol": "paper", "max_new_tokens": 64}, "fixes max_new_tokens=256"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"check_invariance": -1}, "check_invariance=-1"),
        ({"dtype": "float7"}, "unknown dtype 'float7'"),
        ({"template": "chat"}, "chat template"),
        ({"adapter": "nowhere/at/all"}, "there is no adapter folder"),
    ],
)
def test_wrong_requests_write_nothing(base, tmp_path, options, words):
    given = {"tasks": ["wordproblems"], "limit": 1, "output": tmp_path / "out"}
    with pytest.raises(RequestError, match=words):
        evaluate(base, options.pop("adapter", None), **given | options)
    assert not (tmp_path / "out").exists()


def test_other_wrong_requests(base, task, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be a folder"):
        evaluate(base, tasks=[task], output=tmp_path / "file")
    with pytest.raises(RequestError, match="has its adapter already"):
        evaluate(load_base(base), tmp_path, tasks=[task])
    (tmp_path / "odd.yaml").write_text("name: ../odd\nkind: number\nfile: own.jsonl\n")
    with pytest.raises(RequestError, match=r"'\.\./odd' cannot name a file"):
        evaluate(base, tasks=[str(tmp_path / "odd.yaml")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{}"),
        ("summary.json", "["),
        ("summary.json", '{"tasks": {"own": {}}, "model": {"name": 1}}'),
        ("own.jsonl", "{}\n"),
        ("own.jsonl", ""),
    ],
)
def test_results_that_were_damaged(base, task, tmp_path, scripted, name, content):
    folder = evaluate(base, tasks=[task], output=tmp_path).folder
    (folder / name).write_text(content)
    with pytest.raises(RequestError, match=name):
        read_evaluation(tmp_path)


def test_progress_goes_to_stderr(base, task, scripted, capsys):
    evaluate(base, tasks=[task], progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "own: 4 of 4, 50.0% right" in shown.err
    evaluate(base, tasks=[task])
    assert capsys.readouterr().err == ""


def test_two_tasks_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    for name in ("one", "two", "three"):
        text = "kind: number\nfile: a.jsonl\n" + ("" if name == "three" else "name: Sums\n")
        (tmp_path / f"{name}.yaml").write_text(text)
    one, two, three = (str(tmp_path / f"{name}.yaml") for name in ("one", "two", "three"))
    with pytest.raises(RequestError, match=r"one\.yaml' and '.*two\.yaml' are both called 'Sums'"):
        runner.load_questions([one, two])
    assert [task.name for task, _ in runner.load_questions([one, three, one])] == ["Sums", "three"]
    (tmp_path / "gsm8k.yaml").write_text("kind: number\nfile: a.jsonl\n")
    with pytest.raises(RequestError, match="the catalogue has a task 'gsm8k'"):
        runner.load_questions([str(tmp_path / "gsm8k.yaml")])
