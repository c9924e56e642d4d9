"""Places of a response that declare an answer, whatever the answer's kind."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llm_adapters.tasks.answers.languages import LANGUAGES, Language

REACH = 300  # characters: a declared answer is near the words that declare it; also bounds the work per match


@dataclass(frozen=True)
class DeclaredAnswer:
    """Place in a text that declares an answer.

    Attributes:
        start: the position of the words that declare it.
        text: the clause that holds the answer.
        style: ``"sentence"`` ("the answer is 5"), ``"label"`` ("Answer: 5"), ``"mark"`` ("#### 5"), ``"box"``
            (``\\boxed{5}``) or ``"answer first"`` ("5 is the answer").
        digits_follow: digits follow a label's clause, other than in its explanation.
        language: the language of the words that declare it; None where that is English.
    """

    start: int
    text: str
    style: str
    digits_follow: bool = False
    language: Language | None = None


@dataclass(frozen=True)
class Extractor:
    """Three steps that read answers of one kind.

    Attributes:
        clean: removes from a response what is denied or only listed.
        declared: reads a declared answer in the rest; None where its clause holds none.
        undeclared: reads a response that declares nothing; None where it holds no answer.
    """

    clean: Callable[[str], str]
    declared: Callable[[DeclaredAnswer], float | str | None]
    undeclared: Callable[[str], float | str | None]


# For the extractors: words that deny what follows them, and what may come between "the answer is" and the answer.
DENIAL = (
    r"(?:\bnot|n't|\brather than|\binstead of|\bnor|\bunlike) "
    r"(?:(?:the|an?|option|choice|answer|just|be|is|to|equal) ){0,3}"
)
FILLER = (
    r"(?:[^\w.+-]|\.(?!\d)|[-+](?! ?\.?\d)|(?:"
    "that|about|approx|approximately|around|roughly|exactly|only|just|simply|equal|to|an?|the|total of|at|least|most"
    "|over|under|nearly|almost|therefore|thus|then|now|also|still|actually|clearly|indeed|hence|so|again|option|choice|letter"
    r"|but|rather|it|is|be|there|are|will|would|definitely|probably|likely)\b)*+"
)

_SENTENCE = re.compile(
    r"""
    \b(?: answers?(?:\ (?:choice|option|letter))?
        | (?:correct|right|best|final)\ (?:option|choice|letter|solution|ending|result) )\b
    ["'*)\]]{0,3} (?:\ ?\([^()\n]{0,60}\))?
    (?: ,?\ (?:to|of|for|in|here|from|we|you|that|among|based|given|therefore|then|thus|rounded)\b
        (?: [^.!?\n] | \.\d ){0,120}? )?
    ,?\ ?\n?
    (?: (?:is|was|are|be|equals?|becomes|comes?\ (?:out\ )?to|turns?\ out\ to\ be) (?=n't|[^a-z])
      | (?:should|would|will|must|has\ to)\ (?:then\ |therefore\ )?be (?![a-z]) )
    (?!\ (?:calculated|computed|derived|determined|found|obtained|given)\b)       # the way to the answer follows
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SUPPOSED = re.compile(r"\b(?:if|whether|suppos\w+|assum\w+|unless) (?:that )?(?:\w+ ){0,3}$", re.IGNORECASE)
_LABEL = re.compile(
    r"""
    \b(?: answer | ans | final\ result | (?:correct|right|best|final)\ (?:option|choice|letter|solution|ending) )\b
      ["'*)\]]{0,3}\ ?(?:[:=]|-\ )
  | ^ [#*\ ]{0,8} (?:(?:the|final|correct)\ ){0,2} answer [*\ ]{0,3} $     # a heading
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_MARK = re.compile(r"(?<!#)####(?!#)(?! ?\d{1,2}[.)] [A-Za-z])")  # "#### 1. First" is a heading
_BOX = re.compile(r"\\(?:boxed|fbox) ?\{?")
_BRACE = re.compile(r"[{}\n]")
_TAG = re.compile(r"<answer>(.{0,300}?)</answer>", re.IGNORECASE | re.DOTALL)
_ANSWER_FIRST = re.compile(
    r"""
    \b(?:is|are)\ (?:therefore\ |thus\ |then\ )?
    (?: (?:the|our|my)\ (?:(?:final|correct|right|best)\ )?(?:answer|option|choice|solution|ending)\b
      | (?:correct|right)(?=\ because\b|\ since\b|\ as\b|[.,!;:\n]|$) )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_EXPLAINED = re.compile(r"\W{1,8}(?:explanation|reason|rationale|justification|proof)", re.IGNORECASE)
_BLANK = re.compile(r"(?:[\s:,*_\"'~=>|-]|\.\.+|…|\\[\[(])*+")
_SIGN = re.compile(r"-$|(?<!\n)- $")  # but "- 5" on a line of its own is a bullet
_STEPS = re.compile(r"\n ?1[.)] +[A-Za-z*].*\n\s*2[.)] ")  # "Answer:", then numbered steps
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|[\"')\]*}]|[A-Z][a-z]|[^\x00-\x7f])|[\n;。।]")
_SENTENCE_BREAK = re.compile(r"[.!?]\s|[\n;]")


def declared_answers(text: str) -> Iterator[DeclaredAnswer]:
    """Places in `text` that declare an answer, in no order; questions and suppositions are left out.

    Args:
        text: a normalised response.
    """
    last_digit = max(map(text.rfind, "0123456789"))
    for match in _SENTENCE.finditer(text):
        clause, end = _clause(text, match.end())
        if text[end : end + 1] != "?" and not _SUPPOSED.search(text[max(0, match.start() - 40) : match.start()]):
            yield DeclaredAnswer(match.start(), clause, "sentence")
    for match in _LABEL.finditer(text):
        clause, end = _clause(text, match.end())
        if not _STEPS.match(text, match.end()):
            yield DeclaredAnswer(match.start(), clause, "label", last_digit >= end and not _EXPLAINED.match(text, end))
    for match in _MARK.finditer(text):
        yield DeclaredAnswer(match.start(), text[match.end() : match.end() + REACH].partition("\n")[0], "mark")
    for match in _BOX.finditer(text):
        yield DeclaredAnswer(match.start(), _braced(text, match.end()), "box")
    for match in _TAG.finditer(text):
        yield DeclaredAnswer(match.start(), match[1].strip(), "box")
    for match in _ANSWER_FIRST.finditer(text):
        end = _clause(text, match.end())[1]
        if text[end : end + 1] != "?":
            before = text[max(0, match.start() - REACH) : match.start()]
            yield DeclaredAnswer(match.start(), _SENTENCE_BREAK.split(before)[-1], "answer first")
    yield from _in_other_languages(text, last_digit)


def _in_other_languages(text: str, last_digit: int) -> Iterator[DeclaredAnswer]:
    for language in LANGUAGES.values():
        for match in language.declaration.finditer(text):
            clause, end = _clause(text, match.end())
            if text[end : end + 1] == "?":
                continue
            lead_in = language.lead_in.match(clause)
            clause = clause[lead_in.end() :] if lead_in else clause
            style = "label" if match[0].endswith((":", "=")) else "sentence"
            yield DeclaredAnswer(match.start(), clause, style, style == "label" and last_digit >= end, language)


def _clause(text: str, start: int) -> tuple[str, int]:
    """Text from `start` to the end of its sentence, and the position of that end; line breaks before it are passed."""
    blank = _BLANK.match(text, start)
    begin = blank.end() if blank else start
    end = _SENTENCE_END.search(text, begin, begin + REACH)
    stop = end.start() if end else min(len(text), begin + REACH)
    return ("-" if _SIGN.search(text[start:begin]) else "") + text[begin:stop], stop


def _braced(text: str, start: int) -> str:
    """Text from `start` to the brace that closes the one before it, or to the end of the line."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + REACH):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0 or match[0] == "\n":
            return text[start : match.start()]
    return text[start : start + REACH]
