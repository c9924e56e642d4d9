"""The processes of one run (torchrun's): what is to be done once is done by the first, and the others wait for it."""

import functools
import itertools
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from llm_adapters.errors import Interrupted, RequestError, WorkError

Result = TypeVar("Result")

_numbers = itertools.count()  # of the calls of `once`, which are the same in every process
_inside = False


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True in the process that does and shows what is done and shown once."""
    return rank() == 0


def is_told_by_another(error: BaseException) -> bool:
    """True if a person hears of `error` from another process on this machine: it is the first's, or found by each."""
    alike = isinstance(error, RequestError | Interrupted) and os.environ.get("LOCAL_RANK", "0") != "0"
    return alike or getattr(error, "of_first_process", False)


def once(work: Callable[[], Result]) -> Result:
    """What `work` returns, done by the first process alone; the others wait for it, however long it takes.

    Every process must call this, and they must do so in the same order. Inside of `work`, it is a plain call.

    Args:
        work: its result is sent to the others (pickled); what it raises is raised in all of them.
    """
    global _inside
    if count() == 1 or _inside:
        return work()
    store, key = shared_store(), f"once/{next(_numbers)}"
    if not is_first():
        done, result = pickle.loads(_wait(store, key))  # noqa: S301 -- of the first process of this very run
        if done:
            return result
        result.of_first_process = True
        raise result
    _inside = True
    try:
        outcome = work()
    except BaseException as error:
        store.set(key, _pickled(False, error))
        raise
    finally:
        _inside = False
    store.set(key, _pickled(True, outcome))
    return outcome


@functools.cache
def shared_store() -> Any:
    """Key-value store of the processes (torch's `Store`)."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank(), count(), timeout=timedelta(minutes=10)))
    return PrefixStore(f"llm-adapters/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait(store: Any, key: str) -> bytes:
    pause = 0.01
    while not store.check([key]):  # `store.wait` would have a time limit, and see no signal
        time.sleep(pause)
        pause = min(0.5, pause * 1.5)
    return store.get(key)


def _pickled(done: bool, result: Any) -> bytes:
    if not done and not isinstance(result, WorkError | ValueError | OSError):
        result = WorkError(f"the first process ended with {type(result).__name__}: {result}")
    try:
        return pickle.dumps((done, result))
    except Exception as error:  # whatever an object that is not made for it raises
        return pickle.dumps((False, WorkError(f"the first process has a result that cannot be sent: {error}")))
