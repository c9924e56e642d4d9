"""Answers that choose: an option's letter, an option's name, true or false.

`LETTER`, `OPTION` and `BOOLEAN` are the extractors that `llm_adapters.tasks.answers` uses.
"""

import re
from collections.abc import Iterable

from llm_adapters.tasks.answers import languages
from llm_adapters.tasks.answers.declarations import DENIAL, FILLER, DeclaredAnswer, Extractor

# --- letters

_SEPARATOR = r"(?: ?[/|] ?|,? or |,? and )"
_LETTER = r"(?:\([A-Ha-h]\)|\b[A-H]\b(?!'))"
_LETTER_LIST = re.compile(rf"{_LETTER}(?:,? ?{_LETTER}){{0,8}}(?:{_SEPARATOR}{_LETTER})+")
_DENIED_LETTER = re.compile(rf"(?i:{DENIAL}){_LETTER}")
_BRACKETED = r"(?<!\w)[(\[]([A-Ha-h])[)\]]"
_LETTER_FIRST = re.compile(FILLER.replace("|an?|", "|") + r"([A-Ha-h])(?![\w'/^(]|[-.]\w| =)", re.IGNORECASE)
_AFTER_ARTICLE = re.compile(r" (?!(?:because|since|as|is|which|and|for|with|so|but|or)\b)[a-z]")
_LETTER_INSIDE = re.compile(
    rf"{_BRACKETED}|\b(?i:option|choice|letter) ?[(\[]?([A-Hb-h])\b(?!')|(?:[=:,]|\bis|\bi\.e\.) ?([A-H])\W*$"
)
_LETTER_BEFORE = re.compile(rf"{_BRACKETED}|\b([A-H])\W*$|\b(?i:option|choice) ([a-h])\W*$")
_LETTER_MARKER = re.compile(r"(?<![\w(])\(?([A-H])[).:](?!\w)|(?<!\w)\(([A-H])\)")
_LETTER_UNDECLARED = re.compile(
    r"""
    (?<!\w)\(([A-H])\)                                      # (B)
  | ^\W{0,3}([A-H])(?:\)|[.:]?\W{0,3}$)                     # a line "B) 20" or "B"
  | \A\W{0,3}([B-H])[.:,]\ | \A\W{0,3}(A)[.,]\              # begins "B. 20"; but "A: ..." stands for "Answer:"
  | \A\W{0,3}([a-h])(?:\)|\W{0,3}\Z)                        # "b) 20", "b"
  | \b(?i:option|choose|pick|select)\ \(?([A-Hb-h])\b(?!')
  | (?:\b(?i:so|thus|hence|therefore|is)|'s)[,:]?\ (?:\(([a-h])\)|([A-H])\W{0,3}$)
    """,
    re.VERBOSE | re.MULTILINE,
)
_BEFORE_OTHER_SCRIPT = re.compile(r"(?<![A-Za-z])([A-Ha-h])(?=[^\x00-\u02ff])")  # B选项


def _clean_letter(text: str) -> str:
    text = _BEFORE_OTHER_SCRIPT.sub(r"\1 ", text)
    text = _without_listing(_LETTER_LIST.sub(" ", text), _LETTER_MARKER, "ABC")
    return _DENIED_LETTER.sub(" ", text)


def _declared_letter(answer: DeclaredAnswer) -> str | None:
    if answer.style == "answer first":
        return _letter(_last(_LETTER_BEFORE.finditer(answer.text)))
    first = _LETTER_FIRST.match(answer.text)
    if first and not _is_article(first, answer.style):
        return _letter(first)
    return None if answer.style in ("box", "mark") else _letter(_last(_LETTER_INSIDE.finditer(answer.text)))


def _is_article(match: re.Match[str], style: str) -> bool:
    after = match.string[match.end() :]
    if match[1] == "a":
        return bool(re.match(r" ?\w|-", after))
    return match[1] == "A" and style == "label" and bool(_AFTER_ARTICLE.match(after))


def _undeclared_letter(text: str) -> str | None:
    return _letter(_last(_LETTER_UNDECLARED.finditer(text)))


def _letter(match: re.Match[str] | None) -> str | None:
    return _group(match).upper() if match else None


def _group(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group)


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    found = list(matches)
    return found[-1] if found else None


_PICK = re.compile(
    r"\b(?:answer:|(?:answer|it|option) is:?|so|thus|hence|therefore|choose|pick|select),? $", re.IGNORECASE
)


