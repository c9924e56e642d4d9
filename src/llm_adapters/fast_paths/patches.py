"""Attributes that are replaced for a time: of one model's modules, and of objects that a whole process shares."""

import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


class Patches:
    """Replaced attributes; `undo` gives back what was there, in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the instance `owner`; where it had none of its own, `undo` leaves none behind."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self.defer((lambda: delattr(owner, name)) if before is _ABSENT else (lambda: setattr(owner, name, before)))

    def share(self, owner: Any, name: str, value: Any) -> None:
        """Set a global of a Python module, as `share_item` does."""
        self.share_item(vars(owner), name, value)

    def share_item(self, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        """Set an item of a process-wide mapping, which several sessions may patch and leave in any order.

        The original is back when the last of them has left.
        """
        with _lock:
            entry = _shared.setdefault((id(mapping), key), _Shared(mapping.get(key, _ABSENT)))
            entry.users += 1
            mapping[key] = value
        self.defer(lambda: _leave(mapping, key))

    def defer(self, undo: Callable[[], None]) -> None:
        """Call `undo` when everything after it has been undone."""
        self._undo.append(undo)

    def undo(self, down_to: int = 0) -> None:
        """Undo all but the first `down_to` patches."""
        while len(self._undo) > down_to:
            self._undo.pop()()


@dataclass
class _Shared:
    """The original of a process-wide item, and how many sessions use the replacement."""

    original: Any
    users: int = 0


_shared: dict[tuple[int, str], _Shared] = {}
_lock = threading.Lock()


def _leave(mapping: MutableMapping[str, Any], key: str) -> None:
    with _lock:
        entry = _shared[id(mapping), key]
        entry.users -= 1
        if entry.users:
            return
        del _shared[id(mapping), key]
        if entry.original is _ABSENT:
            del mapping[key]
        else:
            mapping[key] = entry.original
