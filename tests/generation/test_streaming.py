"""Text that appears while it is generated."""

import pytest
from tiny import tiny_tokenizer

from llm_adapters.generation.streaming import TextStream

TEXTS = ["Tom has 12 apples.", "half a character: é, 日本, 🙂🙂!", "  two  blanks ", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(text):
    tokenizer = tiny_tokenizer()
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.add(token))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
    assert "".join(pieces) == text
    assert stream.finish(text) == ""


def test_special_tokens_are_not_shown_and_what_is_missing_comes_last():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("yes", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, [*tokens, 2])) == "yes"
    assert stream.finish("yes, 日本") == ", 日本"


def test_only_the_part_that_is_to_be_shown_is_shown():
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, lambda text: text.partition("#")[0].strip())
    text = "It is 5.\n\n# more"
    assert "".join(map(stream.add, tokenizer(text, add_special_tokens=False)["input_ids"])) == "It is 5."
    assert stream.finish(text) == ""


def test_an_answer_that_turned_out_to_be_another_is_on_a_line_of_its_own():
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, tokenizer("four", add_special_tokens=False)["input_ids"])) == "four"
    assert stream.finish("five") == "\nfive"
