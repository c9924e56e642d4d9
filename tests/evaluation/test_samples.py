"""Several sampled answers to a question: the vote, the records, and the way through a whole evaluation and back."""

import dataclasses
import json

import pytest
from tiny import save_tiny

from llm_adapters.cli import main, tables
from llm_adapters.errors import RequestError
from llm_adapters.evaluation import compare_evaluations, evaluate, read_evaluation, rescore, runner
from llm_adapters.evaluation.records import Journal, read_records, write_records
from llm_adapters.evaluation.report import render
from llm_adapters.evaluation.samples import Sample, sampled_scores, vote
from llm_adapters.generation import generator as generation
from llm_adapters.generation.generator import Generation

SAMPLING = {"samples": 4, "temperature": 1.0, "seed": 3}
ANSWERS = {  # of four samples each
    "one": ["It is 4.", "The answer is 5.", "so 5.0", "none"],  # 5 has two votes
    "two": ["The answer is 6. No: 7.", "7", "6", "7"],  # 6, 7, 6, 7: of two each the first that came
    "three": ["I do not know.", "Nor do I.", "?", "!"],
    "four": ["The answer is 9."] * 4,
}
LABELS = {"one": "5.0", "two": "7", "three": "1", "four": "9"}


@pytest.mark.parametrize(
    ("answers", "kind", "won"),
    [
        ([5.0, 6.0, 6.0004, 5.0, 6.0], "number", 1),  # nearly equal numbers are one answer
        ([1.0, 2.0, 2.0, 1.0], "number", 0),
        ([None, None, 3.0], "number", 2),
        ([None, None], "number", 0),
        ([1e20, 2.0, 1e20], "number", 0),
        (["A", "(b)", "B"], "letter", 1),
        (["false", "true", "true"], "boolean", 1),
        (["a  cat", "A cat", "dog"], "text", 0),
    ],
)
def test_the_most_frequent_answer_wins(answers, kind, won):
    assert vote(answers, kind) == won


def sample(correct):
    return Sample("", None, correct, True, 1)


