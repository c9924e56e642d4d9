"""What several processes do once: the first does it, and the others get what came of it."""

import itertools
from typing import Any

import pytest
from torch.distributed import HashStore
from transformers import TrainerControl, TrainerState

from llm_adapters import processes
from llm_adapters.errors import RequestError, WorkError
from llm_adapters.training.trainer import StopOnSignal


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Go on as the process of that number, of two; calls are counted anew."""
    store = HashStore()
    monkeypatch.setattr(processes, "shared_store", lambda: store)

    def become(rank: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(processes, "_numbers", itertools.count())

    return become


def forbidden() -> None:
    raise AssertionError("only the first process does it")


def test_a_process_alone_just_does_it() -> None:
    assert processes.once(lambda: 3) == 3
    assert processes.is_first()
    assert processes.count() == 1


def test_the_others_get_what_the_first_has_done(as_process: Any) -> None:
    as_process(0)
    assert processes.once(lambda: {"a": 1}) == {"a": 1}
    assert processes.once(lambda: processes.once(lambda: 2)) == 2  # inside it is a plain call
    as_process(1)
    assert not processes.is_first()
    assert processes.once(forbidden) == {"a": 1}
    assert processes.once(forbidden) == 2


@pytest.mark.parametrize(
    ("raised", "kind"), [(RequestError("no"), RequestError), (WorkError("no"), WorkError), (KeyError("no"), WorkError)]
)
def test_what_the_first_raises_is_raised_in_all_and_told_once(
    raised: Exception, kind: type[Exception], as_process: Any
) -> None:
    def fail() -> None:
        raise raised

    as_process(0)
    with pytest.raises(type(raised), match="no") as first:
        processes.once(fail)
    assert not processes.is_told_by_another(first.value)
    as_process(1)
    with pytest.raises(kind, match="no") as other:
        processes.once(forbidden)
    assert processes.is_told_by_another(other.value)
    assert processes.is_told_by_another(RequestError("each finds that"))
    assert not processes.is_told_by_another(WorkError("this one alone"))


def test_what_cannot_be_sent_is_an_error_of_the_others(as_process: Any) -> None:
    as_process(0)
    processes.once(lambda: (n for n in range(3)))
    as_process(1)
    with pytest.raises(WorkError, match="cannot be sent"):
        processes.once(forbidden)


def test_all_processes_stop_after_the_same_step(as_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopOnSignal, "_numbers", itertools.repeat(1))
    first, second = StopOnSignal(), StopOnSignal()
    state, control = TrainerState(max_steps=20), TrainerControl()

    def stops(rank: int, stop: StopOnSignal, step: int) -> bool:
        as_process(rank)
        state.global_step, control.should_training_stop = step, False
        stop.on_step_end(None, state, control)  # type: ignore[arg-type]
        assert stop.stopped == control.should_training_stop == control.should_save
        return stop.stopped

    assert not stops(0, first, 4)
    first.received = 15  # only one of them hears of it, or the other a little later
    assert not stops(0, first, 5)
    assert not stops(1, second, 6)  # which is ahead
    second.received = 15
    assert not stops(0, first, 6)
    assert not stops(1, second, 7)
    assert not stops(0, first, 7)
    assert stops(1, second, 8)
    assert stops(0, first, 8)
