"""Numbers as people and language models write them: finding them in a text and reading their value."""

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Numeral:
    """A number in a text: it stands at ``text[start:end]`` and is worth `value`."""

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
    """`text` with one way to write each thing.

    Plain digits, ``-`` for every minus, ``a/b`` for a fraction, ``^`` for a power, no LaTeX or Markdown around a
    number, no currency, single spaces. Lines stay.
    """
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: "^" + m[0].translate(_SUPERSCRIPT_DIGITS), text.translate(_PLAIN))
        text = "".join(char if char.isascii() else _plain(char) for char in text)
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
_NUMERAL = re.compile(
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


def find(text: str) -> list[Numeral]:
    """The numbers in a normalised `text`, in order.

    Signs, thousands separators (``1,234``; but ``1, 2, 3`` are three numbers), decimals (``.5``), fractions (``3/4``
    is 0.75, ``1 1/2`` is 1.5), powers and scientific notation are read. ``25%`` is 25, ``5 million`` is 5 and ``2:30``
    is 2, as the gold answers of GSM8K count percent, millions and hours. A minus after a number is a subtraction, not a
    sign. Dates, and numbers beyond a float's range, are left out.
    """
    numerals = []
    for match in _NUMERAL.finditer(text):
        value = _value(match)
        if value is None or not math.isfinite(value) or text[max(0, match.start() - 1) : match.start()] == "^":
            continue
        if match["sign"] and "-" in match["sign"] and _is_sign(text, match.start(), " " in match["sign"]):
            value = -value
        numerals.append(Numeral(match.start(), match.end(), value))
    return numerals


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
    """The number that `text` begins with if that is written in words (``twenty-five``, ``minus two hundred``)."""
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
