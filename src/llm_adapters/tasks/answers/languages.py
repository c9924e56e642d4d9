"""The words that declare an answer, and how numbers and truth values are written, in the languages of MGSM.

A declaration tells its language itself; of a whole text only the data knows it (`Task.language`).
"""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Language:
    """One language.

    Attributes:
        code: as ISO 639-1 has it.
        declares: regular expression for the words that come before an answer.
        denies: words that make it no answer.
        fillers: words between a declaration and its answer.
        questions: words that head a question, followed by a colon.
        true, false: words for the truth values.
        decimal_comma: a comma comes before decimals, and a point or space between thousands.
    """

    code: str
    declares: str = ""
    denies: str = "(?!)"
    fillers: str = "(?!)"
    questions: str = "(?!)"
    true: tuple[str, ...] = ()
    false: tuple[str, ...] = ()
    decimal_comma: bool = False
    declaration: re.Pattern[str] = field(init=False, repr=False, compare=False)
    lead_in: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pattern = re.compile(rf"(?:{self.declares})(?!\s*(?:{self.denies}))", re.IGNORECASE)
        object.__setattr__(self, "declaration", pattern)
        object.__setattr__(self, "lead_in", re.compile(rf"(?:\s*(?:{self.fillers})\s*)+", re.IGNORECASE))


_COLON = r"\s?[:=]"
_ANSWER_FOLLOWS = r"\s(?=[-\d(]|[A-Ha-h]\b)"

LANGUAGES = {
    language.code: language
    for language in (
        Language("en", "(?!)", true=("true", "yes"), false=("false", "no")),
        Language(
            "de",
            rf"(?:antwort|ergebnis)\s(?:ist|lautet|beträgt|wäre)\b|(?:antwort|ergebnis|lösung){_COLON}"
            rf"|antwort{_ANSWER_FOLLOWS}",
            denies=r"nicht\b|kein",
            fillers=r"(?:also|daher|somit|damit|dann|etwa|ungefähr|rund|genau|insgesamt|option)\b|[:,*\"„]",
            questions=r"frage|aufgabe",
            true=("ja", "wahr", "richtig"),
            false=("nein", "falsch"),
            decimal_comma=True,
        ),
        Language(
            "es",
            rf"\b(?:respuesta|solución|resultado)(?:\s(?:correcta|final|total))?\s(?:es|sería|son)\b"
            rf"|\brespuesta(?:\s(?:correcta|final|paso a paso))?{_COLON}|\brespuesta{_ANSWER_FOLLOWS}",
            denies=r"no\b",
            fillers=r"(?:de|entonces|por lo tanto|aproximadamente|unos|unas|exactamente|la|opción|igual a)\b|[:,*\"«]",
            questions=r"pregunta|problema",
            true=("sí", "si", "verdadero", "cierto"),
            false=("no", "falso"),
            decimal_comma=True,
        ),
        Language(
            "fr",
            rf"\b(?:réponse|solution|résultat)(?:\s(?:correcte|finale|est correcte))?\s(?:est|serait)\b"
            rf"|\bréponse(?:\s(?:correcte|finale|étape par étape))?{_COLON}|\bréponse{_ANSWER_FOLLOWS}",
            denies=r"pas\b",
            fillers=r"(?:de|donc|alors|ainsi|environ|exactement|la|option|égale? à)\b|[:,*\"«]",
            questions=r"question|problème",
            true=("oui", "vrai"),
            false=("non", "faux"),
            decimal_comma=True,
        ),
        Language(
            "ru",
            rf"\bответ(?:\s(?:будет|равен|это))?\s?[-—:=]+|\bответ(?:ом)?\s(?:будет|равен|это|является)\b"
            rf"|\bответ{_ANSWER_FOLLOWS}",
            denies=r"не\b",
            fillers=r"(?:примерно|около|приблизительно|ровно|вариант|буква)\b|[:,*\"«—-](?!\d)",
            questions=r"вопрос|задача",
            true=("да", "верно", "правда", "истина"),
            false=("нет", "неверно", "ложь"),
            decimal_comma=True,
        ),
        Language(
            "sw",
            rf"\bjibu(?:\s(?:sahihi|la mwisho|la hatua kwa hatua))?(?:\sni\b|{_COLON})|\bjibu{_ANSWER_FOLLOWS}",
            denies=r"si\b",
            fillers=r"(?:kama|takriban|karibu|jumla ya)\b|[:,*\"]",
            questions=r"swali",
            true=("ndiyo", "ndio", "kweli"),
            false=("hapana", "uongo", "si kweli"),
        ),
        Language(
            "zh",
            r"(?:答案|结果|結果|答)(?:就|应该|應該|应|應)?(?:是|为|為|等于|等於|[:=])+",
            denies=r"不|多少|什么|什麼|几|幾|哪",
            fillers=r"大约|大約|约|約|一共|总共|總共|共|选项|選項|选|選|[:,*\"“「]",
            questions=r"问题|問題|题目|題目|问|問",
            true=("是", "对", "對", "正确", "正確", "真", "是的"),
            false=("否", "错", "錯", "错误", "錯誤", "不正确", "假", "不是", "不对"),
        ),
        Language(
            "ja",
            r"(?:答え|こたえ|解答|正解|回答|結論)\s?(?:は|[:=])+",
            denies=r"いくつ|何|なん",
            fillers=r"約|およそ|合計|[、:,*\"「]",
            questions=r"問題|質問",
            true=("はい", "正しい", "真"),
            false=("いいえ", "正しくない", "間違い", "偽"),
        ),
        Language(
            "th",
            rf"คำตอบ(?:ที่ถูกต้อง|สุดท้าย|ทีละขั้นตอน)?\s?(?:คือ|เป็น|[:=])+|คำตอบ{_ANSWER_FOLLOWS}",
            denies=r"ไม่",
            fillers=r"ประมาณ|ทั้งหมด|ข้อ|[:,*\"]",
            questions=r"โจทย์|คำถาม",
            true=("ใช่", "จริง", "ถูก", "ถูกต้อง"),
            false=("ไม่ใช่", "ไม่จริง", "เท็จ", "ผิด"),
        ),
        Language(
            "te",
            rf"సమాధానం\s?(?:ఏమిటంటే|[-:=])+|సమాధానం{_ANSWER_FOLLOWS}",
            fillers=r"సుమారు|[:,*\"]",
            questions=r"ప్రశ్న",
            true=("అవును", "నిజం"),
            false=("కాదు", "తప్పు", "అబద్ధం"),
        ),
        Language(
            "bn",
            rf"উত্তর(?:টি|টা)?\s?(?:হল|হলো|হচ্ছে|হবে|[-:=])+|উত্তর(?:টি|টা)?{_ANSWER_FOLLOWS}",
            denies=r"না\b|নয়",
            fillers=r"প্রায়|মোট|[:,*\"]",
            questions=r"প্রশ্ন",
            true=("হ্যাঁ", "সত্য", "ঠিক"),
            false=("না", "মিথ্যা", "ভুল"),
        ),
    )
}
"""The languages by their codes."""

