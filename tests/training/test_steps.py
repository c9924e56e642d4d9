"""Which examples each step and each process takes."""

from collections import Counter

import pytest

from llm_adapters.training.steps import Steps


def flat(steps: list[list[int]]) -> list[int]:
    return [index for step in steps for index in step]


def test_each_example_comes_once_and_in_another_order_in_each_epoch() -> None:
    steps = Steps(50, 8, seed=0)
    first = list(steps)
    assert Counter(flat(first)) == Counter(range(50))
    assert [len(step) for step in first] == [8] * 6 + [2]
    assert len(steps) == 7
    assert list(steps) == first
    steps.set_epoch(1)
    assert list(steps) != first
    assert list(Steps(50, 8, seed=1)) != first


def test_what_was_held_out_keeps_its_order() -> None:
    assert flat(list(Steps(5, 2, seed=None))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_the_processes_divide_each_step_among_them(processes: int) -> None:
    whole = list(Steps(11, 4, seed=3))
    parts = [list(Steps(11, 4, 3, rank, processes)) for rank in range(processes)]
    for number, step in enumerate(whole):
        assert sorted(flat([part[number] for part in parts])) == sorted(step)
