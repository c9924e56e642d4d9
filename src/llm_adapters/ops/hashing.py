"""Random bits that are a function: a hash of a seed and of a number, the same on every device and in every order."""

import torch

_MUL = tuple(value - 2**32 for value in (0x85EBCA6B, 0xC2B2AE35))  # as int32, which wraps around
_MUL64 = tuple(value - 2**64 for value in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def hash32(numbers: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """32 random bits for each pair of a number and a seed.

    MurmurHash3's last mixing step of the number, with the seed's lower half before and its upper half within it.

    Args:
        numbers: int32.
        seeds: int64, of a shape that broadcasts against `numbers`.

    Returns:
        int32 of the broadcast shape; every value is as likely as any.
    """
    low, high = seeds.to(torch.int32), (seeds >> 32).to(torch.int32)
    h = numbers + low
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_MUL[0])
    h.bitwise_xor_(high)
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_MUL[1])
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def split_seed(seeds: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A seed of its own for each pair of a seed and a number (SplitMix64, Steele et al. 2014), int64.

    Args:
        seeds: int64.
        numbers: int64, 0 or more, of a shape that broadcasts against `seeds`.
    """
    z = seeds + (numbers + 1) * _GOLDEN
    for shift, factor in zip((30, 27), _MUL64, strict=True):
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Int64 shifted to the right, zeros moving in."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
