import json
import math
import re
from collections import Counter

import pytest
from answer_cases import BOOLEANS, LETTERS, NUMBERS, OPTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapters.errors import RequestError
from llm_adapters.tasks.answers import KINDS, PROTOCOLS, extract, is_correct

CASES = [
    (kind, text, answer)
    for kind, cases in {"number": NUMBERS, "letter": LETTERS, "option": OPTIONS, "boolean": BOOLEANS}.items()
    for text, answer in cases
]
MATH_SETS = {"AddSub": 395, "AQuA": 254, "gsm8k": 1319, "MultiArith": 600, "SingleEq": 508, "SVAMP": 1000}
CHOICE_SETS = {
    "boolq": (3270, "boolean"),
    "piqa": (1838, "option"),
    "social_i_qa": (1954, "option"),
    "winogrande": (1267, "option"),
    "ARC-Easy": (2376, "option"),
    "ARC-Challenge": (1172, "option"),
    "openbookqa": (500, "option"),
}


def load(shared_data, name):
    return json.loads((shared_data / f"LLM-Adapters/dataset/{name}/test.json").read_text(encoding="utf-8"))


def solutions(shared_data, split):
    lines = (shared_data / f"grade-school-math/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- default and strict on the table


@pytest.mark.parametrize(("kind", "text", "answer"), CASES)
def test_default_reads_what_a_careful_reader_reads(kind, text, answer):
    assert extract(text, kind) == (pytest.approx(answer, abs=1e-12) if isinstance(answer, float) else answer)


@pytest.mark.parametrize("kind", ["number", "letter", "option", "boolean"])
def test_the_strict_answer_is_the_default_one_or_none(kind):
    for text in [text for of_kind, text, _ in CASES if of_kind == kind]:
        assert extract(text, kind, "strict") in (None, extract(text, kind)), text


@pytest.mark.parametrize("kind", ["number", "letter", "option", "boolean"])
@pytest.mark.parametrize("marker", ["\n\n### Instruction:\n", "\n\nQuestion: ", "<|im_end|>\n"])
def test_what_follows_the_response_changes_nothing(kind, marker):
    for text in [text for of_kind, text, answer in CASES if of_kind == kind and answer is not None]:
        assert extract(f"{text}{marker}The answer is 97.5. (H) ending9 false", kind) == extract(text, kind), text


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("number", "The answer is 5.", 5),
        ("number", "She has 9.\n#### 5", 5),
        ("number", r"So \boxed{5}, after 7 days", 5),
        ("number", "5 is the answer.", 5),
        ("number", "She has 5 apples.", None),
        ("number", "5 + 3 = 8", None),
        ("number", "5", None),
        ("number", "The answer is not 5.", None),
        ("number", "Is the answer 5?", None),
        ("number", "The answer is unknown, but 5 are left", 5),
        ("letter", "The answer is (B).", "B"),
        ("letter", "(B)", None),
        ("letter", "So B.", None),
        ("option", "the correct answer is answer2", "answer2"),
        ("option", "answer2", None),
        ("boolean", "the correct answer is true", "true"),
        ("boolean", "That is true.", None),
    ],
)
def test_strict_wants_a_declaration(kind, text, answer):
    assert extract(text, kind, "strict") == answer


def test_text_is_the_stripped_response():
    assert extract("  a long\nstory \n\n### Instruction: go on", "text") == "a long\nstory"
    assert extract(" \n", "text") is None


def test_unknown_kind_and_protocol_are_named():
    with pytest.raises(RequestError, match=r"unknown answer kind 'numbr'.*Did you mean 'number'"):
        extract("5", "numbr")
    with pytest.raises(RequestError, match="unknown protocol 'lenient': choose one of default, paper, strict"):
        extract("5", "number", "lenient")
    with pytest.raises(RequestError, match="unknown answer kind 'float'"):
        is_correct(5.0, "5", "float")


# --- is_correct


