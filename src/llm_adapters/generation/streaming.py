"""Text of an answer while it is generated."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns tokens into pieces of text as they come (incremental detokenization).

    Args:
        tokenizer: of the tokens.
        shown_part: the part of a text that is to be shown, of all text that there is; None for the whole.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", shown_part: Callable[[str], str] | None = None) -> None:
        self._tokenizer, self._shown_part = tokenizer, shown_part or str
        self._tokens: list[int] = []
        self._start = self._end = 0  # the tokens whose text was added last: what the next ones look like depends on it
        self._text = self._streamed = ""

    def add(self, token: int) -> str:
        """Add a token; returns the text that it adds to what is shown. Half a character waits for its other half."""
        self._tokens.append(token)
        before, now = self._decode(self._tokens[self._start : self._end]), self._decode(self._tokens[self._start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._text += now[len(before) :]
        self._start, self._end = self._end, len(self._tokens)
        shown = self._shown_part(self._text)
        if not shown.startswith(self._streamed):
            return ""
        more, self._streamed = shown[len(self._streamed) :], shown
        return more

    def finish(self, text: str) -> str:
        """The text that is still missing; an answer that turned out to be another one is given on a line of its own.

        Args:
            text: the whole of it.
        """
        shown = self._shown_part(text)
        return shown[len(self._streamed) :] if shown.startswith(self._streamed) else "\n" + shown

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
