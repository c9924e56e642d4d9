import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.ops.packing import Pack, make_packs


def test_padding_is_last_and_is_no_segment() -> None:
    pack = Pack.of([[7, 8, 1, 2, 3], [7, 8, 4]], prefix=2)
    assert (pack.end, pack.tokens, pack.lengths) == (6, 8, (3, 1))
    assert pack.input_ids.tolist() == [[7, 8, 1, 2, 3, 4, 0, 0]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 0]]
    index = [bucket.gather_index(heads=1, groups=1, with_prefix=True) for bucket in pack.buckets]
    assert all(int(rows.max()) < pack.end for rows in index)


def test_the_places_of_segments() -> None:
    """As variable-length kernels take them: the prefix is the first, and empty where there is none."""
    pack = Pack.of([[7, 8, 1, 2, 3], [7, 8, 4]], prefix=2)
    assert pack.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert (pack.starts, pack.max_seqlen, pack.cu_seqlens.dtype) == ([2, 5], 3, torch.int32)
    assert Pack.of([[1, 2], [3]]).cu_seqlens.tolist() == [0, 0, 2, 3]
    assert pack.cu_seqlens is pack.cu_seqlens  # made once


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(0, 9))
def test_buckets_are_all_segments_in_their_order(lengths: list[int], prefix: int) -> None:
    """And within one no segment is padded to more than half as long again, but for short ones and rounding."""
    pack = Pack.of([[1] * (prefix + length) for length in lengths], prefix)
    assert [length for bucket in pack.buckets for length in bucket.lengths] == lengths
    starts = [start for bucket in pack.buckets for start in (bucket.start, bucket.end)]
    assert starts == sorted(starts)
    assert (starts[0], starts[-1]) == (prefix, pack.end)
    for bucket in pack.buckets:
        assert max(bucket.lengths) <= max(32, 1.5 * min(bucket.lengths))
        assert max(bucket.lengths) <= bucket.padded_length


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(0, 4), st.integers(1, 3), st.integers(1, 2))
def test_scatter_undoes_gather(lengths: list[int], prefix: int, heads: int, groups: int) -> None:
    pack = Pack.of([[1] * (prefix + length) for length in lengths], prefix)
    for bucket in pack.buckets:
        rows = torch.arange(bucket.start * heads * groups, bucket.end * heads * groups)
        for with_prefix in (False, True):
            gathered = bucket.gather_index(heads, groups, with_prefix)
            assert torch.equal(gathered[bucket.scatter_index(heads * groups, with_prefix)], rows)
        assert int((~bucket.padding(heads * groups)).sum()) == len(rows)


@given(st.lists(st.integers(3, 50), min_size=1, max_size=30), st.integers(0, 2), st.integers(10, 200))
def test_packs_hold_every_sequence_once_within_the_limit(lengths: list[int], prefix: int, max_tokens: int) -> None:
    packs = make_packs(lengths, prefix, max_tokens, max_sequences=7)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) <= 7
        assert len(pack) == 1 or prefix + sum(lengths[index] - prefix for index in pack) <= max_tokens
