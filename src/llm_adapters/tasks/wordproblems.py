"""Arithmetic word problems with worked answers, generated: a data set that needs no file and no network.

Eight kinds of problem in one or two steps, with small numbers. The training set and the test set share the kinds and
the way of answering, but not one sentence template, and only some of the people and things.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llm_adapters.errors import unknown
from llm_adapters.tasks.examples import Example

SIZES = {"train": 2000, "test": 300}
_SEEDS = {"train": 20230404, "test": 20231208}

_T = TypeVar("_T")
Numbers = dict[str, int]


class Dice:
    """Draws that give the same values on every Python version: only `random.Random.random` promises that.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """Draw a whole number.

        Args:
            low: the least.
            high: the greatest.
        """
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, choices: Sequence[_T]) -> _T:
        """Draw one of several values.

        Args:
            choices: the values.
        """
        return choices[self.between(0, len(choices) - 1)]


@dataclass(frozen=True)
class Kind:
    """One kind of problem. Templates have the slots {name}, {other}, {items} and the numbers that `draw` gives.

    Attributes:
        name: for people.
        draw: gives the numbers of one problem, and ``answer``, always positive.
        solution: the worked answer, the same for all templates of a kind.
        train: the templates of the training set.
        test: those of the test set.
    """

    name: str
    draw: Callable[[Dice], Numbers]
    solution: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def _add(dice: Dice) -> Numbers:
    a, b = dice.between(2, 15), dice.between(2, 9)
    return {"a": a, "b": b, "answer": a + b}


def _subtract(dice: Dice) -> Numbers:
    b, rest = dice.between(2, 9), dice.between(2, 10)
    return {"a": b + rest, "b": b, "answer": rest}


def _multiply(dice: Dice) -> Numbers:
    a, b = dice.between(2, 9), dice.between(2, 9)
    return {"a": a, "b": b, "answer": a * b}


def _divide(dice: Dice) -> Numbers:
    b, each = dice.between(2, 9), dice.between(2, 9)
    return {"a": b * each, "b": b, "answer": each}


def _add_then_subtract(dice: Dice) -> Numbers:
    a, b = dice.between(2, 9), dice.between(2, 9)
    c = dice.between(2, a)
    return {"a": a, "b": b, "c": c, "step": a + b, "answer": a + b - c}


def _multiply_then_add(dice: Dice) -> Numbers:
    a, b, c = dice.between(2, 5), dice.between(2, 5), dice.between(2, 9)
    return {"a": a, "b": b, "c": c, "step": a * b, "answer": a * b + c}


