"""The answer in a model's response, and whether it is the right one. Pure functions, no model needed.

Three protocols:

- ``default``: the answer that the response declares ("The answer is 5", "Answer: (B)", ``#### 5``, ``\\boxed{5}``,
  "5 is the answer"); without a declaration the last number, or the letter, option or truth value that is given as one.
- ``strict``: only a declared answer. Where there is one it equals the default one.
- ``paper``: the rules of the paper's evaluation code (`llm_adapters.tasks.answers.paper`).

The rules of the first two:

- What a model thinks aloud (``<think>``) does not count, nor text after the end of the response
  (`llm_adapters.tasks.answers.stop`).
- Of several declarations the last counts, since models correct themselves ("The answer is 5. Wait, the answer is 6.").
- A declared equation is worth what comes after its last equals sign. Of several quantities ("5 birds and 3 cats") the
  first counts: the sentence names no other as its answer.
- The words that declare an answer are known in the languages of MGSM (`llm_adapters.tasks.answers.languages`).
- An answer is not declared where it is denied ("not 5 but 6"), in a question ("is it so that the answer is 5?"),
  supposed ("if the answer is 5") or only listed ("answer1/answer2", "A or B").
"""

import re
from operator import attrgetter
from typing import Literal, get_args

from llm_adapters.errors import unknown
from llm_adapters.tasks.answers import choices, labels, languages, numbers, paper
from llm_adapters.tasks.answers.declarations import declared_answers
from llm_adapters.tasks.answers.stop import (
    truncate_at_next_turn,
    truncate_at_solution,
    truncate_at_stop,
    without_thoughts,
)

EXTRACTORS = {
    "number": numbers.NUMBER,
    "letter": choices.LETTER,
    "option": choices.OPTION,
    "boolean": choices.BOOLEAN,
}
KINDS = (*EXTRACTORS, "text")
ProtocolName = Literal["default", "strict", "paper"]  # typed here once; signatures and recipes take it from here
PROTOCOLS: tuple[str, ...] = get_args(ProtocolName)


def extract(
    text: str, kind: str, protocol: str = "default", stop: str | None = None, language: str = ""
) -> float | str | None:
    """Answer of one kind in a text.

    Args:
        text: what a model generated; any text is fine.
        kind: ``"number"``, ``"letter"``, ``"option"``, ``"boolean"`` or ``"text"`` (the whole response).
        protocol: ``"default"``, ``"strict"`` or ``"paper"``, as described at the top of this module.
        stop: the words that end a response in the template of its prompt (`Template.stop`).
        language: the language of the data (``"de"``), where that is known: how numbers and truth values are written.

    Returns:
        A float for a number, an upper-case letter, a lower-case name such as ``"answer2"`` for an option, ``"true"`` or
        ``"false"``, or the response itself; None where there is no answer.

    Raises:
        RequestError: an unknown kind or protocol.
    """
    if kind not in KINDS:
        raise unknown("answer kind", kind, KINDS)
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if protocol == "paper":
        return paper.extract(truncate_at_stop(text, stop), kind)
    text = truncate_at_next_turn(truncate_at_stop(without_thoughts(text), stop))
    if kind == "text":
        return text.strip() or None
    extractor = EXTRACTORS[kind]
    spoken = languages.LANGUAGES.get(language)
    text = numbers.normalise(text)
    if spoken is not None and spoken.decimal_comma:
        text = languages.with_decimal_points(text)
    text = extractor.clean(truncate_at_solution(text))
    # A model that loops says the same a thousand times: read each clause once, in the order of its last occurrence.
    in_order = sorted(declared_answers(text), key=attrgetter("start"))
    distinct = {(found.text, found.style, found.digits_follow, found.language): found for found in in_order}
    for found in sorted(distinct.values(), key=attrgetter("start"), reverse=True):
        if (answer := extractor.declared(found)) is not None:
            return answer
    if protocol != "default":
        return None
    if kind == "boolean" and spoken is not None and (value := languages.truth(text, spoken)):
        return value
    return extractor.undeclared(text)


def is_correct(
    prediction: float | str | None, label: str, kind: str, protocol: str = "default", language: str = ""
) -> bool:
    """Comparison of an answer with the gold label.

    Numbers may differ by 0.001, as in the paper's code; with another protocol than the paper's, by less from a small
    label with decimals, and by the rounding of a large one (`labels.tolerance`). Everything else is compared ignoring
    case, brackets and spaces (``"(b)"`` is B, ``"Answer 2"`` is answer2, ``"yes"`` and ``"1"`` are true).

    Args:
        prediction: what `extract` returned. None, NaN and infinity are never correct.
        label: the gold answer as the data writes it; a number as ``"15.0"``, ``"1,000"``, ``"3/4"``, ``"$5"`` or
            ``"5 kg"``. A label that is more than a number (``"\\sqrt{2}"``, ``"3 to 5"``) equals none.
        kind: the kind of answer, as for `extract`.
        protocol: as for `extract`.
        language: as for `extract`.

    Returns:
        True where they are the same answer.

    Raises:
        RequestError: an unknown kind.
    """
    if kind not in KINDS:
        raise unknown("answer kind", kind, KINDS)
    if prediction is None:
        return False
    if kind == "number":
        gold, found = labels.number(label, language), labels.number(prediction)
        return gold is not None and found is not None and abs(gold - found) <= labels.tolerance(gold, protocol)
    return _plain(prediction, kind) == _plain(label, kind) != ""


def _plain(value: object, kind: str) -> str:
    if kind == "text":
        return " ".join(str(value).split()).casefold()
    if kind == "boolean":
        return labels.truth(str(value))
    return re.sub(r"[^a-z0-9]", "", str(value).lower())
