import pytest

from llm_adapters.tasks.answers.declarations import declared_answers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 5. More", [("sentence", "5")]),
        ("The answer is not 5", [("sentence", "not 5")]),
        ("The answer is - 5", [("sentence", "-5")]),
        ("The answer is:\n- 5 apples", [("sentence", "5 apples")]),
        ("The answer is 5.5, really. No", [("sentence", "5.5, really")]),
        ("Answer: 5 apples\nMore 6", [("label", "5 apples")]),
        ("#### 5", [("mark", " 5")]),
        (r"\boxed{\frac{1}{2}} }", [("box", r"\frac{1}{2}")]),
        ("<answer> B </answer>", [("box", "B")]),
        ("Well. So 5 is the answer.", [("answer first", "So 5 ")]),
        ("Is it that the answer is 5?", []),
        ("If the answer is 5, go", []),
        ("Which is the correct answer?", []),
        ("Answer Choices: (A) 5", []),
        ("The answer is found by adding 5", []),
        ("#### 1. First step", []),
        ("He answers. This is 5", []),
    ],
)
def test_declared_answers(text, found):
    assert [
        (answer.style, answer.text) for answer in sorted(declared_answers(text), key=lambda answer: answer.start)
    ] == found


def test_a_label_knows_whether_digits_follow():
    assert [answer.digits_follow for answer in declared_answers("Answer: 5 apples. Then 6")] == [True]
    assert [answer.digits_follow for answer in declared_answers("3. Answer: 5 apples. Done")] == [False]
