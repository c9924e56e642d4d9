import pytest

from llm_adapters.tasks.answers.stop import (
    truncate_at_next_turn,
    truncate_at_solution,
    truncate_at_stop,
    without_thoughts,
)


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
    assert truncate_at_next_turn(text).strip() == (text if first is None else first)


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
    assert truncate_at_solution(text) == (text if end is None else end)


@pytest.mark.parametrize(
    ("text", "stop", "response"),
    [
        (" It is 5. \n### Response:\n6", "### Response:", "It is 5."),
        ("5, or Z5? no: Z", "Z|no:", "5, or"),
        ("\n 5 \n", None, "5"),
        ("Z 5", "Z", ""),
        ("", "Z", ""),
    ],
)
def test_a_response_ends_at_the_stop_of_its_template(text, stop, response):
    assert truncate_at_stop(text, stop) == response


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<thinking>5?</thinking>6", "6"),
        ("It is 5?\n</think>\n6", "6"),
        ("[THINK]a <b> c[/THINK]6", "6"),
        ("<reasoning>a<think>b</think>c</reasoning> 6", "6"),
        ("6 <think>or 5", "6"),
        ("<think>5, 5, 5", ""),
        ("<THINK>5</THINK>6<Think>7</Think>", "6"),
        ("I think </b> that 6 < 7", "I think </b> that 6 < 7"),
    ],
)
def test_thoughts_are_no_response(text, left):
    assert without_thoughts(text).strip() == left
