from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.acceleration.packing import Pack, rounded


def test_fillers_stand_last_and_are_no_segment() -> None:
    pack = Pack.of([[7, 8, 1, 2, 3], [7, 8, 4]], prefix=2)
    assert (pack.end, pack.tokens, pack.lengths) == (6, 8, (3, 1))
    assert pack.input_ids.tolist() == [[7, 8, 1, 2, 3, 4, 0, 0]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 0]]
    assert all(int(band.places(heads=1, groups=1, before=True).max()) < pack.end for band in pack.bands)


@given(st.integers(1, 5000), st.sampled_from([16, 32]))
def test_sizes_are_few_and_never_too_small(count: int, step: int) -> None:
    size = rounded(count, step)
    assert count <= size < count + max(step, count)
    assert size % step == 0 or (size < step and size & (size - 1) == 0)
    assert rounded(size, step) == size
