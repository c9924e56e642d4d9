"""Memory for large tensors on a CPU, kept from step to step and in one piece.

The C library mixes large tensors with the small objects that outlive them, and (glibc 2.36) seldom puts a tensor in the
hole of another one of the same size: in a training step a quarter of what it held was holes.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from bisect import bisect
from pathlib import Path

import torch

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # mallopt's own numbers, malloc.h
_LARGEST = 32 * 2**20  # what the library allows
_SMALL = 2**16  # bytes, below which a tensor is the C library's


def keep_memory() -> bool:
    """Serve tensors of up to 32 MiB from memory that the process keeps; whether the C library could be told.

    By default every larger tensor is new memory from the kernel, which zeroes it page by page when it is first
    written: about 6 % of a training step on a CPU. Peak memory hardly changes, as a step needs the same again.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library (musl)
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
    results = [mallopt(name, value) for name, value in settings]
    return results == [1, 1, 1]


class _Lease(weakref.ref):
    """Knows when the memory of a tensor is not used any more."""

    __slots__ = ("start", "stop")
    start: int
    stop: int


class Region:
    """Address space that tensors are placed in, each in the first hole that it fits.

    Only what has been written to takes memory. Any thread may call it.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._map)
        self._starts, self._stops = [0], [size]  # of the holes, in order
        self._leases: dict[int, _Lease] = {}
        self._returned: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview | None:
        """So many bytes, which are given back when nothing refers to them any more; None where no hole is so large."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            self._collect()
            for number, start in enumerate(self._starts):
                if self._stops[number] - start >= size:
                    break
            else:
                return None
            if self._stops[number] - start == size:
                del self._starts[number], self._stops[number]
            else:
                self._starts[number] += size
            part = self._view[start : start + size]
            lease = self._leases[start] = _Lease(part, self._end)
            lease.start, lease.stop = start, start + size
        return part

    def trim(self) -> None:
        """Give the memory of all holes back to the system."""
        with self._lock:
            self._collect()
            for start, stop in zip(self._starts, self._stops, strict=True):
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _end(self, lease: _Lease) -> None:
        # May be called in the midst of anything, `take` included: so no more than this.
        del self._leases[lease.start]
        self._returned.append((lease.start, lease.stop))

    def _collect(self) -> None:
        """Make holes of what has been given back."""
        while self._returned:
            start, stop = self._returned.pop()
            number = bisect(self._starts, start)
            if number < len(self._starts) and self._starts[number] == stop:
                self._starts[number] = start
            else:
                self._starts.insert(number, start)
                self._stops.insert(number, stop)
            if number and self._stops[number - 1] == self._starts[number]:
                self._stops[number - 1] = self._stops[number]
                del self._starts[number], self._stops[number]


_region: list[Region | None] = []  # one or none, when it is known


os.register_at_fork(after_in_child=_region.clear)  # the lock may be held by a thread that is not there any more


def _the_region() -> Region | None:
    if not _region:
        try:
            # Where the system counts address space as memory, half of it may not be taken.
            counted = Path("/proc/sys/vm/overcommit_memory").read_text("ascii").strip() == "2"
            _region.append(None if counted else Region(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2))
        except (OSError, ValueError):  # another system, or too little address space is allowed
            _region.append(None)
    return _region[0]


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor without values, of the precision of `like` and where that is."""
    count = math.prod(shape)
    size = count * like.element_size()
    region = _the_region() if size >= _SMALL and like.device.type == "cpu" else None
    part = None if region is None else region.take(size)
    return (
        like.new_empty(shape) if part is None else torch.frombuffer(part, dtype=like.dtype, count=count).resize_(shape)
    )


def trim() -> None:
    """Give memory that no tensor is in back to the system."""
    if _region and _region[0] is not None:
        _region[0].trim()


release_unused = trim
