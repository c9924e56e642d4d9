"""Memory for large tensors on a CPU, kept from step to step and in one piece.

The C library mixes large tensors with the small objects that outlive them, and (glibc 2.36) seldom puts a tensor in the
free block of another one of the same size: in a training step a quarter of what it held was such blocks.
"""

import ctypes
import functools
import math
import mmap
import os
import sys
import threading
import weakref
from bisect import bisect
from pathlib import Path

import torch

from llm_adapters.ops.sizes import round_up

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # mallopt's own numbers, malloc.h
_LARGEST = 32 * 2**20  # what the library allows
MIN_BYTES = 2**16  # of a tensor in the arena; smaller ones are the C library's


def keep_memory() -> bool:
    """Serve tensors of up to 32 MiB from memory that the process keeps; False if the C library cannot do that.

    The setting is the process's, and stays when models and sessions are gone.

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


class Allocation(weakref.ref):
    """A weak reference to the memory of a tensor, which tells when nobody uses it any more.

    A weak reference to a `memoryview` is safe for this: `torch.frombuffer` holds a reference to the very object that it
    is given for as long as the tensor's storage exists, views and saved tensors of graphs included, and lets go of it
    only when the storage is freed. Nobody else has it. `tests/ops/test_allocator.py` fails should torch copy the buffer
    or hold the underlying `mmap` instead.
    """

    __slots__ = ("start", "stop")
    start: int
    stop: int


class Arena:
    """Address space that tensors are placed in, each in the first free block that it fits.

    Only what has been written to takes memory. Any thread may call it.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._map)
        self._starts, self._stops = [0], [size]  # of the free blocks, in order
        self._allocations: dict[int, Allocation] = {}
        self._released: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def allocate(self, size: int) -> memoryview | None:
        """So many bytes, released when nothing refers to them any more; None where no free block is so large."""
        size = round_up(size, mmap.PAGESIZE)
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
            allocation = self._allocations[start] = Allocation(part, self._release)
            allocation.start, allocation.stop = start, start + size
        return part

    def release_unused(self) -> None:
        """Give the memory of all free blocks back to the system."""
        with self._lock:
            self._collect()
            for start, stop in zip(self._starts, self._stops, strict=True):
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def free_blocks(self) -> list[tuple[int, int]]:
        """The start and the end of each free block, in order."""
        with self._lock:
            self._collect()
            return list(zip(self._starts, self._stops, strict=True))

    def _release(self, allocation: Allocation) -> None:
        # May be called in the midst of anything, `allocate` included: so no more than this.
        del self._allocations[allocation.start]
        self._released.append((allocation.start, allocation.stop))

    def _collect(self) -> None:
        """Make free blocks of what has been released."""
        while self._released:
            start, stop = self._released.pop()
            number = bisect(self._starts, start)
            if number < len(self._starts) and self._starts[number] == stop:
                self._starts[number] = start
            else:
                self._starts.insert(number, start)
                self._stops.insert(number, stop)
            if number and self._stops[number - 1] == self._starts[number]:
                self._stops[number - 1] = self._stops[number]
                del self._starts[number], self._stops[number]


@functools.cache
def arena() -> Arena | None:
    """The process's arena; None where there is no address space for one."""
    try:
        # Where the system counts address space as memory, half of it may not be taken.
        counted = Path("/proc/sys/vm/overcommit_memory").read_text("ascii").strip() == "2"
        return None if counted else Arena(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)
    except (OSError, ValueError):  # another system, or too little address space is allowed
        return None


os.register_at_fork(after_in_child=arena.cache_clear)  # the lock may be held by a thread that is not there any more


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor without values, of the precision and on the device of `like`."""
    count = math.prod(shape)
    size = count * like.element_size()
    if size >= MIN_BYTES and like.device.type == "cpu" and (memory := arena()) is not None:
        part = memory.allocate(size)
        if part is not None:
            return torch.frombuffer(part, dtype=like.dtype, count=count).resize_(shape)
    return like.new_empty(shape)


def release_unused() -> None:
    """Give memory that no tensor is in back to the system."""
    if arena.cache_info().currsize and (memory := arena()) is not None:
        memory.release_unused()
