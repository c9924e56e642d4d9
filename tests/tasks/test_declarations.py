import pytest

from llm_adapters.tasks.answers.declarations import claims, end_of_solution, response


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("It is 5.", "It is 5."),
        ("It is 5.\n### Instruction:\nmore", "It is 5."),
        ("It is 5. ### Response: more", "It is 5."),
        ("It is 5.\nQuestion: more", "It is 5."),
        ("It is 5. Q: more", "It is 5."),
        ("It is 5.\n\n**Problem 3:** more", "It is 5."),
        ("It is 5.\nQuestion 2\nmore", "It is 5."),
        ("It is 5.\nHuman: more", "It is 5."),
        ("It is 5.\nAssistant: more", "It is 5."),
        ("It is 5.<|eot_id|>more", "It is 5."),
        ("It is 5.</s>more", "It is 5."),
        ("It is 5.\n\nBelow is an instruction that describes a task.", "It is 5."),
        ("### Response:\nIt is 5.", "It is 5."),
        ("<s> It is 5.</s>", "It is 5."),
        ("User: how many?\nAssistant: It is 5.\nUser: more", "It is 5."),
        ("### Explanation\n2 + 3 = 5. The question: is it 5? Answer: 5", None),
        ("Tom asks a question: 5?\nHe answers the human: 6.", None),
        ("I question 5.\nThe user: 6", None),
        ("", ""),
    ],
)
def test_the_response_ends_where_the_next_turn_begins(text, first):
    assert response(text).strip() == (text if first is None else first)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("a\n#### 5\nb", "a\n#### 5"),
        ("a\n#### $1,000 dollars.\nb", None),  # currency goes before the text comes here
        ("a\n#### 1,000 dollars.\nb", "a\n#### 1,000 dollars."),
        ("#### 1. First\nb", None),
        ("#### Answer\n5", None),
        ("#### 2 apples per child are left\nb", None),
    ],
)
def test_a_solution_ends_with_its_mark(text, end):
    assert end_of_solution(text) == (text if end is None else end)


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
        ("Well. So 5 is the answer.", [("reverse", "So 5 ")]),
        ("Is it that the answer is 5?", []),
        ("If the answer is 5, go", []),
        ("Which is the correct answer?", []),
        ("Answer Choices: (A) 5", []),
        ("The answer is found by adding 5", []),
        ("#### 1. First step", []),
        ("He answers. This is 5", []),
    ],
)
def test_claims(text, found):
    assert [(claim.form, claim.text) for claim in sorted(claims(text), key=lambda claim: claim.start)] == found


def test_a_label_knows_whether_digits_follow():
    assert [claim.more for claim in claims("Answer: 5 apples. Then 6")] == [True]
    assert [claim.more for claim in claims("3. Answer: 5 apples. Done")] == [False]
