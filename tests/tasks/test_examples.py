import pytest

from llm_adapters.tasks.examples import Example, Examples

ROWS = [
    Example("1?"),
    Example("Größer\u2028?", "i", "r", "a", (("system", "Be brief."), ("user", "\n"))),
    Example("", "", "", "x"),
]


def test_what_goes_into_the_buffer_comes_out_again():
    examples = Examples({"question": "q"}, ["id"])
    for row in ROWS:
        examples.append(row)
    assert (len(examples), list(examples), examples[-1], examples[:2]) == (3, ROWS, ROWS[2], ROWS[:2])
    assert examples == ROWS
    assert examples != ROWS[:2]
    assert (examples.columns, examples.unused) == ({"question": "q"}, ["id"])
    with pytest.raises(IndexError):
        examples[3]


def test_half_of_a_character_is_no_text():
    with pytest.raises(UnicodeEncodeError):
        Examples().append(Example("\udc80"))
