"""Tensors' own memory: no two at one place, nothing lost, and given back when nobody has it any more."""

import gc
import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.ops.cpu import allocator as memory

PAGE = memory.mmap.PAGESIZE
PAGES = 64


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9 * PAGE)), max_size=60))
def test_no_two_at_one_place_and_nothing_lost(steps: list[tuple[bool, int]]) -> None:
    arena = memory.Arena(PAGES * PAGE)
    held: list[tuple[memoryview, int]] = []
    for number, (drop, size) in enumerate(steps):
        if drop and held:
            part, mark = held.pop(size % len(held))
            assert set(part) == {mark}  # nobody has written there meanwhile
            del part
            continue
        part = arena.allocate(size)
        if part is None:
            needed = -(-size // PAGE) * PAGE
            assert max((stop - start for start, stop in arena.free_blocks()), default=0) < needed
            continue
        assert len(part) >= size
        part[:] = bytes([number % 256]) * len(part)
        held.append((part, number % 256))
        del part
    free = arena.free_blocks()
    assert sum(stop - start for start, stop in free) + sum(len(part) for part, _ in held) == PAGES * PAGE
    assert all(one[1] < other[0] for one, other in itertools.pairwise(free))  # neighbours are one block
    held.clear()
    assert arena.free_blocks() == [(0, PAGES * PAGE)]


def test_a_tensor_holds_its_memory_through_views_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = memory.Arena(PAGES * PAGE)
    monkeypatch.setattr(memory, "arena", lambda: arena)
    like = torch.zeros(1, dtype=torch.bfloat16)
    width = memory.MIN_BYTES // 4
    tensor = memory.empty(like, 4, width)
    assert tensor.shape == (4, width)
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous()
    view = tensor.view(-1)[7:9]
    leaf = torch.ones(4, width, dtype=torch.bfloat16, requires_grad=True)
    product = (leaf * tensor.fill_(3)).sum()  # keeps the tensor for its gradient
    del tensor, view
    gc.collect()
    assert len(arena.free_blocks()) == 1
    assert arena.free_blocks()[0][0] > 0
    product.backward()
    assert leaf.grad is not None
    assert (leaf.grad == 3).all()
    del product
    assert arena.free_blocks() == [(0, PAGES * PAGE)]


def test_what_is_small_or_too_large_is_the_c_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = memory.Arena(PAGES * PAGE)
    monkeypatch.setattr(memory, "arena", lambda: arena)
    like = torch.zeros(1)
    for count in (0, 5, PAGES * PAGE):
        assert memory.empty(like, count).shape == (count,)
        assert arena.free_blocks() == [(0, PAGES * PAGE)]
    monkeypatch.setattr(memory, "arena", lambda: None)  # no address space was to be had
    assert memory.empty(like, memory.MIN_BYTES).shape == (memory.MIN_BYTES,)


def test_releasing_leaves_what_is_held() -> None:
    arena = memory.Arena(PAGES * PAGE)
    first, second = arena.allocate(PAGE), arena.allocate(PAGE)
    assert first is not None
    assert second is not None
    first[:], second[:] = b"a" * PAGE, b"b" * PAGE
    del first
    arena.release_unused()
    assert set(second) == {ord("b")}
    again = arena.allocate(PAGE)
    assert again is not None
    assert set(again) == {0}  # new from the system


def test_threads_share_it() -> None:
    arena = memory.Arena(1024 * PAGE)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for size in range(300):
            part = arena.allocate(1 + size % 5 * PAGE)
            if part is not None:
                part[:] = bytes([mark]) * len(part)
                if set(part) != {mark}:
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert arena.free_blocks() == [(0, 1024 * PAGE)]
