"""Encoding, what is too long, and the validation split."""

import pytest
from tiny import tiny_tokenizer

from llm_adapters.errors import RequestError
from llm_adapters.tasks.examples import Example
from llm_adapters.training.data import prepare
from llm_adapters.training.recipe import DataSettings

EXAMPLES = [Example(question=f"What is {n} plus {n}?", response="so " * n + f"{2 * n}") for n in range(1, 21)]


def settings(**values: object) -> DataSettings:
    return DataSettings(**{"template": "plain", "max_length": 512, **values})  # type: ignore[arg-type]


def test_every_example_ends_and_only_the_response_is_labelled() -> None:
    data = prepare(EXAMPLES, tiny_tokenizer(), settings(), seed=1)
    assert len(data.train) == 20
    for encoded in data.train:
        assert encoded.input_ids[-1] == tiny_tokenizer().eos_token_id
        assert encoded.labels[-1] == encoded.input_ids[-1]
        assert set(encoded.labels[: encoded.prompt_length]) == {-100}


def test_the_seed_decides_the_order_and_the_limit_comes_after_the_shuffle() -> None:
    one, same, other = (prepare(EXAMPLES, tiny_tokenizer(), settings(limit=5), seed=s) for s in (1, 1, 2))
    assert one.questions == same.questions != other.questions
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert len(one.questions) == 5
    assert one.questions != [e.question for e in EXAMPLES[:5]]


@pytest.mark.parametrize(("validation", "held_out"), [(4, 4), (0.25, 5), (0, 0)])
def test_the_validation_split_shares_nothing_with_training(validation: float, held_out: int) -> None:
    data = prepare(EXAMPLES, tiny_tokenizer(), settings(validation=validation), seed=1)
    assert len(data.validation) == held_out
    assert len(data.train) == 20 - held_out
    train, validated = ({tuple(e.input_ids) for e in part} for part in (data.train, data.validation))
    assert not train & validated


def test_too_long_examples_are_dropped_truncated_or_refused() -> None:
    tokenizer = tiny_tokenizer()
    lengths = sorted(len(e.input_ids) for e in prepare(EXAMPLES, tokenizer, settings(), seed=1).train)
    limit = lengths[9]
    longer = sum(length > limit for length in lengths)
    assert longer
    dropped = prepare(EXAMPLES, tokenizer, settings(max_length=limit), seed=1)
    assert (dropped.dropped, len(dropped.train)) == (longer, 20 - longer)
    shorter = prepare(EXAMPLES, tokenizer, settings(max_length=limit, too_long="truncate"), seed=1)
    assert (shorter.truncated, len(shorter.train)) == (longer, 20)
    assert max(len(e.input_ids) for e in shorter.train) == limit
    with pytest.raises(RequestError, match=rf"tokens, data\.max_length is {limit}"):
        prepare(EXAMPLES, tokenizer, settings(max_length=limit, too_long="error"), seed=1)


def test_what_leaves_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"all 20 are longer than data\.max_length, 5"):
        prepare(EXAMPLES, tiny_tokenizer(), settings(max_length=5), seed=1)
    with pytest.raises(RequestError, match="the validation split takes 20 of 20"):
        prepare(EXAMPLES, tiny_tokenizer(), settings(validation=20), seed=1)
    with pytest.raises(RequestError, match="leaves none"):
        prepare(EXAMPLES, tiny_tokenizer(), settings(validation=0.001), seed=1)
    with pytest.raises(RequestError, match="at most 64 tokens"):
        prepare(EXAMPLES, tiny_tokenizer(), settings(max_length=65), seed=1, context=64)


@pytest.mark.parametrize("too_long", ["drop", "truncate", "error"])
def test_what_is_too_long_in_any_case_is_not_tokenised(too_long: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    lengths = []
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda _, text, **o: lengths.append(len(text)) or {"input_ids": [5] * len(text)}
    )
    long = [Example("q", response="so " * 10**6), Example("q " * 10**6, response="r"), *EXAMPLES[:3]]
    if too_long == "error":
        with pytest.raises(RequestError, match="more than 64 tokens"):
            prepare(long, tokenizer, settings(max_length=64, too_long=too_long), seed=1)
    else:
        data = prepare(long, tokenizer, settings(max_length=64, too_long=too_long), seed=1)
        assert (len(data.train), data.dropped, data.truncated) == {"drop": (3, 2, 0), "truncate": (4, 1, 1)}[too_long]
    assert max(lengths) < 10_000


def test_control_tokens_in_the_words_are_counted() -> None:
    examples = [*EXAMPLES, Example("What is </s>?", response="r"), Example("q", response="r</s>")]
    assert prepare(examples, tiny_tokenizer(), settings(), seed=1).counts()["control_tokens_as_text"] == 1


@pytest.mark.parametrize("where", ["question", "response"])
def test_a_token_that_the_model_does_not_have_is_told_with_its_example(where: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    examples = [*EXAMPLES[:3], Example(**{"question": "What?", "response": "That.", where: "a <new> word"})]
    assert len(prepare(examples, tokenizer, settings(), seed=1, embeddings=301).train) == 4
    with pytest.raises(RequestError, match=r"example 4 .*token 300 \('<new>'\).* embeddings of 300 tokens"):
        prepare(examples, tokenizer, settings(), seed=1, embeddings=300)
