"""The C library's allocator, told to keep what training gives back and takes again in every step."""

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # mallopt's own numbers, malloc.h
_LARGEST = 32 * 2**20  # what the library allows


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
