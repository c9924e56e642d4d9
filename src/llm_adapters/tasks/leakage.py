"""Test questions that a training set holds: word for word (after normalisation), or nearly.

Exact matches can be told from a `Fingerprint` alone, which training writes beside its result. Near ones are those whose
word pairs have a high Jaccard similarity; prefix filtering (Bayardo, Ma and Srikant 2007) finds all of them. The
training questions pass by one at a time: only the test sets are held.
"""

import collections
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llm_adapters.errors import RequestError, unknown

SHINGLE = 2  # words
NEAR = 0.8
"""Similarity at which two questions count as nearly the same: 80 % of the word pairs in either are in both.

Chosen on the best pairs, not exact, between three training sets (math_data, MAWPS, GSM8K) and seven test sets. Of the
124 pairs at or above 0.8, 100 are one question worded twice (the same numbers; "two" for "2", "0.5 of a mile" for "0.5
mile"), and in the others one or two numbers differ. Between 0.6 and 0.7 only 8 of 189 are the same question: the rest
are templates filled with other names and other numbers, which share a method but not an answer.
"""

_WIDTH = 12  # hex digits, 48 bits: with 170,000 training questions, one unseen test question in 10^9 is taken for seen
_SCHEME = "blake2b-48 of lower-case letters and digits"


def normalise(text: str) -> str:
    """Reduce a text to its letters and digits (of any script), in lower case.

    Args:
        text: a question.
    """
    return re.sub(r"[\W_]+", "", text.lower())


# --- fingerprints


