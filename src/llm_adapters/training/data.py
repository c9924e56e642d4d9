"""From examples to encoded training data: the shuffle, encoding, what is too long, and the validation split."""

import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_adapters.errors import RequestError
from llm_adapters.tasks.examples import Example, Examples
from llm_adapters.tasks.templates import IGNORED, Encoded, encode_example, holds_control_tokens, render_prompt
from llm_adapters.tasks.tokens import longest_token
from llm_adapters.training.recipe import DataSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The encoded examples of a run and what the manifest says of them.

    Attributes:
        train, validation: encoded examples, in the order of the seed's shuffle.
        questions: the questions trained on, those of earlier turns too, for the contamination report.
        dropped: how many examples were longer than the limit and left out.
        truncated: how many were longer and truncated.
        control_tokens: how many hold, in their words, what the tokenizer takes for a control token: it stays text.
        example: prompt and response of the first training example, as text.
        fingerprint: SHA-256 over the examples as they were read, in order.
        reading: how the file was read: the columns of the fields, the unused ones, and what is to be told.
    """

    train: list[Encoded]
    validation: list[Encoded]
    questions: list[str]
    dropped: int
    truncated: int
    control_tokens: int
    example: dict[str, str]
    fingerprint: str
    reading: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest example, those of the validation split counted."""
        return max(len(example.input_ids) for example in (*self.train, *self.validation))

    def counts(self) -> dict[str, int]:
        """Examples, tokens and labels, as the manifest reports them."""
        return {
            "train_examples": len(self.train),
            "validation_examples": len(self.validation),
            "train_tokens": sum(len(e.input_ids) for e in self.train),
            "train_labels": sum(label != IGNORED for e in self.train for label in e.labels),
            "longest": max(len(e.input_ids) for e in self.train),
            "dropped_too_long": self.dropped,
            "truncated_too_long": self.truncated,
            "control_tokens_as_text": self.control_tokens,
        }


def prepare(
    examples: Sequence[Example],
    tokenizer: Any,
    settings: DataSettings,
    seed: int,
    context: int | None = None,
    embeddings: int | None = None,
) -> TrainingData:
    """Shuffle with the seed, encode, deal with what is too long up to `settings.limit`, hold out the validation split.

    Args:
        examples: as read from the data set.
        tokenizer: the base model's.
        settings: the recipe's data section.
        seed: decides the shuffle.
        context: the longest sequence that the base model takes; None where it has no limit.
        embeddings: number of tokens that the base model has an embedding of; None for any.

    Raises:
        RequestError: nothing is left to train on, an example is too long and `settings.too_long` is ``"error"``, or one
            has a token that the model does not have.
    """
    if context is not None and settings.max_length > context:
        raise RequestError(f"data.max_length is {settings.max_length}: the model takes at most {context} tokens")
    order = list(range(len(examples)))  # positions, since a million examples themselves would not fit as well
    random.Random(seed).shuffle(order)
    encoded, counts = _encode(((at + 1, examples[at]) for at in order), tokenizer, settings, embeddings)
    held_out = round(settings.validation * len(encoded)) if settings.validation < 1 else int(settings.validation)
    if settings.validation and held_out == 0:
        raise RequestError(f"data.validation is {settings.validation}: of {len(encoded)} examples that leaves none")
    if len(encoded) - held_out < 1:
        reason = (
            f"all {len(examples)} are longer than data.max_length, {settings.max_length} "
            f"(the longest: {counts.longest} tokens)"
            if not encoded
            else f"the validation split takes {held_out} of {len(encoded)}"
        )
        raise RequestError(f"no example is left to train on: {reason}")
    validation, train = encoded[:held_out], encoded[held_out:]
    first = train[0][0]
    prompt = render_prompt(
        settings.template, first.question, first.input, tokenizer=tokenizer, stage="train", history=first.history
    )
    held = sum(holds_control_tokens(tokenizer, example) for example, _ in encoded)
    if held:
        logger.warning("%d examples hold control tokens of the tokenizer in their words: they are read as text", held)
    return TrainingData(
        train=[tokens for _, tokens in train],
        validation=[tokens for _, tokens in validation],
        questions=[question for example, _ in train for question in example.questions],
        dropped=counts.dropped,
        truncated=counts.truncated,
        control_tokens=held,
        example={"prompt": prompt, "response": first.response},
        fingerprint=_fingerprint([example for example, _ in encoded]),
        reading=_reading(examples),
    )


def _reading(examples: Sequence[Example]) -> dict[str, Any]:
    if not isinstance(examples, Examples):
        return {}
    return {"columns": examples.columns, "unused_columns": examples.unused, "notes": examples.notes}


@dataclass
class _Counts:
    dropped: int = 0
    truncated: int = 0
    longest: int = 0


def _encode(
    numbered: Iterable[tuple[int, Example]], tokenizer: Any, settings: DataSettings, embeddings: int | None
) -> tuple[list[tuple[Example, Encoded]], _Counts]:
    """Encode the `numbered` examples up to `settings.limit`; what is too long is dropped, truncated or refused."""
    encoded: list[tuple[Example, Encoded]] = []
    counts = _Counts()
    limit = settings.max_length
    characters = limit * longest_token(tokenizer)  # of as many tokens, at most: what is longer need not be tokenised
    for number, example in numbered:
        if len(encoded) == settings.limit:
            break
        too_long = _characters(example) > characters
        if too_long and settings.too_long == "truncate":
            example = dataclasses.replace(example, response=example.response[:characters])
            too_long = _characters(example) > 2 * characters
        if too_long:
            tokens, length = None, limit + 1
        else:
            tokens = encode_example(
                tokenizer, example, template=settings.template, train_on_prompt=settings.train_on_prompt
            )
            length = len(tokens.input_ids)
            _check_ids(tokens.input_ids, embeddings, number, tokenizer)
        counts.longest = max(counts.longest, length)
        if length > limit:
            if settings.too_long == "error":
                raise RequestError(
                    f"an example has {'more than ' if too_long else ''}{limit if too_long else length} tokens, "
                    f"data.max_length is {limit}: raise it, or set data.too_long to drop or truncate"
                )
            if settings.too_long == "drop" or tokens is None:
                counts.dropped += 1
                continue
            tokens = Encoded(tokens.input_ids[:limit], tokens.labels[:limit], tokens.prompt_length)
            counts.truncated += 1
        assert tokens is not None
        if all(label == IGNORED for label in tokens.labels[1:]):
            counts.dropped += 1  # truncated before its response begins: there is nothing to learn from it
            continue
        encoded.append((example, tokens))
    return encoded, counts


def _check_ids(ids: Sequence[int], embeddings: int | None, number: int, tokenizer: Any) -> None:
    largest = max(ids, default=0)
    if embeddings is not None and largest >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise RequestError(
            f"example {number} of the training data holds token {largest} ({token!r}), and the model has embeddings of "
            f"{embeddings} tokens: use the model's own tokenizer, or a model whose embeddings were resized to this one."
        )


def _characters(example: Example) -> int:
    words = [example.question, example.input, example.response, *(content for _, content in example.history)]
    return sum(map(len, words))


def _fingerprint(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        fields: list[Any] = [example.question, example.input, example.response, example.answer]
        fields += [example.history] if example.history else []
        digest.update(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