KINDS = (
    Kind(
        "gain",
        _add,
        "We add: {a} + {b} = {answer}.",
        train=(
            "{name} has {a} {items}. {name} finds {b} more. How many {items} does {name} have now?",
            "{name} had {a} {items} and bought {b} more. How many {items} does {name} have?",
            "There were {a} {items} in a box. {name} put {b} more in. How many {items} are in the box?",
            "{name} owned {a} {items}. {other} gave {name} {b} more {items}. How many does {name} own now?",
            "{name} won {b} {items} at a fair and already had {a}. How many {items} is that in all?",
            "After making {a} {items}, {name} made {b} more. How many {items} did {name} make?",
        ),
        test=(
            "{name} starts the day with {a} {items} and receives {b}. How many {items} does {name} end up with?",
            "A shelf holds {a} {items}. {name} adds {b} {items} to it. How many {items} does the shelf hold now?",
        ),
    ),
    Kind(
        "loss",
        _subtract,
        "We subtract: {a} - {b} = {answer}.",
        train=(
            "{name} has {a} {items}. {name} gives {b} to {other}. How many {items} are left?",
            "{name} had {a} {items} and lost {b} of them. How many {items} does {name} still have?",
            "There were {a} {items} on a table. {other} took {b} away. How many {items} are still there?",
            "{name} made {a} {items} and sold {b}. How many {items} remain?",
            "Of {a} {items}, {b} were broken. How many {items} were not broken?",
            "{name} bought {a} {items} and has used {b} of them. How many {items} has {name} not used?",
        ),
        test=(
            "{name} carries {a} {items} and drops {b} on the way. How many {items} does {name} bring home?",
            "A basket had {a} {items} until {name} removed {b}. How many {items} stayed in the basket?",
        ),
    ),
    Kind(
        "together",
        _add,
        "We add: {a} + {b} = {answer}.",
        train=(
            "{name} has {a} {items} and {other} has {b}. How many {items} do they have together?",
            "{name} picked {a} {items}. {other} picked {b}. How many {items} did they pick in total?",
            "There are {a} red {items} and {b} blue {items}. How many {items} are there altogether?",
            "{name} saw {a} {items} on Monday and {b} on Tuesday. How many {items} did {name} see in both days?",
            "One bag has {a} {items} and another bag has {b}. How many {items} are in the two bags?",
            "{name} and {other} brought {items}: {a} from {name} and {b} from {other}. How many were brought?",
        ),
        test=(
            "{name} counted {a} {items} in the morning and {b} in the evening. What is the total number of {items}?",
            "{name} owns {a} {items}, while {other} owns {b}. If they combine them, how many {items} is that?",
        ),
    ),
    Kind(
        "difference",
        _subtract,
        "We subtract: {a} - {b} = {answer}.",
        train=(
            "{name} has {a} {items} and {other} has {b}. How many more {items} does {name} have than {other}?",
            "{name} found {a} {items}. {other} found {b}. How many fewer {items} did {other} find?",
            "There are {a} big {items} and {b} small ones. How many more big {items} are there?",
            "{name} needs {a} {items} but has only {b}. How many more {items} does {name} need?",
            "One box holds {a} {items}, another holds {b}. What is the difference?",
            "{name} sold {a} {items} on Friday and {b} on Sunday. How many more did {name} sell on Friday?",
        ),
        test=(
            "{name} collected {a} {items}, but {other} collected just {b}. How many more did {name} collect?",
            "{name} wants {a} {items} and has {b} so far. How many more {items} must {name} get?",
        ),
    ),
    Kind(
        "groups",
        _multiply,
        "We multiply: {a} * {b} = {answer}.",
        train=(
            "{name} has {a} bags with {b} {items} in each bag. How many {items} does {name} have?",
            "There are {a} boxes. Each box holds {b} {items}. How many {items} are there in all?",
            "{name} makes {b} {items} every day. How many {items} does {name} make in {a} days?",
            "{a} children have {b} {items} each. How many {items} do they have together?",
            "{name} puts {b} {items} on each of {a} plates. How many {items} are on the plates?",
            "{name} buys {a} packs of {items}. Every pack has {b}. How many {items} did {name} buy?",
        ),
        test=(
            "Each of {a} baskets contains {b} {items}. How many {items} do the baskets contain in total?",
            "{name} arranges {items} in {a} rows of {b}. How many {items} does {name} arrange?",
        ),
    ),
    Kind(
        "share",
        _divide,
        "We divide: {a} / {b} = {answer}.",
        train=(
            "{name} shares {a} {items} equally among {b} friends. How many {items} does each friend get?",
            "{name} puts {a} {items} into {b} boxes, the same number in each. How many {items} are in each box?",
            "{a} {items} are divided equally between {b} children. How many does each child get?",
            "{name} packs {a} {items} in bags of {b}. How many bags does {name} need?",
            "{name} made {a} {items} in {b} days, the same number every day. How many {items} is that per day?",
            "{b} plates hold {a} {items} in equal numbers. How many {items} are on one plate?",
        ),
        test=(
            "{name} splits {a} {items} evenly over {b} baskets. How many {items} go into each basket?",
            "A teacher hands out {a} {items} equally to {b} pupils. How many {items} does one pupil receive?",
        ),
    ),
    Kind(
        "two steps: gain, loss",
        _add_then_subtract,
        "We add, then subtract: {a} + {b} = {step}, {step} - {c} = {answer}.",
        train=(
            "{name} had {a} {items}, found {b} more and gave {c} to {other}. How many {items} does {name} have?",
            "{name} has {a} {items}. {name} buys {b} more, then loses {c}. How many {items} are left?",
            "There were {a} {items} in a box. {name} put in {b} and took out {c}. How many are in the box now?",
            "{name} made {a} {items} and {other} made {b}. They sold {c}. How many {items} remain?",
            "{name} got {a} {items} on Monday and {b} on Tuesday, then used {c}. How many {items} are not used?",
            "{name} picked {a} red {items} and {b} blue ones. {c} were broken. How many were not broken?",
        ),
        test=(
            "{name} begins with {a} {items}, receives {b} and drops {c}. How many {items} does {name} end up with?",
            "A shelf held {a} {items}. {name} added {b}, but {other} removed {c}. How many {items} stayed there?",
        ),
    ),
    Kind(
        "two steps: groups, gain",
        _multiply_then_add,
        "We multiply, then add: {a} * {b} = {step}, {step} + {c} = {answer}.",
        train=(
            "{name} has {a} bags of {b} {items} and {c} more {items}. How many {items} does {name} have?",
            "{name} bought {a} boxes with {b} {items} each and then found {c}. How many {items} is that in all?",
            "{name} makes {b} {items} a day for {a} days, then {c} more. How many {items} does {name} make?",
            "There are {a} plates with {b} {items} each, and {c} {items} on a table. How many {items} are there?",
            "{a} children have {b} {items} each. {name} has {c}. How many {items} do they all have?",
            "{name} had {c} {items} and bought {a} packs of {b}. How many {items} does {name} have now?",
        ),
        test=(
            "{name} fills {a} baskets with {b} {items} each and keeps {c} besides. How many {items} is that in total?",
            "{name} arranges {a} rows of {b} {items} and adds {c} at the end. How many {items} is that?",
        ),
    ),
)