QUESTIONS = "|".join(f"(?:{language.questions})" for language in LANGUAGES.values() if language.questions != "(?!)")
"""Regular expression for the words that head a question, in any of the languages."""

TRUTH = {
    word: value
    for language in LANGUAGES.values()
    for value, words in (("true", language.true), ("false", language.false))
    for word in words
}
"""Words for truth values, in lower case, and what they are, ``"true"`` or ``"false"``; no word is both."""


def truth(text: str, language: Language) -> str | None:
    """Truth value that a text begins with, ``"true"`` or ``"false"``; None where it begins with none.

    Args:
        text: the clause after a declaration, or a text in that language.
        language: its language.
    """
    start = text.strip(" \n*\"'“”«»„「」[]().,:。").casefold()
    words = sorted([*language.true, *language.false], key=len, reverse=True)
    spaced = language.code not in ("zh", "ja", "th")
    for word in words:
        if start.startswith(word) and not (spaced and start[len(word) : len(word) + 1].isalnum()):
            return TRUTH[word]
    return None


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[. ]\d{3})+(?![\d.])")
_DECIMALS = re.compile(r"(?<![\d,])(\d+),(\d{1,2}|\d{4,})(?![\d,])")


def with_decimal_points(text: str) -> str:
    """Text of a language with decimal commas, its numbers as English has them: 1.234,5 is 1234.5.

    Three digits after a lone comma are thousands, since models keep to the English way there.

    Args:
        text: a normalised text.
    """
    return _DECIMALS.sub(r"\1.\2", _THOUSANDS.sub(lambda match: re.sub("[. ]", "", match[0]), text))


_BELOW_TEN = ("零〇", "一壹", "二两兩貳", "三叁", "四肆", "五伍", "六陆陸", "七柒", "八捌", "九玖")
_DIGITS = {char: value for value, chars in enumerate(_BELOW_TEN) for char in chars}
_SCALES = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "兆": 10**12}
_NUMERAL = re.compile(f"[{''.join([*_DIGITS, *_SCALES, *_MYRIADS])}]+(?![共起些定样樣般直])")
_SCALED = rf"\d+(?:\.\d+)?\s?(?:[{''.join(_SCALES)}]*[{''.join(_MYRIADS)}]|[{''.join(_SCALES)}])"
_WITH_SCALES = re.compile(rf"(?<![\d.,])(?:{_SCALED})+(?:\d+(?![\d.,]))?")


def without_scales(text: str) -> str:
    """Text in which a Chinese or Japanese number of digits and characters is one of digits: 7万 is 70000.

    Args:
        text: a text.
    """
    return _WITH_SCALES.sub(lambda match: f"{_worth(match[0]):.10g}", text)


def numeral(text: str) -> float | None:
    """Number in Chinese characters that a text begins with (二十五); None where there is none.

    Args:
        text: a clause.
    """
    match = _NUMERAL.match(text.lstrip())
    return _worth(match[0]) if match else None


def _worth(text: str) -> float:
    total = section = 0.0
    number: float | None = None
    for digits, char in re.findall(r"(\d+(?:\.\d+)?)|(\S)", text):
        if digits:
            number = float(digits)
        elif char in _DIGITS:
            number = (number or 0) * 10 + _DIGITS[char] if number else float(_DIGITS[char])
        elif char in _SCALES:
            section += (1 if number is None else number) * _SCALES[char]
            number = None
        else:
            total += (section + (number or 0) or 1) * _MYRIADS[char]
            section, number = 0.0, None
    return total + section + (number or 0)