@pytest.mark.parametrize(
    ("prediction", "label", "kind", "correct"),
    [
        (15.0, "15.0", "number", True),
        (15.0, "15", "number", True),
        (1000.0, "1,000", "number", True),
        (0.75, "3/4", "number", True),
        (5.0, "$5", "number", True),
        (25.0, "25%", "number", True),
        (-3.0, "-3.0", "number", True),
        (4.333333333333333, "4.333333333333333", "number", True),
        (5.0009, "5", "number", True),
        (5.0011, "5", "number", False),
        (1000000.9, "1000000", "number", False),  # the tolerance is absolute
        (5.0, "-5", "number", False),
        (0.25, "25%", "number", False),
        (None, "5", "number", False),
        (math.nan, "nan", "number", False),
        (math.inf, "inf", "number", False),
        (math.inf, "5", "number", False),
        (5.0, "five apples", "number", False),
        (5.0, "", "number", False),
        ("B", "B", "letter", True),
        ("B", "(b)", "letter", True),
        ("B", "C", "letter", False),
        (None, "B", "letter", False),
        ("solution1", "solution1", "option", True),
        ("answer2", "Answer 2", "option", True),
        ("answer2", "option2", "option", False),
        ("true", "true", "boolean", True),
        ("true", "yes", "boolean", True),
        ("false", "No", "boolean", True),
        ("true", "false", "boolean", False),
        (None, "", "letter", False),
        ("", "", "letter", False),
        ("a  story", "A story ", "text", True),
        ("a story", "another", "text", False),
    ],
)
def test_is_correct(prediction, label, kind, correct):
    assert is_correct(prediction, label, kind) is correct


# --- properties

FORMATS = [
    "The answer is {}.",
    "So the final answer is: {}",
    "Therefore, the correct answer is **{}**.",
    "Answer: {}",
    "#### {}",
    "It is $\\boxed{{{}}}$.",
    "<answer>{}</answer>",
    "The answer is x = {}.",
    "The answer is 3 + 4 = {}.",
    "The answer is 99. Wait, no. The answer is {}.",
    "The answer is not 99 but {}.",
    "Therefore, {} is the answer.",
    "The answer is {}, because 3 + 4 = 7.",
    "The answer is {} (that is, 3 + 4 = 7).",
]
WRITINGS = {
    "plain": lambda v: f"{v}",
    "thousands": lambda v: f"{v:,}",
    "minus": lambda v: f"{v}".replace("-", "\N{MINUS SIGN}"),
    "dollars": lambda v: f"{v:,}".replace("-", "-$") if v < 0 else f"${v:,}",
    "percent": lambda v: f"{v}%",
    "unit": lambda v: f"{v:,} apples",
    "bold": lambda v: f"**{v}**",
    "maths": lambda v: f"${v}$",
    "latex": lambda v: f"{v:,}".replace(",", "{,}") + r"\text{ cm}",
    "full width": lambda v: f"{v}".translate(str.maketrans("0123456789", "０１２３４５６７８９")),
}
NUMBER = st.integers(-(10**9), 10**9) | st.decimals(-(10**6), 10**6, places=2).map(float)


@settings(deadline=None)
@given(NUMBER, st.sampled_from(sorted(WRITINGS)), st.sampled_from(FORMATS), st.booleans())
def test_whatever_number_is_declared_comes_back(value, writing, form, reasoned):
    text = "\nA: She had 12 apples and ate 5 of them. 12 - 5 = 7. " * reasoned + form.format(WRITINGS[writing](value))
    for protocol in ("default", "strict"):
        assert extract(text, "number", protocol) == value


@settings(deadline=None)
@given(st.integers(-99, 99), st.integers(1, 99), st.sampled_from(FORMATS), st.booleans())
def test_whatever_fraction_is_declared_comes_back(top, bottom, form, latex):
    sign = "-" if top < 0 else ""
    written = rf"{sign}\frac{{{abs(top)}}}{{{bottom}}}" if latex else f"{top}/{bottom}"
    assert extract(form.format(written), "number") == pytest.approx(top / bottom)


CHOICE_FORMATS = [*FORMATS[:5], FORMATS[6], "The correct option is {}.", "{} is the correct answer.", "Answer:\n{}"]


@settings(deadline=None)
@given(
    st.sampled_from("ABCDE"), st.sampled_from(["{}", "({})", "option {}", "**{}**"]), st.sampled_from(CHOICE_FORMATS)
)
def test_whatever_letter_is_declared_comes_back(letter, writing, form):
    text = "Each of A and B is less than C. " + form.format(writing.format(letter))
    assert extract(text, "letter") == extract(text, "letter", "strict") == letter


@settings(deadline=None)
@given(
    st.sampled_from(["answer", "solution", "ending", "option"]),
    st.integers(1, 5),
    st.sampled_from(["{}{}", "{} {}", "**{}{}**"]),
    st.booleans(),
    st.sampled_from(CHOICE_FORMATS),
)
def test_whatever_option_is_declared_comes_back(noun, digit, writing, capital, form):
    text = form.format(writing.format(noun.capitalize() if capital else noun, digit))
    assert extract(text, "option") == extract(text, "option", "strict") == f"{noun}{digit}"