def _without_listing(text: str, marker: re.Pattern[str], start: str) -> str:
    """Text without the markers that only repeat the choices: runs such as A to E or 1 to 4, that begin with `start`.

    A later marker that is picked ("so it is (C)") is no part of a run, nor is a first one that ends its sentence.
    """
    run: list[re.Match[str]] = []
    drop: list[re.Match[str]] = []
    names = ""
    for match in [*marker.finditer(text), None]:
        name = _group(match) if match else ""
        if match and names and name == names[-1] and match.start() - run[-1].end() <= 1:  # "(A) A) 59 (B) B) 69"
            run.append(match)
            continue
        if match and names and ord(name) == ord(names[-1]) + 1:
            if not _PICK.search(text[max(0, match.start() - 12) : match.start()]):
                run.append(match)
                names += name
            continue
        drop += run if names.startswith(start) else []
        begins = match and name == start[0] and text[match.end() : match.end() + 1] not in (".", ";", "\n")
        run, names = ([match], name) if match and begins else ([], "")
    pieces, end = [], 0
    for match in drop:
        pieces.append(text[end : match.start()])
        end = match.end()
    return " ".join([*pieces, text[end:]])


# --- named options and truth values

_NAME = r"(?<![A-Za-z])(?:answer|solution|ending|option)[ _#-]?\(?[1-9]\)?(?![\d%]|[.,]\d)"
_NAMES = re.compile(_NAME, re.IGNORECASE)
_NAME_LIST = re.compile(
    rf"{_NAME}(?:, ?{_NAME}){{0,8}}(?:{_SEPARATOR}{_NAME})+|{_NAME}(?:, ?{_NAME}){{2,8}}", re.IGNORECASE
)
_NAME_MARKER = re.compile(r"(?<![A-Za-z])(?:answer|solution|ending|option) ?([1-9]) ?:", re.IGNORECASE)
_DENIED_NAME = re.compile(
    rf"(?:{DENIAL}|\bthan (?:the )?){_NAME}|{_NAME} (?:is|are|was|seems|would be|does|can)(?: also| clearly)?"
    r"(?:n't| ?not| wrong| incorrect| false| less| un\w+| im\w+| irrelevant)",
    re.IGNORECASE,
)


def _clean_option(text: str) -> str:
    return _DENIED_NAME.sub(" ", _NAME_LIST.sub(" ", _without_listing(text, _NAME_MARKER, "12")))


def _declared_option(answer: DeclaredAnswer) -> str | None:
    found = _NAMES.findall(answer.text)
    return _option(found[-1 if answer.style == "answer first" else 0]) if found else None


def _undeclared_option(text: str) -> str | None:
    found = _NAMES.findall(text)
    return _option(found[-1]) if found else None


def _option(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_TRUTH = r"(?:true|false|yes|no)"
_TRUTH_LIST = re.compile(rf"\b{_TRUTH}(?:{_SEPARATOR}{_TRUTH}\b)+", re.IGNORECASE)
_HEDGE = r"(?:really |quite |necessarily |actually |entirely |be )?"
_TRUTH_FIRST = re.compile(
    rf"{FILLER}((?:n't |not ){_HEDGE})?\b({_TRUTH})\b(?! (?:one|longer|more|such|matter))", re.IGNORECASE
)
_TRUE_OR_FALSE = re.compile(rf"((?:\bnot|n't) {_HEDGE})?\b(true|false)\b", re.IGNORECASE)
_TRUTH_LEADS = re.compile(rf"\W*()({_TRUTH})\b\W*(?:[,.!:;-]|$)", re.IGNORECASE)
_SENTENCES = re.compile(r"[^.!?\n]+[.!?]?")


def _clean_boolean(text: str) -> str:
    return _TRUTH_LIST.sub(" ", text)


def _declared_boolean(answer: DeclaredAnswer) -> str | None:
    if answer.language is not None and (value := languages.truth(answer.text, answer.language)):
        return value
    match = _TRUTH_FIRST.match(answer.text) if answer.style != "answer first" else None
    return _truth(match or _last(_TRUE_OR_FALSE.finditer(answer.text)))


def _undeclared_boolean(text: str) -> str | None:
    sentences = [s for s in _SENTENCES.findall(text) if s.strip() and not s.endswith("?")]
    leading = [match for sentence in sentences if (match := _TRUTH_LEADS.match(sentence))]
    if leading and leading[0].string is sentences[0]:
        return _truth(leading[0])
    said = [match for sentence in sentences for match in _TRUE_OR_FALSE.finditer(sentence)]
    return _truth(said[-1] if said else leading[-1] if leading else None)


def _truth(match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    return str((match[2].lower() in ("true", "yes")) != bool(match[1])).lower()


LETTER = Extractor(_clean_letter, _declared_letter, _undeclared_letter)
OPTION = Extractor(_clean_option, _declared_option, _undeclared_option)
BOOLEAN = Extractor(_clean_boolean, _declared_boolean, _undeclared_boolean)
