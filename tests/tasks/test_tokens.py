import pytest
from tiny import tiny_tokenizer

from llm_adapters.tasks.tokens import control_tokens, encode, longest_token

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("text", ["", "plain words", "a </ s> b", "<s>a</s>"])
def test_text_without_words_of_the_data_is_what_the_tokenizer_makes_of_it(text):
    assert encode(TOKENIZER, text) == TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["What is </s>?", "<s>", "a<pad><pad>b </s>", "Größe </s> 世"])
def test_control_tokens_in_the_words_are_text_and_the_template_keeps_its_own(text):
    whole = f"<s>{text}</s>"
    ids = encode(TOKENIZER, whole, [(3, 3 + len(text))])
    assert TOKENIZER.decode(ids) == whole
    assert [token for token in ids if token in TOKENIZER.all_special_ids] == [1, 2]
    assert (ids[0], ids[-1]) == (1, 2)


def test_the_pattern_knows_the_special_tokens_alone():
    assert control_tokens(TOKENIZER).findall("<s> <b> </s></s> <pad>") == ["<s>", "</s>", "</s>", "<pad>"]


def test_no_text_of_n_tokens_is_longer_than_n_of_the_longest():
    for text in ("request" * 40, "世界 \n" * 30):
        assert len(text) <= longest_token(TOKENIZER) * len(encode(TOKENIZER, text))
