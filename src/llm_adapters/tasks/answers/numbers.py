"""Numbers as people and language models write them: finding them in a text, and telling which one is the answer.

`NUMBER` is the extractor that `llm_adapters.tasks.answers` uses.
"""

import itertools
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from llm_adapters.tasks.answers import languages
from llm_adapters.tasks.answers.declarations import DENIAL, FILLER, DeclaredAnswer, Extractor


@dataclass(frozen=True)
class Number:
    """Number in a text, written at ``text[start:end]``; `value` is what it is worth."""

    start: int
    end: int
    value: float


_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_NARROW_SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f"), "\u2009")
_SYMBOLS = {ord("×"): "*", ord("·"): "*", ord("⋅"): "*", ord("÷"): " / ", ord("⁄"): "/", ord("≈"): "=", ord("’"): "'"}
_PLAIN = _DASHES | _NARROW_SPACES | _SYMBOLS
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁻]+")
_SUPERSCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

# LaTeX and Markdown down to plain text, in this order. Every pattern is linear: no two neighbouring repeats can match
# the same character.
_RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\[dt]?frac ?\{ ?(-?[\d.,]{1,20}) ?\} ?\{ ?([\d.,]{1,20}) ?\}", r" \1/\2"),
    (r"\\[dt]?frac ?(\d) ?(\d)", r" \1/\2"),
    (r"([-+]) {1,2}(?=\d{1,20}/\d)", r"\1"),  # the space that the two rules above put behind a sign
    (r"\\(?:text|math)(?:bf|it|rm|sf|tt|normal)?(?=[\s{])", ""),
    (r"\\(?:mbox|boldsymbol|displaystyle|left|right)\b", ""),
    (r"\\(?:times|cdot)\b", "*"),
    (r"\\(?:approx|simeq)\b", "="),
    (r"\\div\b", " / "),
    (r"\^ ?\{?\\circ\}?|°", " "),
    (r"\\!|(?<=\d)\\[,;: ] ?(?=\d{3})|(?<=\d)\u2009(?=\d{3})", ""),  # 10,\!000 and 10\,000
    (r"\{,\}(?=\d)", ","),  # 10{,}000
    (r"\\[,;:()\[\]]|\\q?quad\b|\u2009", " "),
    (r"\\([$%#&])", r"\1"),
    (r"\^ ?\{ ?(-?\d{1,3}) ?\}", r"^\1"),
    (r"<<[^<>\n]{0,200}>>(?= ?[-$]{0,2}\.?\d)|<<|>>", " "),  # GSM8K's calculator marks: 6*7=<<6*7=42>>42
    (r"(?<=[\d)])\*\*(?=[\d(])", "^"),
    (r"\*\*+|`+|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])", ""),
    (r"\b(approx|ca|Rs)\. ?(?=[$\d])", r"\1 "),
    (r"\b(?:Rs|INR|USD|EUR|GBP|US(?=\$)|CA(?=\$)) ?(?=[-$]?\d)", "$"),
    (r"(?i)\b(?:negative|minus) (?=[$€£¥₹]?\.?\d)", "-"),
    (r"[$€£¥₹] ?\d{1,3}(?: \d{3})+(?![\d,.]?\d)", lambda match: match[0].replace(" ", "")),  # $118 000
    (r"(?<![\w.,])\d{1,3}(?: \d{3}){0,3} 0\d\d(?: \d{3}){0,3}(?![\d,.]?\d)", lambda match: match[0].replace(" ", "")),
    (r"(?<=[A-Za-z0-9])[$€£¥₹]{1,3} ?(?=-?\.?\d)", " "),
    (r"[$€£¥₹]{1,3} ?(?=-?\.?\d)", ""),
    (r"[$€£¥₹]", " "),
    (r"[ \r\f\v]+", " "),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]


def normalise(text: str) -> str:
    """Same text with one way to write each thing.

    Args:
        text: any text.

    Returns:
        The text with plain digits, ``-`` for every minus, ``a/b`` for a fraction, ``^`` for a power, no LaTeX or
        Markdown around a number, no currency and single spaces. Lines stay.
    """
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: "^" + m[0].translate(_SUPERSCRIPT_DIGITS), text.translate(_PLAIN))
        text = "".join(char if char.isascii() else _plain(char) for char in text)
        text = languages.without_scales(text)
    text = text.replace("\t", " ")
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


def _plain(char: str) -> str:
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    decomposed = unicodedata.normalize("NFKC", char)
    if "⁄" in decomposed:  # ½ is 1⁄2
        return " " + decomposed.replace("⁄", "/")
    if "\uff01" <= char <= "\uff5e":  # full-width letters and punctuation
        return decomposed
    return char