FRAGMENTS = st.sampled_from(
    [
        *"05,.-+=*/%$()[]{}<>#_`\\½²−５",
        *[
            "12",
            "1,234",
            "3/4",
            "####",
            "**",
            "\\boxed{",
            "\\frac{",
            "\\text{",
            "A",
            "B",
            "(C)",
            "D)",
            "answer1",
            "answer2:",
        ],
        *[
            "solution2",
            "true",
            "false",
            "yes",
            "no",
            "not",
            "n't",
            "or",
            "and",
            "The answer",
            "is",
            "Answer:",
            "is the",
        ],
        *["option", "if", "x", "^", "e5", ":30", "Question:", "### ", "Response", "\n", "\N{THIN SPACE}"],
    ]
)


@settings(deadline=None, max_examples=200)
@given(st.text() | st.lists(FRAGMENTS, max_size=40).map(" ".join) | st.lists(FRAGMENTS, max_size=40).map("".join))
def test_any_text_is_fine(text):
    for kind in KINDS:
        default, strict, paper = (extract(text, kind, protocol) for protocol in PROTOCOLS)
        assert strict in (None, default)
        if kind == "number":
            assert all(answer is None or math.isfinite(answer) for answer in (default, strict, paper))
        elif kind == "letter":
            assert default is None or re.fullmatch("[A-H]", default)
        elif kind == "option":
            assert default is None or re.fullmatch("(answer|solution|ending|option)[1-9]", default)
        elif kind == "boolean":
            assert default in (None, "true", "false")


PIECES = [
    "9",
    " ",
    "\n",
    ",",
    "1,",
    "1,234,",
    "-",
    "/",
    "1/",
    "1 ",
    "100 ",
    "(",
    "(=",
    "{",
    "\\boxed{",
    "<<1=",
    "$",
    "*",
]
PIECES += ["#", "_", ".", "answer is ", "answer to ", "Answer: ", "(A) ", "A, ", "answer1, ", "is the answer ", "½"]


# A pattern that backtracks over these would not end within hours.
@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_of_one_piece_are_read(piece):
    for kind, declared in [("number", "5"), ("letter", "B"), ("option", "answer2"), ("boolean", "true")]:
        size = 100_000 if piece in "9 ," and kind == "number" else 10_000
        text = piece * (size // len(piece)) + f"\nSo the answer is {declared}."
        assert str(extract(text, kind)) in (declared, f"{declared}.0")


# --- the paper's protocol


def paper_rules(text, kind):
    """An independent account of the paper's rules (facts from its code at commit 8166572)."""
    if kind == "number":
        numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
        value = float(numbers[-1]) if numbers else float("inf")
        return None if value == float("inf") else value
    names = {
        "letter": ["A", "B", "C", "D", "E"],
        "boolean": ["true", "false"],
        "option": [f"solution{n}" for n in "12"]
        + [f"answer{n}" for n in "12345"]
        + [f"ending{n}" for n in "1234"]
        + [f"option{n}" for n in "12"],
    }[kind]
    found = [(text.find(name), name) for name in names if name in text]
    return min(found)[1] if found else None


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("number", "The answer is 3/4.", 4.0),
        ("number", "The answer is 1,234.50.", 1234.5),
        ("number", "The answer is 5. I counted 3 twice", 3.0),
        ("number", "The answer is $118 000.", 0.0),
        ("number", "The answer is -$7.", 7.0),
        ("number", "7 -5", -5.0),
        ("number", "1, 2, 3", 3.0),
        ("number", "1,2,3", 123.0),
        ("number", "5\n\n### Instruction:\n6", 6.0),
        ("number", "none", None),
        ("letter", "Answer: B", "A"),
        ("letter", "Each of them", "E"),
        ("letter", "the answer is (D)", "D"),
        ("letter", "the answer is (d)", None),
        ("option", "answer1/answer2", "answer1"),
        ("option", "not answer3 but answer2", "answer3"),
        ("option", "Answer2", None),
        ("boolean", "true/false", "true"),
        ("boolean", "True", None),
    ],
)
def test_paper_protocol_has_the_papers_faults(kind, text, answer):
    assert extract(text, kind, "paper") == answer
    assert paper_rules(text, kind) == answer


@settings(deadline=None)
@given(st.sampled_from(CASES), st.text())
def test_paper_protocol_is_the_papers_rules(case, text):
    for kind in ("number", "letter", "option", "boolean"):
        assert extract(case[1], kind, "paper") == paper_rules(case[1], kind)
        assert extract(text, kind, "paper") == paper_rules(text, kind)


