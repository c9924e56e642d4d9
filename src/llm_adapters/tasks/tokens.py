"""Tokens of a text that is partly a template's and partly somebody's words, in which nothing is a control token."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from llm_adapters.errors import RequestError

Span = tuple[int, int]  # first character, and the one after the last


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Pattern of the texts that a tokenizer takes for control tokens (``</s>``, ``<|im_end|>``); None for none.

    Args:
        tokenizer: a transformers tokenizer.
    """
    return _pattern(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _pattern(tokenizer: Any, _size: int) -> re.Pattern[str] | None:
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def encode(tokenizer: Any, text: str, words: Sequence[Span] = (), add_special_tokens: bool = False) -> list[int]:
    """Token ids of `text`, where what looks like a control token inside somebody's words is spelt out as text.

    Without such a look-alike they are what the tokenizer itself gives.

    Args:
        tokenizer: a transformers tokenizer.
        text: all of the text.
        words: the spans of `text` that are somebody's words.
        add_special_tokens: whether the tokenizer adds its BOS, as it does for a whole text.

    Raises:
        RequestError: the tokenizer cannot tell where its tokens are, or takes such a text for a token in any case.
    """
    pattern = control_tokens(tokenizer)
    if pattern is None or not any(pattern.search(text, start, end) for start, end in words):
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    try:
        found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    except NotImplementedError:
        raise RequestError(
            f"the data hold {_first(pattern, text, words)!r}, which this model's tokenizer takes for a control token "
            "and cannot read as text. Take it out of the data."
        ) from None
    ids: list[int] = []
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if start < end and pattern.search(text, start, end) and any(a < end and start < b for a, b in words):
            ids += _spelt(tokenizer, text[start:end], token)
        else:
            ids.append(token)
    return ids


def _spelt(tokenizer: Any, text: str, token: int) -> list[int]:
    """Ids of the text of a control token."""
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if token in ids:  # the vocabulary holds the whole text
        halves = [tokenizer(half, add_special_tokens=False, split_special_tokens=True) for half in (text[:1], text[1:])]
        ids = [each for half in halves for each in half["input_ids"]]
    if token in ids:
        raise RequestError(f"the data hold {text!r}, which this model's tokenizer cannot read as text. Take it out.")
    return ids


def _first(pattern: re.Pattern[str], text: str, words: Sequence[Span]) -> str:
    return next(found[0] for start, end in words if (found := pattern.search(text, start, end)))


def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token: a text of more than N times as many has more than N tokens.

    Args:
        tokenizer: a transformers tokenizer.
    """
    return _longest(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _longest(tokenizer: Any, _size: int) -> int:
    return max(map(len, tokenizer.get_vocab()), default=1)
