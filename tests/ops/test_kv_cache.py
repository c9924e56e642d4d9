import pytest
import torch
from op_helpers import assert_close

from llm_adapters.ops.kv_cache import Decoded, PagedCache, Step, decode, store


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("beside", [1, 3])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("width", [8, 64, 96])
def test_attention_of_new_tokens(
    dtype: torch.dtype, width: int, prefix: int, beside: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formula: every token over what its slot has been given, in order."""
    monkeypatch.setattr("llm_adapters.ops.kv_cache.PAGE", 4)
    groups, each, sizes = 2, 3, [3, 9, 13]
    keys, values = ([torch.randn(groups, size, width).to(dtype) for size in sizes] for _ in range(2))
    shared = [[torch.randn(groups, prefix, width).to(dtype) for _ in range(2)] for _ in range(2)]  # of two adapters
    slots, adapters = torch.tensor([4, 0, 2, -1]), torch.tensor([1, 0, 1, 0])
    cache = PagedCache(5, 16, torch.device("cpu"))
    for adapter, pair in enumerate(shared if prefix else ()):
        cache.keep_prefix(0, *pair, adapter)
    for slot, size, *rows in zip(slots.tolist(), sizes, keys, values, strict=False):
        cache.reserve(slot, size)
        at = prefix + torch.arange(size)[None]
        held = Step(cache, [Decoded(torch.tensor([slot]), at, at >= 0, torch.tensor([0]))])
        store(0, *rows, held)
    at = prefix + torch.tensor([[max(size - beside + i, 0) for i in range(beside)] for size in [*sizes, 1]])
    query = torch.randn(groups * each, 4 * beside, width).to(dtype)
    alive = (slots >= 0)[:, None].expand_as(at)
    decoded = Decoded(slots, at, alive, adapters)
    found = decode(0, query, cache, decoded, 0.3, window).view(4, beside, groups, each, width)
    for row, size in enumerate(sizes):
        before = shared[int(adapters[row])]
        key, value = (torch.cat((s, part[row]), 1).double() for s, part in zip(before, (keys, values), strict=True))
        asked = query.view(groups, each, 4, beside, width)[:, :, row].double()
        scores = torch.einsum("gebw,gtw->gebt", asked, key) * 0.3
        distance = at[row][:, None] - torch.arange(prefix + size)
        hidden = (distance < 0) | (distance >= (window or 10**9))
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        assert_close(found[row], torch.einsum("gebt,gtw->bgew", weights, value), 3)