# --- the real data

# Declared answers that are more than one plain number, read by eye: (set, position) -> value.
READ_BY_EYE = {
    ("gsm8k", 146): 40,  # 4 + 16 + 20 = 40
    ("gsm8k", 193): 29 / 3,
    ("gsm8k", 622): 8,  # 5 arms and 3 legs, or 8 limbs in total
    ("gsm8k", 623): 15,  # 6 pieces, or 6 * 2.5 = 15 ounces
    ("gsm8k", 637): 118000,  # $118 000
    ("gsm8k", 830): 9500,  # $9 500
    ("gsm8k", 1014): 370,  # 220 + 90 + 60 = 370
    ("gsm8k", 1049): 11,  # 40 - 29 = 11 holes
    ("gsm8k", 1168): 77,  # €77
    ("gsm8k", 1235): -110,  # -$110
    ("gsm8k", 1243): -7,  # -$7
    ("MultiArith", 195): 15,  # 49 - 34 = 15
    ("SVAMP", 126): 152,  # 58 + 94 = 152
    ("SVAMP", 166): -293,  # -$293
    ("SingleEq", 502): 0.6666666666666666,  # 0.6666666666666666 / 1 = 0.6666666666666666
}
# Nothing declared: the last number of the text, or None where there is none.
UNDECLARED = {("gsm8k", at): value for at, value in {
    7: 4, 17: 4 / 3, 83: None, 98: 50, 251: 16, 259: None, 658: 151, 687: 1 / 3, 870: None, 895: 10, 898: 6, 906: 500,
    934: 2, 992: 80000, 1005: 49, 1150: None, 1175: 30769.23, 1223: None, 1280: None, 1306: 1,
}.items()} | {("AQuA", 59): None, ("AQuA", 118): None}  # fmt: skip


@pytest.mark.shared
def test_the_declared_answer_is_found_in_every_output_of_the_math_sets(shared_data):
    read = 0
    for name, size in MATH_SETS.items():
        kind = "letter" if name == "AQuA" else "number"
        items = load(shared_data, name)
        assert len(items) == size
        for at, item in enumerate(items):
            text, key = item["output"], (name, at)
            if key in UNDECLARED:
                assert extract(text, kind, "strict") is None, key
                assert extract(text, kind) == pytest.approx(UNDECLARED[key]), key
                continue
            declared = re.split("answer is", text)[-1]
            plain = re.match(r" \(([A-E])\)" if kind == "letter" else r"[^\d-]*(-?[\d,]+(\.\d+)?)", declared)
            answer = READ_BY_EYE.get(key) or (plain[1] if kind == "letter" else float(plain[1].replace(",", "")))
            assert extract(text, kind, "strict") == pytest.approx(answer), key
            read += 1
    assert read == 4076 - 22


@pytest.mark.shared
def test_paper_protocol_on_the_math_sets(shared_data):
    right = Counter()
    for name in MATH_SETS:
        kind = "letter" if name == "AQuA" else "number"
        for item in load(shared_data, name):
            answer = extract(item["output"], kind, "paper")
            assert answer == paper_rules(item["output"], kind)
            right[name] += is_correct(answer, item["answer"], kind)
    assert round(100 * right["gsm8k"] / 1319) == 58  # the share that the facts about these files give


@pytest.mark.shared
def test_where_default_and_paper_disagree_on_the_math_sets(shared_data):
    causes = Counter()
    for name in MATH_SETS:
        kind = "letter" if name == "AQuA" else "number"
        for item in load(shared_data, name):
            text = item["output"]
            if extract(text, kind) == extract(text, kind, "paper"):
                continue
            declared = text.split("answer is")[-1]
            if kind == "letter":
                causes["first capital of the reasoning" if "answer is" in text else "capital, nothing declared"] += 1
            elif re.search(r"\d/\d", declared[-120:]):
                causes["fraction"] += 1
            elif re.search(r"\d [05]00\.$|\d 000\.$", declared):
                causes["thousands with a space"] += 1
            elif "-$" in declared:
                causes["minus before the currency"] += 1
            elif ":00" in declared:
                causes["time of day"] += 1
            elif re.search(r"\d.* (?:and|or) .*\d", declared):
                causes["two quantities"] += 1
            else:
                causes[text] += 1
    assert causes == {
        "first capital of the reasoning": 48,
        "capital, nothing declared": 1,
        "fraction": 3,
        "thousands with a space": 2,
        "minus before the currency": 3,
        "time of day": 1,
        "two quantities": 19,
    }


