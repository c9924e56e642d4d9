"""The response in what a model writes: what comes before and beyond it is cut here, and nowhere else.

What a model thinks aloud comes before it. Three things end it, from the outside in: the stop of the prompt template,
the next turn of the conversation (whatever the template), and the line ``#### 5`` that closes a solution by GSM8K's
convention.
"""

import re

from llm_adapters.tasks.answers.languages import QUESTIONS

_THOUGHT = r"(?:(?:seed:)?think(?:ing)?|thoughts?|reasoning|reflection|scratchpad|analysis)"
_OPENS = rf"<{_THOUGHT}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
_CLOSES = rf"</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>"
_TAG = re.compile(rf"(?P<opens>{_OPENS})|{_CLOSES}", re.IGNORECASE)

_NEXT_TURN = re.compile(
    r"""
    \#\#\#\ ?\ ?
    (?: (?P<reply>response|assistant) | instruction | input | question | problem | human | user | system )s?\b\ ?:?
  | (?: ^ [ \t>*_\#]{0,8} | (?<=[.!?]) [ \n]? )
    (?: (?: (?P<answerer>assistant) | human | user | system | instruction | input
          | (?:next\ )?(?:question|problem|exercise|q) (?:\ ?\d{1,3})? ) [*_ ]{0,3} : [*_]{0,2}
      | (?:question|problem|exercise|q) \ ?\d{1,3} (?: [.)*_]{1,3}(?!\w) | \ ?$ ) )
  | ^ [ \t>*_\#]{0,8} (?: """
    + QUESTIONS
    + r""" ) [*_ ]{0,3} [:：]
  | below\ is\ an\ instruction\ that
  | <\|[a-z0-9_]{1,30}\|> | </?s> | <(?:eos|bos|pad|end_of_turn|start_of_turn)> | \[/?INST\]
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_SOLUTION_END = re.compile(r"^ ?#### ?[-+]?\.?\d[\d.,/:]*%?(?: [a-z]{1,20})?[. ]*$", re.MULTILINE)


def without_thoughts(text: str) -> str:
    """Text without what a model thought aloud, between ``<think>`` and ``</think>`` or tags of that kind.

    Args:
        text: what a model generated. A thought that began in the prompt has its end alone; one without an end is all
            that is left of the text.
    """
    said: list[str] = []
    thinking, start = False, 0
    for tag in _TAG.finditer(text):
        if tag["opens"]:
            if not thinking:
                said.append(text[start : tag.start()])
            thinking = True
        else:
            said = said if thinking else []
            thinking, start = False, tag.end()
    return "\n".join(said if thinking else [*said, text[start:]])


def truncate_at_stop(text: str, stop: str | None) -> str:
    """Response up to a template's own stop, without blanks at its ends.

    Args:
        text: what a model generated after a prompt.
        stop: a regular expression for the words that end a response (`Template.stop`); None for no such words.

    Returns:
        The trimmed text before the first match.
    """
    found = re.search(stop, text) if stop else None
    return (text[: found.start()] if found else text).strip()


def truncate_at_next_turn(text: str) -> str:
    """Response up to the next question or turn, in whatever words it is announced.

    Args:
        text: what a model generated, or any text that holds an answer.

    Returns:
        The text before the first marker. Markers before the first word are skipped ("### Response:"), and so is a
        question that is repeated before the response when a marker of the response follows it.
    """
    markers = list(_NEXT_TURN.finditer(text))
    start = at = 0
    while at < len(markers) and not text[start : markers[at].start()].strip(" \n\t\r#*"):
        start, at = markers[at].end(), at + 1
    if at and not _opens_response(markers[at - 1]):
        for later, marker in enumerate(markers[at:], at + 1):
            if _opens_response(marker):
                start, at = marker.end(), later
                break
    return text[start : markers[at].start() if at < len(markers) else None]


def truncate_at_solution(text: str) -> str:
    """Response up to its first line ``#### 5``, that line included.

    Args:
        text: a response, normalised (see `numbers.normalise`).

    Returns:
        The text up to the end of that line; all of it where there is none.
    """
    end = _SOLUTION_END.search(text)
    return text[: end.end()] if end else text


def _opens_response(marker: re.Match[str]) -> bool:
    return bool(marker["reply"] or marker["answerer"] or marker[0].lower() in ("<|assistant|>", "[/inst]"))