# The branch for dates comes first, so that 12/25/2020 is not read as a fraction. A number hangs on no letter (H2O, x1)
# and is no exponent (cm^2); units may hang on the number (5kg).
_NUMBER = re.compile(
    r"""
    (?<![A-Za-z0-9_^/]) (?P<date> \d{1,2}/\d{1,2}/\d{2,4} | \d{4}-\d\d-\d\d ) (?! [\d/-] )
  | (?P<sign> [-+]\ ? )? (?<! [A-Za-z0-9_^] )
    (?P<number>
        \d{1,3} (?: ,\d{3} )+ (?!\d) (?: \.\d+ )?
      | \d{1,2} (?: ,\d{2} ){1,5} ,\d{3} (?!\d) (?: \.\d+ )?     # 1,00,000 as in India
      | \d+ (?: \.\d+ )?
      | (?<! [A-Za-z0-9.] ) \.\d+
    )
    (?: [eE] (?P<exponent> [-+]?\d{1,3} ) (?! [A-Za-z0-9_] )
      | \ ?[x*]\ ?10\ ?\^\ ? (?P<decade> -?\d{1,3} ) (?!\d)
      | \ ?\^\ ? (?P<power> -?\d{1,3} ) (?!\d)
      | : (?P<minute> [0-5]\d ) (?: :[0-5]\d )? (?!\d)
      | \ (?:and\ )? (?P<top> \d{1,6} ) / (?P<bottom> \d{1,6} ) (?! [\d/] )
      | / (?P<over> \d{1,3}(?:,\d{3})+(?!\d) | \d{1,15}(?:\.\d{1,15})? ) (?! \d | /\d )
    )?
    """,
    re.VERBOSE,
)


def find(text: str) -> list[Number]:
    """Numbers in a text, in order.

    Signs, thousands separators (``1,234``; but ``1, 2, 3`` are three numbers), decimals (``.5``), fractions (``3/4``
    is 0.75, ``1 1/2`` is 1.5), powers and scientific notation are read. ``25%`` is 25, ``5 million`` is 5 and ``2:30``
    is 2, as the gold answers of GSM8K count percent, millions and hours. A minus after a number is a subtraction, not a
    sign. Dates, and numbers beyond a float's range, are left out.

    Args:
        text: a normalised text (see `normalise`).
    """
    numbers = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is None or not math.isfinite(value) or text[max(0, match.start() - 1) : match.start()] == "^":
            continue
        if match["sign"] and "-" in match["sign"] and _is_sign(text, match.start(), " " in match["sign"]):
            value = -value
        numbers.append(Number(match.start(), match.end(), value))
    return numbers


def _is_sign(text: str, at: int, spaced: bool) -> bool:
    before = text[max(0, at - 2) : at]
    previous = before.rstrip(" ")[-1:]
    if spaced:  # "- 5": a sign where nothing else can stand, otherwise a subtraction or a bullet
        return previous in ("", "=", ":", "(")
    return not (previous.isdigit() or (previous in (")", "%", "]") and previous)) and not before[-1:].isalpha()


def _value(match: re.Match[str]) -> float | None:
    if match["date"]:
        return None
    number = float(match["number"].replace(",", ""))
    try:
        if match["exponent"] or match["decade"]:
            return float(f"{number}e{match['exponent'] or match['decade']}")
        if match["power"]:
            return float(number ** int(match["power"]))
        if match["top"]:
            return number + int(match["top"]) / int(match["bottom"])
        if match["over"]:
            return number / float(match["over"].replace(",", ""))
    except ArithmeticError:
        return None
    return number


