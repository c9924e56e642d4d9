import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapters.tasks.answers.numbers import find, in_words, normalise


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3 cats, 4 dogs", [3, 4]),
        ("1,234,567 and 1, 2, 3 and 1,00,000", [1234567, 1, 2, 3, 100000]),
        ("12,50 is no thousand", [12, 50]),
        (".5 5. 0.5, -.5", [0.5, 5, 0.5, -0.5]),
        ("-5, 7 -5, 7-5, 7 - 5, (-5), = -5", [-5, 7, 5, 7, 5, 7, 5, -5, -5]),
        ("−5 °C, –5, minus 5, 10 minus 5", [-5, -5, -5, 10, 5]),
        ("3/4, 1 1/2, 1 and 1/2, 1½, ¾, 5/0", [0.75, 1.5, 1.5, 1.5, 0.75]),
        (r"\frac{3}{4}, 2\frac{1}{2}, -\frac12, \dfrac{9}{2}", [0.75, 2.5, -0.5, 4.5]),
        ("1e3 1.5E-2 2x10^3 2 × 10⁻² 10^6 2^10", [1000, 0.015, 2000, 0.02, 1e6, 1024]),
        ("12/25/2020 and 2020-05-01", []),
        ("2:30 pm, 12:45:10", [2, 12]),
        ("H2O, x1, CO2 and 5kg of A4, 3m^2, 4 m²", [5, 3, 4]),
        ("$5, -$5, $-5, €5, 5$, US$5, Rs.500, $ 5", [5, -5, -5, 5, 5, 5, 500, 5]),
        (r"\$5, $5$, 1{,}000, 10\,000, 10,\!000, 45^\circ, 5\%", [5, 5, 1000, 10000, 10000, 45, 5]),
        ("$118 000 or 118 000, not 118 250", [118000, 118000, 118, 250]),
        ("6*7=<<6*7=42>>42", [6, 7, 42]),
        ("**5** __5__ `5` _5_ *5*", [5, 5, 5, 5, 5]),
        ("６４２ and ٤٢", [642, 42]),
        ("25%, 5 million, 5th", [25, 5, 5]),
        ("9" * 400 + " and 1e999", []),
        ("no numbers", []),
    ],
)
def test_numbers_are_found_and_read(text, values):
    assert [number.value for number in find(normalise(text))] == pytest.approx(values)


def test_a_number_has_its_position():
    text = "x = -1,234.5 apples"
    (number,) = find(text)
    assert text[number.start : number.end] == "-1,234.5"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("five apples", 5),
        ("Zero", 0),
        ("twenty-five", 25),
        ("seventeen", 17),
        ("two hundred and six dollars", 206),
        ("a hundred", 100),
        ("three thousand four hundred twenty one", 3421),
        ("one million two hundred thousand", 1200000),
        ("minus two", -2),
        ("one of them", None),
        ("one that counts", None),
        ("one-half", None),
        ("tenacious", None),
        ("the five", None),
        ("", None),
    ],
)
def test_numbers_in_words(text, value):
    assert in_words(text) == value


def test_plain_text_stays_as_it_is():
    text = "Mia has 3 apples (not 4).\nShe eats 1: 3 - 1 = 2; is that right?"
    assert normalise(text) == text


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read(text):
    for number in find(normalise(text)):
        assert number.start < number.end