def _words(text: str) -> list[str]:
    return text.split()


NAMES = {
    "train": _words("Mia Tom Ana Ben Lea Sam Eva Max Ida Leo Zoe Jan Amy Dan Kim Noah Lily Omar Rosa Finn"),
    "test": _words("Mia Tom Ana Ben Lea Sam Emma Jack Nina Paul Sara Hugo Vera Adam Ruth Carl"),
}
_SHARED_ITEMS = _words("apples books shells coins cards marbles stickers pencils")
ITEMS = {
    "train": _SHARED_ITEMS
    + _words("cookies flowers stamps toys eggs cups balls stones buttons pears nuts candles hats"),
    "test": _SHARED_ITEMS + _words("oranges leaves beads muffins ribbons badges"),
}


def generate(split: str) -> list[Example]:
    """Make the examples of a split: always the same ones, no question twice.

    Kinds and templates take turns, so that any first N examples hold nearly as many of each kind.

    Args:
        split: ``"train"`` (2,000 examples) or ``"test"`` (300).

    Raises:
        RequestError: another split.
    """
    if split not in SIZES:
        raise unknown("split of the word problems", split, SIZES)
    dice = Dice(_SEEDS[split])
    examples: dict[str, Example] = {}
    while len(examples) < SIZES[split]:
        turn, place = divmod(len(examples), len(KINDS))
        kind = KINDS[place]
        templates = kind.train if split == "train" else kind.test
        example = _fill(kind, templates[turn % len(templates)], dice, split)
        examples.setdefault(example.question, example)
    return list(examples.values())


def _fill(kind: Kind, template: str, dice: Dice, split: str) -> Example:
    name = dice.pick(NAMES[split])
    other = dice.pick([person for person in NAMES[split] if person != name])
    slots = {"name": name, "other": other, "items": dice.pick(ITEMS[split]), **kind.draw(dice)}
    answer = str(slots["answer"])
    response = f"{kind.solution.format(**slots)} The answer is {answer}."
    return Example(template.format(**slots), response=response, answer=answer)
