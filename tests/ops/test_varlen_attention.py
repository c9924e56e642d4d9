import pytest
import torch
from op_helpers import assert_close, with_gradients
from torch.nn import functional

from llm_adapters.ops import padded_attention
from llm_adapters.ops.packing import Pack
from llm_adapters.ops.varlen_attention import varlen_attention

# Segments shorter and longer than the rows that are kept at once, more heads than keys and as many, no prefix, and
# head sizes that the backend has and has not.
PACKS = [
    ((3, 1, 17), 0, 2, 1, 32),
    ((50, 14, 28), 21, 6, 2, 64),
    ((300, 231), 45, 3, 3, 64),
    ((33,), 64, 3, 1, 96),
    ((11, 4, 1), 3, 6, 2, 8),
]


# The window, a linear bias, the cap: one after the other, and all at once.
SCORES = [
    (None, False, None),
    (3, False, None),
    (40, False, None),
    (None, True, None),
    (None, False, 1.5),
    (40, True, 4.0),
]


def slopes_of(num_heads: int, alibi: bool) -> torch.Tensor | None:
    """ALiBi's slopes: a geometric sequence, whose numbers half precision does not hold exactly."""
    return 0.71 ** torch.arange(1, num_heads + 1).float() if alibi else None


def pack_of(lengths: tuple, prefix: int) -> Pack:
    return Pack.of([[1] * prefix + [2] * length for length in lengths], prefix)


def formula(pack: Pack, num_heads: int, window: int | None, alibi: bool = False, softcap: float | None = None):
    """Attention of every token over the shared prefix and its own segment, in one softmax for the whole pack."""
    owners = [-1] * pack.prefix + [number for number, length in enumerate(pack.lengths) for _ in range(length)]
    positions, owner = pack.position_ids[0, : pack.end], torch.tensor(owners)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < (window or 10**9)) & ((owner[:, None] == owner) | (owner == -1))

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (part.repeat_interleave(num_heads // part.shape[1], 1) for part in (key, value))
        scores = torch.einsum("qhw,khw->hqk", query[: pack.end], key[: pack.end]) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi:
            scores = scores - slopes_of(num_heads, alibi).double()[:, None, None] * distance
        probs = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        out = torch.einsum("hqk,khw->qhw", probs, value[: pack.end])
        return functional.pad(out, (0, 0, 0, 0, 0, pack.tokens - pack.end))

    return attention


@pytest.mark.parametrize("block", [512, 32])
@pytest.mark.parametrize(("window", "alibi", "softcap"), SCORES)
@pytest.mark.parametrize(("lengths", "prefix", "num_heads", "num_kv_heads", "head_dim"), PACKS)
def test_it_is_the_formula(
    dtype: torch.dtype,
    lengths: tuple,
    prefix: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    alibi: bool,
    softcap: float | None,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its gradients; the reference in blocks of rows, too."""
    monkeypatch.setattr(padded_attention, "BLOCK", block)
    pack = pack_of(lengths, prefix)
    parts = [torch.randn(pack.tokens, count, head_dim).to(dtype) for count in (num_heads, num_kv_heads, num_kv_heads)]
    more = {"alibi_slopes": slopes_of(num_heads, alibi), "softcap": softcap}
    mine = lambda *rows: varlen_attention(*(r.transpose(0, 1) for r in rows), pack, 0.3, window, **more)  # noqa: E731
    expected = with_gradients(formula(pack, num_heads, window, alibi, softcap), *(part.double() for part in parts))
    for found, exact in zip(with_gradients(mine, *parts), expected, strict=True):
        assert_close(found, exact, 3)


@pytest.mark.parametrize(("window", "alibi", "softcap"), SCORES)
def test_next_to_no_dropout_is_none(window: int | None, alibi: bool, softcap: float | None) -> None:
    pack = pack_of((20, 9), 5)
    parts = [torch.randn(pack.tokens, 2, 32) for _ in range(3)]
    more = {"alibi_slopes": slopes_of(2, alibi), "softcap": softcap}
    mine = lambda *rows: varlen_attention(*(r.transpose(0, 1) for r in rows), pack, 0.3, window, 1e-12, **more)  # noqa: E731
    expected = with_gradients(formula(pack, 2, window, alibi, softcap), *(part.double() for part in parts))
    for found, exact in zip(with_gradients(mine, *parts), expected, strict=True):
        assert_close(found, exact, 3)


def test_values_of_another_size(dtype: torch.dtype) -> None:
    pack = pack_of((20, 9), 5)
    parts = [torch.randn(pack.tokens, 2, width).to(dtype) for width in (32, 32, 16)]
    found = varlen_attention(*(part.transpose(0, 1) for part in parts), pack, 0.3)
    assert_close(found, formula(pack, 2, None)(*(part.double() for part in parts)), 3)


def test_dropout_is_noise_around_the_same_result() -> None:
    torch.manual_seed(0)
    pack = pack_of((20, 9), 5)
    parts = [torch.randn(2, pack.tokens, 32) for _ in range(3)]
    exact = varlen_attention(*parts, pack, 0.3)
    draws = torch.stack([varlen_attention(*parts, pack, 0.3, dropout=0.2) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - exact).abs().mean() < 0.1 * draws.std(0).mean()
    assert not draws[:, pack.end :].any()


def test_the_number_of_threads_changes_nothing() -> None:
    """The workspace is each thread's own."""
    torch.manual_seed(0)
    pack = pack_of((300, 50, 14, 28), 21)
    parts = [torch.randn(pack.tokens, count, 64).bfloat16() for count in (6, 2, 2)]
    mine = lambda *rows: varlen_attention(*(r.transpose(0, 1) for r in rows), pack, 0.3)  # noqa: E731
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(mine, *parts))
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_tensors_of_another_pack_are_refused(dtype: torch.dtype) -> None:
    parts = [torch.randn(2, 64, 32).to(dtype) for _ in range(3)]
    with pytest.raises(ValueError, match="64 tokens of a pack of 32"):
        varlen_attention(*parts, pack_of((20, 9), 3), 0.3)
