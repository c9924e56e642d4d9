"""Sizes that operators round up to.

A CPU's matrix products are compiled and kept for every new shape: many shapes cost time, and memory that looks like a
leak. So sizes come in steps.
"""


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def padded_size(size: int, step: int) -> int:
    """The next size up that is a multiple of `step`, or below it a power of two."""
    return round_up(size, step) if size > step else 1 << max(0, size - 1).bit_length()
