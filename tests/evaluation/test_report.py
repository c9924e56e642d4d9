import html.parser
import json
import re

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.evaluation.records import Record
from llm_adapters.evaluation.report import render, write_report
from llm_adapters.evaluation.results import Evaluation, summarise

ATTACK = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> & &amp; </pre></style>"


def make(**fields):
    given = {"question": "q", "prompt": "p", "output": "o", "extracted": 5.0, "label": "5", "correct": True}
    return Record(**{"index": 0, "finished": True, "tokens": 3} | given | fields)


def evaluation(records):
    about = {
        "model": {"name": ATTACK, "adapter": ATTACK},
        "protocol": {"name": "default"},
        "template": {"name": "alpaca"},
        "precision": "float32",
        "versions": {},
    }
    return Evaluation({"own": summarise(records, "number")}, {"own": records}, about)


class Page(html.parser.HTMLParser):
    """What a browser would see: the elements with their attributes, and the text in the boxes."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.boxes, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "pre":
            self.boxes.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "pre":
            self.boxes[-1] += data


def test_everything_is_escaped_and_nothing_is_fetched():
    page = Page(
        render(evaluation([make(question=ATTACK, prompt=ATTACK, output=ATTACK, extracted=ATTACK, label=ATTACK)]))
    )
    assert page.open == []
    assert page.boxes == [ATTACK] * 3
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "a"}
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_questions_can_be_filtered_by_outcome():
    records = [
        make(index=0),
        make(index=1, extracted=6.0, correct=False),
        make(index=2, extracted=None, correct=False, finished=False),
        make(index=3, extracted=None, correct=False, output="", skipped=True),
    ]
    text = render(evaluation(records))
    page = Page(text)
    assert [attrs["class"] for tag, attrs in page.elements if tag == "article"] == ["right", "wrong", "none", "none"]
    assert [attrs["id"] for tag, attrs in page.elements if tag == "input"] == [
        "show-all", "show-right", "show-wrong", "show-none",
    ]  # fmt: skip
    for outcome, count in (("right", 1), ("wrong", 1), ("no answer", 2), ("all", 4)):
        assert f"{outcome} ({count})" in text
    for kind in ("right", "wrong", "none"):
        assert re.search(rf"show-{kind}:checked\) article:not\(\.{kind}\) {{ display: none", text)
    assert "limit of new tokens was met" in text
    assert "too long to be asked" in text
    assert "25.0%" in text


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model", "name"), 5, "model.name must be a text"),
        (("model", "adapter"), [], "model.adapter must be a text or null"),
        (("template", "name"), "<b>", "unknown template"),
        (("precision",), None, "precision is null: it must be a text"),
        (("warnings",), [1], "warnings is"),
        (("tasks",), [], "tasks is"),
        (("tasks", "own"), 3, "must be an object"),
        (("tasks", "own", "accuracy"), "all", "accuracy is"),
        (("tasks", "own", "interval"), [0.5], "interval is"),
        (("tasks", "own", "kind"), "poem", "unknown kind of answer"),
        (("tasks", "own", "seconds"), float("inf"), "cannot be read|seconds is"),
        (("tasks", "own", "unseen"), {"accuracy": "x"}, "unseen.accuracy"),
        (("tasks", "../own"), {}, "is no name of a task"),
    ],
)
def test_a_summary_of_other_types_is_refused(tmp_path, path, value, words):
    evaluation([make()]).write(tmp_path)
    file = tmp_path / "summary.json"
    document = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(RequestError, match=words) as caught:
        write_report(tmp_path)
    assert "summary.json" in str(caught.value)


def test_the_page_lies_beside_the_records(tmp_path):
    evaluation([make()]).write(tmp_path / "eval" / "default")
    page = write_report(tmp_path)
    assert page == tmp_path / "eval" / "default" / "errors.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(RequestError, match="holds no results of the protocol 'paper'"):
        write_report(tmp_path, "paper")
