import pytest

from llm_adapters.tasks.answers import extract
from llm_adapters.tasks.answers.languages import LANGUAGES, TRUTH, numeral, truth, with_decimal_points, without_scales

NUMBERS = [  # language, response, its answer
    ("de", "16 - 7 = 9. Das Ergebnis ist also 9 Eier, denn 7 fehlen.", 9),
    ("de", "Endantwort: 1.250,50 Euro", 1250.5),
    ("de", "Die Antwort ist nicht 5. Die Antwort lautet 6.", 6),
    ("es", "La respuesta final es de 2,5 metros porque 5 / 2 = 2,5.", 2.5),
    ("es", "Respuesta: 40\n\nPregunta: Ana tiene 3 peras.\nRespuesta: 3", 40),
    ("fr", "La réponse est donc 12 pommes, car 4 * 3 = 12.", 12),
    ("fr", "Réponse : 3,75", 3.75),
    ("ru", "Ответ — 64 яблока, потому что 8 ушли.", 64),
    ("ru", "Ответ: 0,5", 0.5),
    ("sw", "Jibu ni 33 kwa sababu 3 zimebaki.", 33),
    ("zh", "所以答案是二十五个苹果，不是 3 个。", 25),
    ("zh", "正确答案：3.5万元", 35000),
    ("zh", "答案是：一共 18 个，一个 2 元", 18),
    ("zh", "答案為 12 本。\n\n問題：小明有 4 本書。\n答案為 4。", 12),
    ("ja", "答えは12個です。3個残ります。", 12),
    ("ja", "正解は 1億2000万円です", 120000000),
    ("th", "คำตอบคือ ๔๒ บาท เพราะ 2 เหลือ", 42),
    ("te", "సమాధానం 9. 3 మిగిలాయి", 9),
    ("bn", "উত্তর হল ১৮টি, কারণ ৯টি বিক্রি হয়।", 18),
]


@pytest.mark.parametrize(("language", "text", "answer"), NUMBERS)
def test_declared_numbers(language, text, answer):
    for protocol in ("default", "strict"):
        for named in ("", language):
            assert extract(text, "number", protocol, language=named) == pytest.approx(answer)


def test_every_language_of_mgsm_is_known_and_tried():
    assert set(LANGUAGES) == {"bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"}
    assert {language for language, _, _ in NUMBERS} == set(LANGUAGES) - {"en"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("正确答案是B选项。", "B"),
        ("Die richtige Antwort ist (C), nicht A.", "C"),
        ("La respuesta correcta es la opción D.", "D"),
        ("答えはEです。", "E"),
        ("Ответ: Б или В? Ответ: B.", "B"),
    ],
)
def test_declared_letters(text, letter):
    assert extract(text, "letter", "strict") == letter


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("Die Antwort ist nein, denn es regnet.", "", "false"),
        ("答案是：不正确。", "", "false"),
        ("答案是对的", "", "true"),
        ("Ответ: да", "", "true"),
        ("Oui, car il pleut.", "fr", "true"),
        ("いいえ、違います。", "ja", "false"),
    ],
)
def test_truth_values(text, language, value):
    assert extract(text, "boolean", language=language) == value


def test_no_word_means_both():
    for language in LANGUAGES.values():
        assert {TRUTH[word] for word in language.true} <= {"true"}
        assert {TRUTH[word] for word in language.false} <= {"false"}
    assert truth("noch nicht", LANGUAGES["es"]) is None


def test_decimal_commas_without_a_declaration_need_the_language():
    assert extract("Das macht 7,25", "number", language="de") == 7.25
    assert extract("That makes 7,250", "number", language="de") == 7250
    assert with_decimal_points("1.234.567,8 und 0,125 und 3,14159") == "1234567.8 und 0,125 und 3.14159"


@pytest.mark.parametrize(
    ("text", "value"),
    [("十", 10), ("一百零五只", 105), ("两千零二十", 2020), ("三万五千", 35000), ("五个", 5), ("ab", None)],
)
def test_numerals(text, value):
    assert numeral(text) == value


def test_scales_after_digits():
    assert without_scales("7万5千, 3百, 2.5億, 12年, 5 个") == "75000, 300, 250000000, 12年, 5 个"
