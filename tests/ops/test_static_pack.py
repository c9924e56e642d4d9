"""A pack of round sizes is the pack: same attention, same gradients, and it can be filled again and again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from varlen_stand_in import packed_attention_as_on_cuda

from llm_adapters.ops import backends
from llm_adapters.ops.cross_entropy import IGNORE_INDEX
from llm_adapters.ops.packing import Pack
from llm_adapters.ops.static_pack import StaticPack, StaticSizes
from llm_adapters.ops.varlen_attention import varlen_attention


@pytest.fixture(autouse=True)
def functions() -> None:
    """The attention is chosen here."""


def pack_of(lengths: tuple[int, ...], prefix: int) -> Pack:
    return Pack.of([[*range(100, 100 + prefix), *range(n)] for n in lengths], prefix)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_is_that_of_the_pack(kv_heads: int, prefix: int, window: int | None, monkeypatch) -> None:
    packs = [pack_of(lengths, prefix) for lengths in ((40, 3, 90, 17), (100, 40), (60, 60, 1, 20, 5))]
    sizes = [StaticSizes.of(pack, 1) for pack in packs]
    static = StaticPack(sizes[0])
    assert sizes[0] == sizes[1] == sizes[2]
    generator = torch.Generator().manual_seed(0)
    for pack in packs:
        static.fill(pack)
        shapes = [(heads, static.tokens, 8) for heads in (4, kv_heads, kv_heads)]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        direction = torch.randn((pack.end, 4, 8), generator=generator, dtype=torch.float64)
        found = [t.clone().requires_grad_() for t in drawn]
        with packed_attention_as_on_cuda():
            out = varlen_attention(*found, static, 0.3, window)[: pack.end]
            out.backward(direction)
        exact = [t[:, : pack.tokens].clone().requires_grad_() for t in drawn]
        monkeypatch.setattr(backends, "disabled", True)
        expected = varlen_attention(*exact, pack, 0.3, window)[: pack.end]
        expected.backward(direction)
        torch.testing.assert_close(out, expected)
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one.grad[:, : pack.end], other.grad[:, : pack.end])
            assert not one.grad[:, pack.end :].any()  # finite, too: nobody reads the padding


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.integers(0, 40),
    st.integers(0, 4000),
)
def test_every_pack_fits_its_sizes(lengths: list[int], prefix: int, labels: int) -> None:
    pack = pack_of(tuple(lengths), prefix)
    sizes = StaticSizes.of(pack, labels)
    static = StaticPack(sizes)
    static.fill(pack)
    index = static.varlen
    queries, keys = index.cu_seqlens_q.diff(), index.cu_seqlens_k.diff()
    assert (queries >= 0).all()
    assert (keys >= queries).all()
    assert not keys[queries == 0].any()  # gradients of keys that nobody sees are not promised
    assert int(index.cu_seqlens_q[-1]) == sizes.tokens > pack.end
    assert int(index.cu_seqlens_k[-1]) == sizes.keys == len(index.key_index)
    assert int(queries.max()) <= sizes.max_seqlen_q
    assert int(keys.max()) <= sizes.max_seqlen_k
    assert labels <= sizes.labels
    assert static.shares_prefix == pack.shares_prefix
    waste = sizes.tokens - pack.end
    assert waste <= max(128, pack.end / 8)
    places, targets = torch.zeros(2, sizes.labels, dtype=torch.int64)
    static.fill_labels(
        (places, targets), torch.arange(labels) % pack.end, torch.ones(labels, dtype=torch.int64), pack.end
    )
    assert int((targets == IGNORE_INDEX).sum()) == sizes.labels - labels
    assert (places[labels:] >= pack.end).all()
    assert (places < sizes.tokens).all()


def test_ordinary_steps_have_few_sizes() -> None:
    """Steps of 16 examples of 48 to 256 tokens, half of them labels."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(400):
        lengths = (172 + 45 * torch.randn(16, generator=generator)).clamp(48, 256).long().tolist()
        pack = pack_of(tuple(n - 24 for n in lengths), 24)
        seen.add(StaticSizes.of(pack, sum(n // 2 for n in lengths)))
    assert len(seen) <= 16


def test_what_is_only_on_the_host_is_refused() -> None:
    static = StaticPack(StaticSizes.of(pack_of((3, 4), 2), 1))
    for name in ("prefix", "lengths", "buckets", "cu_seqlens"):
        with pytest.raises(AttributeError, match=rf"round sizes has no {name}"):
            getattr(static, name)
