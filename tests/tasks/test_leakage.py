import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapters.errors import RequestError
from llm_adapters.tasks.leakage import (
    NEAR,
    Fingerprint,
    Overlap,
    duplicates,
    fingerprint,
    normalise,
    overlap,
    overlaps,
    seen,
)

TRAIN = [
    "Kevin bought two watermelons. One was 9.91 pounds, and the other watermelon was 4.11 pounds. How many pounds?",
    "There are 20,817 houses in Lincoln County. Builders add 97,741. How many houses are there now?",
    "A pet store has 6 bird cages. If each cage has 2 parrots and 7 parakeets in it, how many birds are there?",
    "Mia found 3 shells.",
]
TEST = [
    "mia found 3 SHELLS !",
    " Kevin bought 2 watermelons . One was 9.91 pounds , and the other watermelon was 4.11 pounds . How many pounds ?",
    "There are 20817 houses in Lincoln County . Builders add 97741 . How many houses are there now ?",
    "A pet store has 9 bird cages. If each cage has 4 parrots and 5 parakeets in it, how many birds are there?",
    "Max has 4 apples and eats 1. How many are left?",
]
# Measured once on the public files by lower-casing and dropping all but letters and digits, apart from this code.
EXACT = {
    "math_data": {"AQuA": 203, "gsm8k": 1055, "MultiArith": 491, "AddSub": 334, "SVAMP": 800, "SingleEq": 428},
    "mawps": {"AQuA": 0, "gsm8k": 0, "MultiArith": 490, "AddSub": 327, "SVAMP": 0, "SingleEq": 436, "mawps": 28},
    "gsm8k": {"AQuA": 0, "gsm8k": 0, "MultiArith": 0, "AddSub": 0, "SVAMP": 0, "SingleEq": 0, "mawps": 0},
}


@pytest.fixture(scope="session")
def questions(shared_data):
    def read(path, column):
        text = (shared_data / path).read_text(encoding="utf-8")
        items = map(json.loads, text.splitlines()) if path.endswith("jsonl") else json.loads(text)
        return [item[column] for item in items]

    train = {
        "math_data": read("LLM-Adapters/ft-training_set/math_data.json", "instruction"),
        "mawps": read("LLM-Adapters/dataset/mawps/trainset.json", "original_text"),
        "gsm8k": read("grade-school-math/train.jsonl", "question"),
    }
    return train, {name: read(f"LLM-Adapters/dataset/{name}/test.json", "instruction") for name in EXACT["gsm8k"]}


def word_pairs(question):
    """An own account of what is compared: pairs of neighbouring words, 20,817 being one word."""
    plain = ""
    for at, char in enumerate(question.lower()):
        grouped = (
            question[:at][-1:].isdecimal() and len(question[at + 1 :]) > 2 and question[at + 1 : at + 4].isdecimal()
        )
        plain += char if char.isalnum() else "" if char == "," and grouped else " "
    words = plain.split()
    return set(itertools.pairwise(words)) if len(words) > 1 else set(words)


def best_similarity(train, question):
    own = word_pairs(question)
    return max((len(own & pairs) / len(own | pairs) for pairs in map(word_pairs, train) if own | pairs), default=0.0)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("How many? 1,200.5!", "howmany12005"),
        ("  A_b\n-C ", "abc"),
        ("Grüße, 世界?", "grüße世界"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise_leaves_letters_and_digits(text, plain):
    assert normalise(text) == plain


def test_a_question_is_exact_near_or_neither():
    found = overlap(TRAIN, TEST)
    assert (found.total, found.exact, found.near) == (5, 2, 1)  # 20,817 and 20817 are equal without punctuation
    assert [(match.kind, match.test, match.train) for match in found.examples] == [
        ("exact", TEST[0], TRAIN[3]),
        ("exact", TEST[2], TRAIN[1]),
        ("near", TEST[1], TRAIN[0]),
    ]
    assert found.examples[2].similarity == pytest.approx(best_similarity(TRAIN, TEST[1]))
    assert best_similarity(TRAIN, TEST[3]) < NEAR  # the same template with other numbers
    assert json.loads(json.dumps(found.to_dict()))["examples"][2]["kind"] == "near"


def test_exact_is_counted_per_test_question_and_never_near():
    found = overlap(TRAIN + TRAIN, [TEST[0], TEST[0], TRAIN[0]])
    assert (found.total, found.exact, found.near) == (3, 3, 0)


def test_examples_are_limited_and_the_most_similar_come_first():
    words = [f"word{n}" for n in range(40)]
    test = [" ".join([*words[:-missing], "x"]) for missing in (3, 1, 2)]
    found = overlap([" ".join(words)], test, examples=2)
    assert (found.near, len(found.examples)) == (3, 2)
    assert [match.test for match in found.examples] == [test[1], test[2]]


def test_many_test_sets_at_once_give_what_each_gives_alone():
    tests = {"all": TEST, "first": TEST[:2], "none": [], "strange": ["?", ""]}
    assert overlaps(TRAIN, tests) == {name: overlap(TRAIN, test) for name, test in tests.items()}
    assert overlaps(TRAIN, tests)["strange"] == Overlap(total=2)
    assert overlaps([], tests)["all"] == Overlap(total=5)


def test_without_a_threshold_only_exact_matches_are_sought():
    assert (overlap(TRAIN, TEST, None).exact, overlap(TRAIN, TEST, None).near) == (2, 0)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_similarity_is_refused(threshold):
    with pytest.raises(RequestError, match="above 0 and at most 1"):
        overlap(TRAIN, TEST, threshold)


WORDS = st.lists(
    st.sampled_from(["how", "many", "apples", "has", "tom", "3", "5", "20,817", "."]), min_size=1, max_size=12
).map(" ".join)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(WORDS, min_size=1, max_size=8), st.lists(WORDS, min_size=1, max_size=8), st.sampled_from([0.5, 0.8, 1.0])
)
def test_what_counts_as_near_is_near(train, test, threshold):
    held = {normalise(question) for question in train}
    near = [q for q in test if normalise(q) not in held and normalise(q) and best_similarity(train, q) >= threshold]
    found = overlap(train, test, threshold, examples=100)
    assert found.exact == sum(bool(normalise(q)) and normalise(q) in held for q in test)
    # A pair exactly at the threshold may be missed once in a thousand; none may be counted that is not near.
    matches = [match for match in found.examples if match.kind == "near"]
    assert len(matches) == found.near <= len(near)
    assert {match.test for match in matches} <= set(near)
    for match in matches:
        assert match.similarity == pytest.approx(best_similarity([match.train], match.test))