@dataclass(frozen=True)
class Fingerprint:
    """Short hashes of the questions of a data set.

    Attributes:
        hashes: of the distinct normalised questions.
        total: how many questions there were.
    """

    hashes: frozenset[str]
    total: int

    def to_dict(self) -> dict[str, Any]:
        """JSON document; the hashes are sorted and joined into one string."""
        return {
            "scheme": _SCHEME,
            "total": self.total,
            "distinct": len(self.hashes),
            "hashes": "".join(sorted(self.hashes)),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Fingerprint":
        """Read what `to_dict` wrote.

        Args:
            document: a JSON document.

        Raises:
            RequestError: another scheme, or a damaged document.
        """
        if document.get("scheme") != _SCHEME:
            raise unknown("fingerprint scheme", document.get("scheme"), [_SCHEME], " Train again to write a new one.")
        joined = document["hashes"]
        hashes = frozenset(joined[at : at + _WIDTH] for at in range(0, len(joined), _WIDTH))
        if len(joined) != _WIDTH * document["distinct"] or len(hashes) != document["distinct"]:
            raise RequestError(
                f"the fingerprint of the training data is damaged: it announces {document['distinct']} questions and "
                f"holds {len(joined) / _WIDTH:g}. Restore the file, or train again."
            )
        return cls(hashes, int(document["total"]))


def fingerprint(questions: Iterable[str]) -> Fingerprint:
    """Fingerprint of a data set.

    Args:
        questions: its questions; those without letters or digits count but leave no hash.
    """
    texts = [normalise(question) for question in questions]
    return Fingerprint(frozenset(_hash(text) for text in texts if text), len(texts))


def seen(known: Fingerprint, questions: Iterable[str]) -> list[bool]:
    """Look questions up in a fingerprint.

    Args:
        known: the fingerprint of a training set.
        questions: the questions of a test set.

    Returns:
        For each question, True where the training set holds it.
    """
    return [bool(text) and _hash(text) in known.hashes for text in map(normalise, questions)]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_WIDTH // 2).hexdigest()


def duplicates(questions: Sequence[str]) -> list[list[int]]:
    """Find the questions that are the same after normalisation.

    Args:
        questions: the questions of one data set.

    Returns:
        The groups of two or more positions with one question, in the order of their first position.
    """
    groups: dict[str, list[int]] = {}
    for at, question in enumerate(questions):
        groups.setdefault(normalise(question), []).append(at)
    return [group for text, group in groups.items() if text and len(group) > 1]


# --- overlap


@dataclass(frozen=True)
class Match:
    """Test question and the training question that it repeats.

    Attributes:
        kind: ``"exact"`` or ``"near"``.
        similarity: the Jaccard similarity, 1 for an exact match.
        test: the test question.
        train: the training question.
    """

    kind: str
    similarity: float
    test: str
    train: str


@dataclass
class Overlap:
    """Number of a test set's questions that a training set holds.

    Attributes:
        total: the questions of the test set.
        exact: those that are in the training set, after normalisation.
        near: those that are nearly in it, but not exactly.
        examples: some of both.
    """

    total: int
    exact: int = 0
    near: int = 0
    examples: list[Match] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON document."""
        return asdict(self)


def overlap(
    train: Iterable[str], test: Sequence[str], near_threshold: float | None = NEAR, examples: int = 3
) -> Overlap:
    """Overlap of one test set with a training set.

    Args:
        train: the training questions.
        test: the questions of the test set.
        near_threshold: as for `overlaps`.
        examples: as for `overlaps`.

    Raises:
        RequestError: a threshold outside (0, 1].
    """
    return overlaps(train, {"": test}, near_threshold, examples)[""]


def overlaps(
    train: Iterable[str],
    tests: Mapping[str, Sequence[str]],
    near_threshold: float | None = NEAR,
    examples: int = 3,
) -> dict[str, Overlap]:
    """Overlap of several test sets with a training set.

    Exact is meant after `normalise`. Near is a Jaccard similarity of the sets of word pairs of two questions.

    Args:
        train: the training questions, iterated over once.
        tests: the questions of each test set.
        near_threshold: the least similarity of a near match; None leaves near matches out.
        examples: so many examples of each kind are kept per test set, of near ones the most similar.

    Raises:
        RequestError: a threshold outside (0, 1].
    """
    if near_threshold is not None and not 0 < near_threshold <= 1:
        raise RequestError(f"near threshold {near_threshold!r}: give a similarity above 0 and at most 1.")
    texts = {name: [normalise(question) for question in questions] for name, questions in tests.items()}
    known = {text for each in texts.values() for text in each if text}
    sought = list(dict.fromkeys(question for questions in tests.values() for question in questions))
    near = None if near_threshold is None else _Near(sought, near_threshold)
    exact: dict[str, str] = {}
    for question in train:
        text = normalise(question)
        if text in known:
            exact.setdefault(text, question)
        if near and text:
            near.add(question)
    best = dict(zip(sought, near.best, strict=True)) if near else {}
    return {name: _overlap(tests[name], texts[name], exact, best, examples) for name in tests}


def _overlap(
    questions: Sequence[str],
    texts: Sequence[str],
    exact: Mapping[str, str],
    best: Mapping[str, tuple[float, str] | None],
    examples: int,
) -> Overlap:
    """Overlap of one test set, from what the training questions with its texts and those nearest to them are."""
    found = Overlap(len(questions))
    near = []
    for question, text in zip(questions, texts, strict=True):
        if text in exact:
            found.exact += 1
            if found.exact <= examples:
                found.examples.append(Match("exact", 1.0, question, exact[text]))
        elif nearest := best.get(question):
            near.append(Match("near", nearest[0], question, nearest[1]))
    near.sort(key=lambda match: -match.similarity)
    found.near = len(near)
    found.examples += near[:examples]
    return found


class _Near:
    """The training question that is most like each test question.

    A question that is as similar as the threshold T asks shares at least T of the other's shingles. It therefore holds
    one of any |shingles| - ceil(T |shingles|) + 1 of them: the rarest, by which the test questions are found.

    Attributes:
        best: similarity and training question for each test question; None where none reaches the threshold.
    """

    def __init__(self, tests: Sequence[str], threshold: float) -> None:
        self.threshold = threshold
        self.tests = [_shingles(question) for question in tests]
        self.best: list[tuple[float, str] | None] = [None] * len(tests)
        count = collections.Counter(shingle for shingles in self.tests for shingle in shingles)
        self.index: dict[str, list[int]] = collections.defaultdict(list)
        for at, shingles in enumerate(self.tests):
            rarest = sorted(shingles, key=lambda shingle: (count[shingle], shingle))
            for shingle in rarest[: len(shingles) - math.ceil(threshold * len(shingles) - 1e-9) + 1]:
                self.index[shingle].append(at)

    def add(self, question: str) -> None:
        """Compare one more training question."""
        shingles = _shingles(question)
        for at in {at for shingle in shingles for at in self.index.get(shingle, ())}:
            similarity = len(shingles & self.tests[at]) / len(shingles | self.tests[at])
            before = self.best[at]
            if similarity >= self.threshold and (before is None or similarity > before[0]):
                self.best[at] = (similarity, question)


def _shingles(question: str) -> frozenset[str]:
    """Pairs of neighbouring words; 20,817 is one word."""
    words = re.sub(r"[\W_]+", " ", re.sub(r"(?<=\d),(?=\d{3})", "", question.lower())).split()
    return frozenset(" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1)))