def test_scores_of_samples_by_hand():
    right = [3, 0, 1]  # of three samples
    samples = [[sample(place < count) for place in range(3)] for count in right]
    scores = sampled_scores(samples, [True, False, False])
    assert list(scores) == ["samples", "pass@1", "pass@2", "pass@3", "majority"]
    assert scores["pass@1"]["accuracy"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert scores["pass@2"]["accuracy"] == pytest.approx((1 + 0 + 2 / 3) / 3)  # 1 - C(2, 2) / C(3, 2)
    assert scores["pass@3"]["accuracy"] == pytest.approx(2 / 3)
    assert (scores["majority"]["correct"], scores["majority"]["total"]) == (1, 3)
    for name in ("pass@1", "pass@2", "pass@3", "majority"):
        low, high = scores[name]["interval"]
        assert 0 <= low < scores[name]["accuracy"] < high <= 1
    names = sampled_scores([[sample(True)] * 10], [True])
    assert list(names) == ["samples", "pass@1", "pass@2", "pass@4", "pass@8", "pass@10", "majority"]
    assert list(sampled_scores([[sample(True)]], [True])) == ["samples", "pass@1", "majority"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def task(tmp_path):
    lines = [{"question": question, "answer": label} for question, label in LABELS.items()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.yaml").write_text("kind: number\nfile: own.jsonl\n")
    return str(tmp_path / "own.yaml")


@pytest.fixture
def scripted(monkeypatch):
    """Answers come from ANSWERS, samples of all questions mixed; the list holds the questions and what was asked."""
    asked = []

    def generate(generator, prompts, **sampling):
        texts = [generator.tokenizer.decode(ids) for ids in prompts]
        questions = [next(word for word in ANSWERS if f"\n{word}\n" in text or f" {word}\n" in text) for text in texts]
        asked.append((questions, sampling))
        for number in reversed(range(sampling.get("n", 1))):
            for index, question in enumerate(questions):
                yield index, Generation(ANSWERS[question][number], (1, 2), "stop", number, seconds=0.25)

    monkeypatch.setattr(generation.Generator, "generate", generate)
    return asked


def test_records_and_scores_of_a_sampled_evaluation(base, task, tmp_path, scripted):
    found = evaluate(base, tasks=[task], output=tmp_path / "out", top_p=0.9, **SAMPLING)
    assert scripted == [(list(ANSWERS), {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "n": 4, "seed": 3})]
    one, two, three, four = found.records["own"]
    assert [[s.output for s in record.samples] for record in (one, two, three, four)] == list(ANSWERS.values())
    assert (one.output, one.extracted, one.correct, one.tokens) == ("The answer is 5.", 5.0, True, 12)
    assert (two.extracted, two.correct) == (6.0, False)
    assert (three.output, three.extracted, three.correct) == ("I do not know.", None, False)
    result = found.to_dict()["tasks"]["own"]
    assert (result["accuracy"], result["correct"], result["total"], result["unanswered"]) == (0.5, 2, 4, 1)
    assert result["samples"] == 4
    assert result["pass@1"]["accuracy"] == pytest.approx((2 + 2 + 0 + 4) / 16)
    assert result["pass@4"]["accuracy"] == pytest.approx(3 / 4)
    assert result["majority"] == {key: result[key] for key in ("accuracy", "interval", "correct", "total")}
    assert result["seconds"] == 4 * 4 * 0.25
    assert found.folder == tmp_path / "out" / "eval" / "default-sampled"
    assert json.loads((found.folder / "summary.json").read_text()) == found.to_dict()
    assert found.about["sampling"] == {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "n": 4, "seed": 3}
    again = read_evaluation(found.folder)
    assert again.records == found.records
    assert again.tasks == found.tasks
    page = render(found)
    assert "2 of 4 samples are right" in page
    assert "Nor do I." in page


def test_greedy_records_and_summaries_say_nothing_of_samples(base, task, tmp_path, scripted):
    found = evaluate(base, tasks=[task], output=tmp_path)
    assert scripted[0][1] == {}
    text = (found.folder / "own.jsonl").read_text() + (found.folder / "summary.json").read_text()
    assert "sampl" not in text
    assert "pass@" not in text


def test_sampled_records_are_scored_again_with_all_their_samples(base, task, tmp_path, scripted):
    found = evaluate(base, tasks=[task], output=tmp_path, **SAMPLING)
    strict = evaluate(base, tasks=[task], output=tmp_path, protocol="strict", **SAMPLING)
    again = rescore(found.folder, "strict")
    assert again.records == strict.records
    assert again.tasks["own"].sampled == strict.tasks["own"].sampled
    assert [record.correct for record in again.records["own"]] == [True, False, False, True]
    assert again.tasks["own"].sampled["pass@1"]["accuracy"] == pytest.approx((1 + 0 + 0 + 4) / 16)


def test_a_sampled_evaluation_is_compared_by_its_vote(base, task, tmp_path, scripted):
    greedy = evaluate(base, tasks=[task])  # the first samples: wrong, wrong, wrong, right
    voted = evaluate(base, tasks=[task], **SAMPLING)
    found = compare_evaluations(greedy, voted)["own"].comparison
    assert (found.first, found.second, found.gained, found.lost) == (0.25, 0.5, 1, 0)


def test_an_interrupted_sampled_evaluation_goes_on_to_the_same_records(base, tmp_path, monkeypatch):
    """With a real model: what is asked again is drawn again, in other company."""
    options = {"tasks": ["wordproblems"], "limit": 5, "max_new_tokens": 10, "samples": 3, "temperature": 0.8}
    expected = evaluate(base, **options).records
    original, calls = runner._record, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_record", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            evaluate(base, output=tmp_path, **options)
    folder = tmp_path / "eval" / "default-sampled"
    assert len((folder / ".wordproblems.partial.jsonl").read_text().splitlines()) == 1 + 2
    found = evaluate(base, output=tmp_path, batch_size=None, **options)
    assert found.records == expected
    outputs = [sample.output for record in found.records["wordproblems"] for sample in record.samples]
    assert len(set(outputs)) > 10  # of 15
    first = evaluate(base, **options | {"samples": 1}).records["wordproblems"]
    assert [record.output for record in first] == [record.samples[0].output for record in expected["wordproblems"]]


@pytest.mark.parametrize("changed", [{"seed": 4}, {"temperature": 0.9}, {"samples": 2}, {"top_k": 9}, {"top_p": 0.5}])
def test_other_sampling_begins_anew(base, task, tmp_path, scripted, monkeypatch, changed):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_warnings", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(base, tasks=[task], output=tmp_path, **SAMPLING)
    del scripted[:]
    evaluate(base, tasks=[task], output=tmp_path, **SAMPLING | changed)
    assert [len(questions) for questions, _ in scripted] == [4]


def test_invariance_of_samples_looks_at_all_of_them(base):
    result = evaluate(base, tasks=["wordproblems"], limit=3, max_new_tokens=8, check_invariance=3, **SAMPLING).tasks[
        "wordproblems"
    ]
    assert result.invariance == {"questions": 3, "differ": 0, "flipped": 0, "share": 0.0}


def test_records_with_samples_on_disk(base, task, tmp_path, scripted):
    records = evaluate(base, tasks=[task], **SAMPLING).records["own"]
    write_records(tmp_path / "some.jsonl", records)
    assert read_records(tmp_path / "some.jsonl") == records
    journal = Journal(tmp_path / "journal", "x")
    journal.resume()
    journal.add(records[0], 1.5)
    assert Journal(tmp_path / "journal", "x").resume() == [(records[0], 1.5)]
    line = dataclasses.asdict(records[0])
    for wrong in ([], [5], [{"output": "x"}], [line["samples"][0] | {"tokens": "7"}], 5):
        (tmp_path / "some.jsonl").write_text(json.dumps(line | {"samples": wrong}) + "\n")
        with pytest.raises(RequestError, match=r"line 1 of .* is not a record"):
            read_records(tmp_path / "some.jsonl")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 4}, "4 samples at temperature 0 would all be the same"),
        ({"seed": 4}, "do nothing at temperature 0"),
        ({"samples": 0, "temperature": 1.0}, "0 samples cannot be asked for"),
        ({"temperature": -1.0}, "temperature=-1.0 is no temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 is no probability"),
        ({"temperature": 1.0, "protocol": "paper"}, "the protocol 'paper' searches with 4 beams"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(options, words):
    with pytest.raises(RequestError, match=words):
        evaluate("no-such-model", tasks=["wordproblems"], **options)


def test_the_command_line_prints_pass_at_k(base, task, scripted, capsys):
    words = ["evaluate", "--model", str(base), "--tasks", task, "--samples", "4", "--temperature", "0.7", "--seed", "1"]
    assert main([*words, "--top-k", "50", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["tasks"]["own"]
    assert document["pass@2"]["accuracy"] == pytest.approx((5 / 6 + 5 / 6 + 0 + 1) / 4)  # 1 - C(2, 2) / C(4, 2)
    assert scripted[0][1] == {"temperature": 0.7, "top_p": 1.0, "top_k": 50, "n": 4, "seed": 1}


def test_the_table_names_what_its_numbers_are(base, task, scripted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tables.show_evaluation(evaluate(base, tasks=[task], top_k=50, **SAMPLING))
    shown = capsys.readouterr().out
    for words in ("majority vote (95 %)", "pass@1", "pass@4", "4 samples, temperature 1, top-k 50, seed 3"):
        assert words in shown
    tables.show_evaluation(evaluate(base, tasks=[task]))
    assert "pass@" not in capsys.readouterr().out