# --- fingerprints


def test_a_fingerprint_tells_what_was_seen_without_the_data():
    made = fingerprint([*TRAIN, *TRAIN, "??"])
    assert (made.total, len(made.hashes)) == (9, 4)
    document = json.loads(json.dumps(made.to_dict()))
    assert not any(word in json.dumps(document).lower() for word in ("kevin", "lincoln", "shells"))
    assert Fingerprint.from_dict(document) == made
    assert seen(Fingerprint.from_dict(document), [*TEST, "", "??"]) == [True, False, True, False, False, False, False]


def test_a_fingerprint_does_not_depend_on_the_order():
    assert fingerprint(TRAIN).to_dict() == fingerprint(reversed(TRAIN)).to_dict()


def test_a_damaged_or_foreign_fingerprint_is_refused():
    document = fingerprint(TRAIN).to_dict()
    for change in ({"hashes": document["hashes"][:-1]}, {"hashes": document["hashes"][:12] * 4}, {"distinct": 5}):
        with pytest.raises(RequestError, match="damaged"):
            Fingerprint.from_dict(document | change)
    with pytest.raises(RequestError, match="unknown fingerprint scheme 'md5'"):
        Fingerprint.from_dict(document | {"scheme": "md5"})


@given(st.lists(st.text()), st.lists(st.text()))
def test_seen_is_being_in_the_training_data(train, test):
    held = {normalise(question) for question in train} - {""}
    assert seen(fingerprint(train), test) == [normalise(question) in held for question in test]
    assert overlap(train, test, None).exact == sum(seen(fingerprint(train), test))


def test_duplicates_are_grouped():
    assert duplicates(["a b", "c", "A, B!", "?", "!", "c.", "a-b", "d"]) == [[0, 2, 6], [1, 5]]


def test_training_questions_pass_by_once_and_one_at_a_time():
    alive = []

    class Question(str):
        def __del__(self):
            alive.remove(None)

    def stream():
        for n in range(50):
            alive.append(None)
            yield Question(f"Tom has {n} apples and buys {n} more")
            assert len(alive) < 4

    found = overlap(stream(), ["Tom has 7 apples and buys 7 more", "Anna sells her house"], near_threshold=None)
    assert (found.total, found.exact) == (2, 1)


# --- the public data


@pytest.mark.shared
@pytest.mark.parametrize("name", EXACT)
def test_what_leaks_into_the_test_sets(questions, name):
    train, tests = questions
    held = fingerprint(train[name])
    found = overlaps(train[name], tests, None)
    for task, exact in EXACT[name].items():
        assert (found[task].exact, found[task].total) == (exact, len(tests[task]))
        assert sum(seen(held, tests[task])) == exact


@pytest.mark.shared
def test_near_matches_are_those_of_an_exhaustive_search(questions):
    train, tests = questions
    pairs = [word_pairs(question) for question in train["mawps"]]
    held = {normalise(question) for question in train["mawps"]}
    for task in ("AddSub", "AQuA"):
        sample = tests[task][:60]
        near = 0
        for question in sample:
            own = word_pairs(question)
            near += normalise(question) not in held and any(
                len(own & other) >= NEAR * len(own | other) for other in pairs if len(own) >= NEAR * len(other)
            )
        assert overlap(train["mawps"], sample).near == near
        assert near > 0 or task == "AQuA"


@pytest.mark.shared
def test_duplicates_inside_and_across_test_sets(questions):
    _, tests = questions
    assert len(fingerprint(tests["MultiArith"]).hashes) == 580
    assert len(fingerprint(tests["SingleEq"]).hashes) == 507
    shared = {
        (a, b): len(fingerprint(tests[a]).hashes & fingerprint(tests[b]).hashes)
        for a, b in [("AddSub", "SingleEq"), ("mawps", "MultiArith"), ("mawps", "AddSub"), ("mawps", "SingleEq")]
    }
    assert list(shared.values()) == [126, 53, 58, 62]
