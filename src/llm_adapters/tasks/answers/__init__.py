"""The answer in a model's response, and whether it is the right one. Pure functions, no model needed.

Three protocols:

- ``default``: the answer that the response declares ("The answer is 5", "Answer: (B)", ``#### 5``, ``\\boxed{5}``,
  "5 is the answer"); without a declaration the last number, or the letter, option or truth value that stands as one.
- ``strict``: only a declared answer. Where there is one it equals the default one.
- ``paper``: the rules of the paper's evaluation code (commit 8166572), which read ``3/4`` as 4 and "Answer: B" as A.

The rules of the first two:

- Text after the end of the response (the next "### Instruction", "Question:", ...) does not count; nor does what
  follows a line ``#### 5``, which ends a solution by GSM8K's convention.
- Of several declarations the last counts, since models correct themselves ("The answer is 5. Wait, the answer is 6.").
- A declared equation is worth what stands after its last equals sign. Of several quantities ("5 birds and 3 cats") the
  first counts: the sentence names no other as its answer.
- What is denied ("not 5 but 6"), asked ("is it so that the answer is 5?"), supposed ("if the answer is 5") or only
  listed ("answer1/answer2", "A or B") is not declared.
"""

import itertools
import math
import re
from operator import attrgetter

from llm_adapters.errors import unknown
from llm_adapters.tasks.answers import choices
from llm_adapters.tasks.answers import numbers as numerals
from llm_adapters.tasks.answers.declarations import DENIAL, FILLER, Claim, Reader, claims, end_of_solution, response

KINDS = ("number", "letter", "option", "boolean", "text")
PROTOCOLS = ("default", "strict", "paper")
TOLERANCE = 1e-3  # absolute, as `miss` in the paper's code


def extract(text: str, kind: str, protocol: str = "default") -> float | str | None:
    """The answer of `kind` in `text`, or None where there is none.

    `kind` is ``"number"`` (a float comes back), ``"letter"`` (an upper-case letter), ``"option"`` (a lower-case name
    such as ``"answer2"`` or ``"solution1"``), ``"boolean"`` (``"true"`` or ``"false"``) or ``"text"`` (the whole
    response, stripped). `protocol` is ``"default"``, ``"strict"`` or ``"paper"``, as described at the top of this
    module. Any text is fine; raises `RequestError` for an unknown kind or protocol.
    """
    if kind not in KINDS:
        raise unknown("answer kind", kind, KINDS)
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if protocol == "paper":
        return _paper(text, kind)
    text = response(text)
    if kind == "text":
        return text.strip() or None
    reader = _READERS[kind]
    text = reader.clean(end_of_solution(numerals.normalise(text)))
    # A model that loops says the same a thousand times: read each clause once, in the order of its last occurrence.
    distinct = {(claim.text, claim.form, claim.more): claim for claim in sorted(claims(text), key=attrgetter("start"))}
    for claim in sorted(distinct.values(), key=attrgetter("start"), reverse=True):
        if (answer := reader.declared(claim)) is not None:
            return answer
    return reader.undeclared(text) if protocol == "default" else None


def is_correct(prediction: float | str | None, label: str, kind: str) -> bool:
    """Whether `prediction` (what `extract` returned) equals the gold `label`, written as in the data.

    Numbers may differ by 0.001 in absolute terms, as in the paper's code; a label may be written ``"15.0"``,
    ``"1,000"``, ``"3/4"`` or ``"$5"``. None, NaN and infinity are never correct. Everything else is compared ignoring
    case, brackets and spaces (``"(b)"`` is B, ``"Answer 2"`` is answer2, ``"yes"`` is true). Raises `RequestError` for
    an unknown kind.
    """
    if kind not in KINDS:
        raise unknown("answer kind", kind, KINDS)
    if prediction is None:
        return False
    if kind == "number":
        gold, found = _number(label), _number(prediction)
        return gold is not None and found is not None and abs(gold - found) <= TOLERANCE
    return _plain(prediction, kind) == _plain(label, kind) != ""


def _number(value: object) -> float | None:
    """`value`, a number or a text that is one, as a finite float."""
    try:
        number = float(str(value).replace(",", ""))
    except ValueError:
        found = numerals.find(numerals.normalise(str(value)))
        number = found[0].value if len(found) == 1 else math.nan
    return number if math.isfinite(number) else None


def _plain(value: object, kind: str) -> str:
    if kind == "text":
        return " ".join(str(value).split()).casefold()
    plain = re.sub(r"[^a-z0-9]", "", str(value).lower())
    return {"yes": "true", "no": "false"}.get(plain, plain) if kind == "boolean" else plain


# --- the paper's rules ----------------------------------------------------------------------------------------------

_PAPER = {
    "number": re.compile(r"-?\d+\.?\d*"),
    "letter": re.compile(r"A|B|C|D|E"),
    # the code picks one of these four sets by data set; a response names options of one set only
    "option": re.compile(r"solution[12]|answer[1-5]|ending[1-4]|option[12]"),
    "boolean": re.compile(r"true|false"),
}


def _paper(text: str, kind: str) -> float | str | None:
    if kind == "text":
        return text.strip() or None
    if kind != "number":
        match = _PAPER[kind].search(text)
        return match[0] if match else None
    found = _PAPER[kind].findall(text.replace(",", ""))
    number = float(found[-1]) if found else math.inf  # infinity is how that code says "no answer"
    return number if math.isfinite(number) else None


# --- numbers --------------------------------------------------------------------------------------------------------

