"""Gold labels that nothing can equal, and letters that no question names."""

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.evaluation.labels import check_labels
from llm_adapters.tasks.catalog import CATALOG, load_task
from llm_adapters.tasks.examples import Example, Task


def examples(*answers: str, question: str = "(A) one (B) two; Answer1: one") -> list[Example]:
    return [Example(question, answer=answer) for answer in answers]


@pytest.mark.parametrize(
    ("kind", "bad"), [("number", "a few"), ("letter", "both"), ("option", "first"), ("boolean", "it depends")]
)
def test_labels_that_nothing_can_equal_are_named(kind: str, bad: str) -> None:
    good = {"number": "7", "letter": "B", "option": "answer1", "boolean": "true"}[kind]
    task = Task("mine", "Mine", kind)
    assert check_labels(task, examples(good, good)) == []
    (note,) = check_labels(task, examples(good, bad, good))
    assert note.startswith("mine: 1 of 3 gold labels")
    assert f"question 2 ('{bad}')" in note
    with pytest.raises(RequestError, match=r"2 of 2 gold labels are no .*question 1 .*`kind`"):
        check_labels(task, examples(bad, bad))


def test_a_language_says_what_a_number_is() -> None:
    assert check_labels(Task("mine", "Mine", "number", language="fr"), examples("1,5")) == []
    with pytest.raises(RequestError, match="no number"):
        check_labels(Task("mine", "Mine", "number"), examples("1,5"))


def test_a_letter_that_the_question_does_not_name() -> None:
    task = Task("mine", "Mine", "letter")
    assert check_labels(task, examples("a", "B") + examples("c", question="a) x, b) y, c) z")) == []
    assert "1 of 2 questions do not name the letter that is" in check_labels(task, examples("A", "C"))[0]
    with pytest.raises(RequestError, match=r"columns: \{choices: COLUMN\}"):
        check_labels(task, examples("A", "B", question="A shed or the river?".replace("A shed", "Shed")))


def test_an_option_that_the_question_does_not_name() -> None:
    task = Task("mine", "Mine", "option")
    assert check_labels(task, examples("Ending 1", "ending2", question="Ending1: one\nEnding2: two")) == []
    with pytest.raises(RequestError, match="do not name the option that is their answer"):
        check_labels(task, examples("solution1", question="(A) one (B) two"))


@pytest.mark.parametrize("name", [name for name, task in CATALOG.items() if task.split == "test"])
def test_no_label_of_the_catalogue_raises_an_alarm(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = CATALOG[name]
    if not task.embedded:
        mirror = request.getfixturevalue("shared_data")
        if not (mirror / task.local).is_file():
            pytest.skip("its file is too large for the mirror")
        monkeypatch.setenv("LLM_ADAPTERS_MIRROR", str(mirror))
    assert check_labels(task, load_task(name)) == []
    assert not caplog.text
