import pytest
import torch
from op_helpers import assert_close

from llm_adapters.ops.kv_cache import DecodeBatch, ForwardBatch, PagedCache, store
from llm_adapters.ops.padded_attention import Scores
from llm_adapters.ops.paged_attention import decode_attention

SLOPES = 0.71 ** torch.arange(1, 7).float()


@pytest.mark.parametrize(
    "scores", [Scores(0.3), Scores(0.3, 5), Scores(0.3, 5, SLOPES), Scores(0.3, None, SLOPES, 2.0)]
)
@pytest.mark.parametrize("query_tokens", [1, 3])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("head_dim", [8, 64, 96])
def test_attention_of_decoded_tokens(
    dtype: torch.dtype,
    head_dim: int,
    prefix: int,
    query_tokens: int,
    scores: Scores,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the formula: every token over what its sequence has been given, in order."""
    monkeypatch.setattr("llm_adapters.ops.kv_cache.BLOCK_SIZE", 4)
    monkeypatch.setattr("llm_adapters.ops.paged_attention.BLOCK_SIZE", 4)
    kv_heads, group, sizes = 2, 3, [3, 9, 13]
    keys, values = ([torch.randn(kv_heads, size, head_dim).to(dtype) for size in sizes] for _ in range(2))
    shared = [[torch.randn(kv_heads, prefix, head_dim).to(dtype) for _ in range(2)] for _ in range(2)]  # two adapters
    seqs, adapters = (4, 0, 2, -1), (1, 0, 1, 0)
    cache = PagedCache(5, 16, torch.device("cpu"))
    for adapter, pair in enumerate(shared if prefix else ()):
        cache.keep_prefix(0, *pair, adapter)
    for seq, size, *rows in zip(seqs, sizes, keys, values, strict=False):
        cache.reserve(seq, size)
        positions = prefix + torch.arange(size)[None]
        store(0, *rows, ForwardBatch(cache, [DecodeBatch((seq,), positions, positions >= 0, (0,))]))
    last = [[max(size - query_tokens + i, 0) for i in range(query_tokens)] for size in [*sizes, 1]]
    positions = prefix + torch.tensor(last)
    query = torch.randn(kv_heads * group, 4 * query_tokens, head_dim).to(dtype)
    valid = (torch.tensor(seqs) >= 0)[:, None].expand_as(positions)
    batch = DecodeBatch(seqs, positions, valid, adapters)
    found = decode_attention(0, query, cache, batch, scores).view(4, query_tokens, kv_heads, group, head_dim)
    for row, size in enumerate(sizes):
        before = shared[adapters[row]]
        key, value = (torch.cat((s, part[row]), 1).double() for s, part in zip(before, (keys, values), strict=True))
        own = query.view(kv_heads, group, 4, query_tokens, head_dim)[:, :, row].double()
        products = torch.einsum("gebw,gtw->gebt", own, key) * 0.3
        distance = positions[row][:, None] - torch.arange(prefix + size)
        hidden = (distance < 0) | (distance >= (scores.window or 10**9))
        if scores.softcap is not None:
            products = scores.softcap * torch.tanh(products / scores.softcap)
        if scores.alibi_slopes is not None:
            products = products - scores.alibi_slopes.double().view(kv_heads, group, 1, 1) * distance
        weights = torch.softmax(products.masked_fill(hidden, -torch.inf), -1)
        assert_close(found[row], torch.einsum("gebt,gtw->bgew", weights, value), 3)
