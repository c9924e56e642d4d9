import pytest

from llm_adapters.tasks.answers import is_correct
from llm_adapters.tasks.answers.labels import is_readable, number


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("15.0", 15), ("-1,234.5", -1234.5), ("3/4", 0.75), ("$5", 5), ("25%", 25), ("60 km/h", 60), ("12 cm^2", 12),
        ("5 apples.", 5), ("\\text{7 metres}", 7), ("\\frac{1}{2}", 0.5), ("2 1/2", 2.5), ("1e3", 1000), ("(8)", 8),
        ("90^\\circ", 90), ("2^{5}", 32), ("\u0664\u0662", 42), ("3万", 30000),
    ],
)  # fmt: skip
def test_a_number_with_its_unit_is_a_number(label, value):
    assert number(label) == pytest.approx(value)


@pytest.mark.parametrize(
    "label",
    [
        "\\sqrt[3]{7}", "4\\pi", "7!", "\\log 8", "5y", "5 n", "x = 9", "x < 9", "9:45", "1:3", "3 million", "2 dozen",
        "6 and a quarter", "10 or 12", "4-6", "(1, 2)", "[0, 3)", "nan", "inf", "", "none", "1,5", "2 squared", "n-1",
    ],
)  # fmt: skip
def test_what_is_more_than_a_number_is_none(label):
    assert number(label) is None
    for part in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 0.0):
        for protocol in ("default", "paper"):
            assert not is_correct(part, label, "number", protocol)


def test_decimal_commas_where_the_language_has_them():
    assert [number(label, "de") for label in ("1,5", "1.234,25", "1.000", "1,000")] == [1.5, 1234.25, 1000, 1000]
    assert is_correct(2.5, "2,5", "number", language="ru")
    assert not is_correct(25.0, "2,5", "number")


@pytest.mark.parametrize(
    ("prediction", "label", "protocol", "correct"),
    [
        (0.0, "0.0004", "default", False),
        (0.0, "0.0004", "paper", True),
        (0.000402, "0.0004", "strict", True),
        (123456.79, "123456.7857", "default", True),
        (123456.79, "123456.7857", "paper", False),
        (123456790.0, "123456789", "default", False),  # whole numbers are not rounded
        (0.333, "0.3333333", "default", True),
        (7.0009, "7", "default", True),
    ],
)
def test_the_tolerance_knows_the_size_of_a_label_with_decimals(prediction, label, protocol, correct):
    assert is_correct(prediction, label, "number", protocol) is correct


@pytest.mark.parametrize("label", ["1", "1.0", "True", " yes.", "да", "Verdadero", "正确", "ใช่", "T"])
def test_truth_values_in_digits_and_languages(label):
    assert is_readable(label, "boolean")
    assert is_correct("true", label, "boolean")
    assert not is_correct("false", label, "boolean")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("number", "7", "seven"),
        ("letter", "(b)", "I"),
        ("letter", "A", "AB"),
        ("option", "Answer 2", "answer"),
        ("boolean", "no", "maybe"),
        ("text", "x", " "),
    ],
)
def test_labels_that_an_answer_of_the_kind_can_equal(kind, good, bad):
    assert is_readable(good, kind)
    assert not is_readable(bad, kind)
