from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.ops.packing import Pack, rounded


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


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(0, 9))
def test_bands_are_all_segments_in_their_order(lengths: list[int], prefix: int) -> None:
    """And within one no segment is padded to more than half as long again, but for short ones and rounding."""
    pack = Pack.of([[1] * (prefix + length) for length in lengths], prefix)
    assert [length for band in pack.bands for length in band.lengths] == lengths
    starts = [start for band in pack.bands for start in (band.start, band.end)]
    assert starts == sorted(starts)
    assert (starts[0], starts[-1]) == (prefix, pack.end)
    for band in pack.bands:
        assert max(band.lengths) <= max(32, 1.5 * min(band.lengths))
        assert max(band.lengths) <= band.longest
