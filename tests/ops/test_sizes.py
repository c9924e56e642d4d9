from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.ops.sizes import padded_size, round_up


@given(st.integers(1, 5000), st.sampled_from([16, 32]))
def test_padded_sizes_are_few_and_never_too_small(count: int, step: int) -> None:
    size = padded_size(count, step)
    assert count <= size < count + max(step, count)
    assert size % step == 0 or (size < step and size & (size - 1) == 0)
    assert padded_size(size, step) == size


@given(st.integers(0, 5000), st.integers(1, 64))
def test_rounding_up(size: int, step: int) -> None:
    assert round_up(size, step) % step == 0
    assert size <= round_up(size, step) < size + step
