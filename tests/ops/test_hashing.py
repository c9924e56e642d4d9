"""The hashes against their definitions in Python's whole numbers, and against published values."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.ops.hashing import hash32, split_seed

UNSIGNED = st.integers(0, 2**64 - 1)


def signed(value, bits):
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def murmur(number, seed):
    h = (number + seed) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h ^= seed >> 32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def splitmix(seed, number):
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), UNSIGNED)
def test_hash32_is_murmurs_mixing_step(numbers, seed):
    found = hash32(torch.tensor(numbers, dtype=torch.int32), torch.tensor(signed(seed, 64)))
    assert found.tolist() == [signed(murmur(number, seed), 32) for number in numbers]


def test_murmurs_mixing_step_has_its_known_values():
    # fmix32 as in MurmurHash3: 0 stays, and 1 becomes 0x514E28B7.
    assert hash32(torch.tensor([0, 1], dtype=torch.int32), torch.tensor(0)).tolist() == [0, 0x514E28B7]


@given(UNSIGNED, st.integers(0, 2**40))
def test_split_seed_is_splitmix(seed, number):
    found = split_seed(torch.tensor(signed(seed, 64)), torch.tensor(number))
    assert int(found) == signed(splitmix(seed, number), 64)


def test_split_seed_gives_the_published_numbers():
    # The first five of SplitMix64 seeded with 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = split_seed(torch.tensor(1234567), torch.arange(5))
    assert found.tolist() == [signed(value, 64) for value in published]


def test_shapes_broadcast():
    seeds = split_seed(torch.arange(3)[:, None], torch.arange(4))
    assert seeds.shape == (3, 4)
    found = hash32(torch.arange(5, dtype=torch.int32), seeds[..., None])
    assert found.shape == (3, 4, 5)
    assert torch.equal(found[1, 2], hash32(torch.arange(5, dtype=torch.int32), seeds[1, 2]))
    assert len(set(found.flatten().tolist())) == 60