_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_BELOW_TWENTY.split())}
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), start=2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
_IN_WORDS = re.compile(
    rf"""
    (?P<sign> (?:minus|negative)\  )? (?: an?\ (?=hundred|thousand|million) )?
    (?P<words> (?:{_WORD}) (?: (?: [-\ ] | ,?\ and\  ) (?:{_WORD}) ){{0,12}} )\b
    (?! \ of\b | \ (?:which|that|who)\b | - )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def in_words(text: str) -> float | None:
    """Number in words that a text begins with (``twenty-five``, ``minus two hundred``), or None.

    Args:
        text: any text.
    """
    match = _IN_WORDS.match(text)
    if match is None:
        return None
    total = group = 0
    for word in re.findall(_WORD, match["words"].lower()):
        if word == "hundred":
            group = (group or 1) * 100
        elif word in _SCALES:
            total, group = total + (group or 1) * _SCALES[word], 0
        else:
            group += _WORDS[word]
    return float(-(total + group) if match["sign"] else total + group)


# --- the number that is the answer

_DENIED_NUMBER = re.compile(DENIAL + r"[(\"']?-?\.?\d+(?:[,./]\d+)*", re.IGNORECASE)
_LEAD_IN = re.compile(FILLER, re.IGNORECASE)
_ASIDE = re.compile(r"\([^()=]*=[^()]*\)")
_BREAK = r" (?:because|since|as|where|when|if|after|given|due|considering|so|but|while|which)\b|,(?! or\b|\d{3})"
_CLAUSE_END = re.compile(_BREAK, re.IGNORECASE)
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


def _without_denied(text: str) -> str:
    """Text without the numbers that it denies ("not 5")."""
    return _DENIED_NUMBER.sub(" ", text)


def _declared_number(answer: DeclaredAnswer) -> float | None:
    """Number that a declared answer names: the one its clause begins with, else the one after a verb, or the last."""
    clause = re.sub(r"(?<=\d) / (?=\d)", "/", answer.text)
    if answer.language is not None:
        clause = languages.with_decimal_points(clause) if answer.language.decimal_comma else clause
        if (numeral := languages.numeral(clause)) is not None:
            return numeral
    clause = _GROUPS.sub(lambda m: m[1] + m[2].replace(" ", ""), clause)
    found = find(clause)
    if answer.style == "answer first":
        return _equation(clause, found[-1]) if found else None
    start = _after(_LEAD_IN.match(clause))
    direct = bool(found) and found[0].start <= start and not _is_calculation(clause, found)
    if answer.style == "label" and answer.digits_follow and not (direct and _ends_soon(clause, found)):
        return None  # "Answer: She has 3 + 4 = 7 apples. She eats 2 ..." is where the reasoning begins
    if not found:
        return in_words(clause[start:])
    if direct:
        restated = _RESTATED.search(clause, found[0].end)
        if restated and (again := find(restated[1])):
            clause, found = restated[1], again
        head = clause[: found[0].end] + _ASIDE.sub("", clause[found[0].end :])  # 12 (that is 3 * 4 = 12)
        stop = _CLAUSE_END.search(head, found[0].end)
        return _equation(head[: stop.start() if stop else None], found[0])
    if answer.style == "mark":
        return None  # "#### Step 2" is a heading
    for link in _LINK.finditer(clause):  # "the sum of 5 and 3, which is 8"
        reach = _after(_LEAD_IN.match(clause, link.end()))
        for number in found:
            if link.end() <= number.start <= reach:
                return _equation(clause[number.start :], number)
    return _equation(clause, found[-1])


def _after(match: re.Match[str] | None) -> int:
    return match.end() if match else 0


def _ends_soon(clause: str, found: list[Number]) -> bool:
    """True where `clause`, which begins with a number, is that number with its unit and not the start of a sentence."""
    end = _UNIT_END.search(clause, found[0].end)
    unit = clause[found[0].end : end.start() if end else None]
    return len(unit.split()) <= 4 and not _EQUALS.search(unit) and not find(unit)


def _equation(text: str, otherwise: Number) -> float:
    """Value after the last equals sign that is a number and not again a calculation (8 in "8 = 5 + 3")."""
    sides = _EQUALS.split(text)
    for side in reversed(sides if len(sides) > 1 else []):
        found = find(side)
        if found and not any(_is_operator(side, *pair) for pair in itertools.pairwise(found)):
            return found[0].value
    return otherwise.value


def _is_calculation(clause: str, found: list[Number]) -> bool:
    """True where `clause` begins with a calculation whose result follows without an "=" ("3 times 6, or 18")."""
    if len(found) < 3 or _EQUALS.search(clause):
        return False
    between = clause[found[0].end : found[1].start]  # empty in "10-15"
    return bool(_RELATION.match(between) or (between and _is_operator(clause, *found[:2])))


def _is_operator(text: str, left: Number, right: Number) -> bool:
    between = text[left.end : right.start]
    return bool(_OPERATOR.fullmatch(between) or (not between.strip() and text[right.start] in "+-"))


def _undeclared_number(text: str) -> float | None:
    """Last number of a text; the marks of a numbered list are none."""
    marks = _LIST_MARK.findall(text)
    if "1" in marks and len(marks) > 1:
        text = _LIST_MARK.sub("", text)
    found = find("\n" + text)
    if not found:  # x5, where nothing better is
        found = find(re.sub(r"(?<![\d.][eE])(?<=[A-Za-z_])(?=\d)", " ", text))
    return found[-1].value if found else None


NUMBER = Extractor(_without_denied, _declared_number, _undeclared_number)