@pytest.mark.shared
@pytest.mark.parametrize("split", ["test", "train"])
def test_every_gsm8k_solution_declares_its_answer(shared_data, split):
    items = solutions(shared_data, split)
    assert len(items) == {"test": 1319, "train": 7473}[split]
    for item in items:
        gold = item["answer"].split("#### ")[1]
        assert extract(item["answer"], "number", "strict") == float(gold.replace(",", ""))
        assert is_correct(float(gold.replace(",", "")), gold, "number")


def test_a_gsm8k_solution_declares_its_answer():
    text = "He pays 2*$1,000=$<<2*1000=2000>>2,000.\nSo he pays 2,000+500=<<2000+500=2500>>2,500 in all.\n#### 2,500"
    assert extract(text, "number") == extract(text, "number", "strict") == 2500


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(CHOICE_SETS))
def test_every_commonsense_output_is_right(shared_data, name):
    size, kind = CHOICE_SETS[name]
    items = load(shared_data, name)
    assert len(items) == size
    for item in items:
        for protocol in ("strict", "paper"):
            assert is_correct(extract(item["output"], kind, protocol), item["answer"], kind)


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(CHOICE_SETS))
def test_a_repeated_commonsense_question_is_no_answer(shared_data, name):
    _, kind = CHOICE_SETS[name]
    items = load(shared_data, name)
    answered = sum(extract(item["instruction"], kind) is not None for item in items)
    assert answered <= len(items) / 1000


# --- beside lm-evaluation-harness

# Its GSM8K task, version 3.0 (lm_eval/tasks/gsm8k/gsm8k.yaml): the two filters and what its exact match ignores.
HARNESS_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
HARNESS_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
HARNESS_IGNORES = [",", r"\$", r"(?s).*#### ", r"\.$"]


def harness_verdicts(text, gold):
    def plain(answer):
        for pattern in HARNESS_IGNORES:
            answer = re.sub(pattern, "", answer)
        return answer.lower()

    strict, flexible = HARNESS_STRICT.search(text), list(HARNESS_FLEXIBLE.finditer(text))
    answers = strict[1] if strict else "[invalid]", flexible[-1][0] if flexible else "[invalid]"
    return tuple(plain(answer.strip()) == plain(gold) for answer in answers)


@pytest.mark.parametrize(
    ("text", "gold", "harness", "ours"),
    [
        ("It is 9 * 2 = 18.\n#### 18", "18", (True, True), (True, True)),
        ("It is 9 * 2 = 17.\n#### 17", "18", (False, False), (False, False)),
        ("The answer is 18.", "18", (False, True), (True, True)),  # its strict filter knows no other declaration
        ("The answer is $18.00.", "18", (False, False), (True, True)),  # it compares texts: 18.00 is not 18
        ("The answer is $118 000.", "118000", (False, False), (True, True)),
        ("#### $18", "18", (False, True), (True, True)),
        ("The answer is 18. I used 2 steps", "18", (False, False), (True, True)),
        ("So she has 18.", "18", (False, True), (False, True)),
        ("#### 18\n#### 19", "18", (True, False), (True, True)),
    ],
)
def test_verdicts_beside_the_harness(text, gold, harness, ours):
    assert harness_verdicts(text, f"...\n#### {gold}") == harness
    assert tuple(is_correct(extract(text, "number", p), gold, "number") for p in ("strict", "default")) == ours


@pytest.mark.shared
def test_agreement_with_the_harness_on_gsm8k(shared_data):
    def key(question):
        return re.sub("[^a-z0-9]", "", question.lower())

    outputs = {key(item["instruction"]): item["output"] for item in load(shared_data, "gsm8k")}
    right, differences = Counter(), Counter()
    for item in solutions(shared_data, "test"):
        gold, text = item["answer"].split("#### ")[1], outputs[key(item["question"])]
        strict, flexible = harness_verdicts(text, item["answer"])
        ours = is_correct(extract(text, "number"), gold, "number")
        right.update(strict=strict, flexible=flexible, ours=ours)
        if flexible != ours:
            cents, spaced = re.search(r"\$\d+\.00\.$", text), re.search(r"\d 000\.$|\d 500\.$", text)
            differences["cents" if cents else "thousands with a space" if spaced else text, ours] += 1
        assert harness_verdicts(item["answer"], item["answer"]) == (True, True)
        assert is_correct(extract(item["answer"], "number"), gold, "number")
    assert right == {"strict": 0, "flexible": 759, "ours": 773}
    assert differences == {("cents", True): 12, ("thousands with a space", True): 2}