_DENIED_NUMBER = re.compile(DENIAL + r"[(\"']?-?\.?\d+(?:[,./]\d+)*", re.IGNORECASE)
_LEAD_IN = re.compile(FILLER, re.IGNORECASE)
_ASIDE = re.compile(r"\([^()=]*=[^()]*\)")
_BREAK = r" (?:because|since|as|where|when|if|after|given|due|considering|so|but|while|which)\b|,(?! or\b|\d{3})"
_STOP = re.compile(_BREAK, re.IGNORECASE)
_UNIT_END = re.compile(_BREAK + r"|\(", re.IGNORECASE)
_RESTATED = re.compile(
    r", or ((?:[^,]|,(?=\d))*(?:=|\b(?:total|altogether|in all|combined)\b)(?:[^,]|,(?=\d))*)", re.IGNORECASE
)
_EQUALS = re.compile(r"[-=]+>|→|⇒|=+|\bequals?(?: to)?\b", re.IGNORECASE)
_OPERATOR = re.compile(r"[)% ]*(?:[-+*/x^]|times|plus|minus|divided by)[( ]*", re.IGNORECASE)
_RELATION = re.compile(r" ?(?:times|more than|less than|fewer than|percent of|% of|of) $", re.IGNORECASE)
_LINK = re.compile(
    r"\b(?:is|are|was|were|has|have|had|makes?|gets?|gives?|leaves?|needs?|costs?|totall?ing|totals?)\b", re.IGNORECASE
)
_GROUPS = re.compile(r"^(-?\d{1,3})((?: \d{3})+)(?![\d,.]?\d)")  # 118 000
_LIST_MARK = re.compile(r"^ ?(\d{1,2})[.)] +(?=[A-Za-z*])", re.MULTILINE)


def _clean_number(text: str) -> str:
    return _DENIED_NUMBER.sub(" ", text)


def _declared_number(claim: Claim) -> float | None:
    clause = re.sub(r"(?<=\d) / (?=\d)", "/", claim.text)
    clause = _GROUPS.sub(lambda m: m[1] + m[2].replace(" ", ""), clause)
    found = numerals.find(clause)
    if claim.form == "reverse":
        return _equation(clause, found[-1]) if found else None
    start = _after(_LEAD_IN.match(clause))
    direct = bool(found) and found[0].start <= start and not _is_calculation(clause, found)
    if claim.form == "label" and claim.more and not (direct and _ends_soon(clause, found)):
        return None  # "Answer: She has 3 + 4 = 7 apples. She eats 2 ..." is where the reasoning begins
    if not found:
        return numerals.in_words(clause[start:])
    if direct:
        restated = _RESTATED.search(clause, found[0].end)
        if restated and (again := numerals.find(restated[1])):
            clause, found = restated[1], again
        head = clause[: found[0].end] + _ASIDE.sub("", clause[found[0].end :])  # 12 (that is 3 * 4 = 12)
        stop = _STOP.search(head, found[0].end)
        return _equation(head[: stop.start() if stop else None], found[0])
    if claim.form == "mark":
        return None
    for link in _LINK.finditer(clause):  # "the sum of 5 and 3, which is 8"
        reach = _after(_LEAD_IN.match(clause, link.end()))
        for numeral in found:
            if link.end() <= numeral.start <= reach:
                return _equation(clause[numeral.start :], numeral)
    return _equation(clause, found[-1])


def _after(match: re.Match[str] | None) -> int:
    return match.end() if match else 0


def _ends_soon(clause: str, found: list[numerals.Numeral]) -> bool:
    """Whether `clause`, which begins with a number, is that number and its unit rather than the start of a sentence."""
    end = _UNIT_END.search(clause, found[0].end)
    unit = clause[found[0].end : end.start() if end else None]
    return len(unit.split()) <= 4 and not _EQUALS.search(unit) and not numerals.find(unit)


def _equation(text: str, otherwise: numerals.Numeral) -> float:
    """What stands after the last equals sign and is a number, not again a calculation (8 in "8 = 5 + 3")."""
    sides = _EQUALS.split(text)
    for side in reversed(sides if len(sides) > 1 else []):
        found = numerals.find(side)
        if found and not any(_is_operator(side, *pair) for pair in itertools.pairwise(found)):
            return found[0].value
    return otherwise.value


def _is_calculation(clause: str, found: list[numerals.Numeral]) -> bool:
    """Whether `clause` begins with a calculation whose result follows otherwise than after "=" ("3 times 6, or 18")."""
    if len(found) < 3 or _EQUALS.search(clause):
        return False
    between = clause[found[0].end : found[1].start]  # empty in "10-15"
    return bool(_RELATION.match(between) or (between and _is_operator(clause, *found[:2])))


def _is_operator(text: str, left: numerals.Numeral, right: numerals.Numeral) -> bool:
    between = text[left.end : right.start]
    return bool(_OPERATOR.fullmatch(between) or (not between.strip() and text[right.start] in "+-"))


def _last_number(text: str) -> float | None:
    marks = _LIST_MARK.findall(text)
    if "1" in marks and len(marks) > 1:
        text = _LIST_MARK.sub("", text)
    found = numerals.find("\n" + text)
    if not found:  # x5, where nothing better is
        found = numerals.find(re.sub(r"(?<![\d.][eE])(?<=[A-Za-z_])(?=\d)", " ", text))
    return found[-1].value if found else None


_READERS = {
    "number": Reader(_clean_number, _declared_number, _last_number),
    "letter": choices.LETTER,
    "option": choices.OPTION,
    "boolean": choices.BOOLEAN,
}
