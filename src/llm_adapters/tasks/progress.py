"""How far the reading of a long file has come, on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
FIRST, BETWEEN = 5.0, 10.0  # seconds until something is said, and between two times


def counted(items: Iterable[T], what: str) -> Iterator[T]:
    """Items as they come; where they take long, their number so far is told now and then.

    Args:
        items: anything that can be iterated over.
        what: what is done with them, for the line ("reading train.jsonl").
    """
    due = time.monotonic() + FIRST
    for number, item in enumerate(items):
        if number % 4096 == 0 and time.monotonic() > due:
            print(f"{what}: {number:,} rows", file=sys.stderr, flush=True)
            due = time.monotonic() + BETWEEN
        yield item
