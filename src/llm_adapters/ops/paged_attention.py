"""Attention of one forward of generation: decoded tokens over the cache's blocks, prompts over prefix and themselves.

With kernels (CPU), each sequence reads its blocks once, and nothing but the result is written. The plain torch way runs
on any device: two batched products over all blocks in use, where they are, whatever the lengths; the shared prefix is
one product for all rows of an adapter.
"""

import functools

import torch
from torch import nn

from llm_adapters.ops import padded_attention
from llm_adapters.ops.backends import function
from llm_adapters.ops.kv_cache import BLOCK_SIZE, BLOCK_STEP, NULL_BLOCK, DecodeBatch, ForwardBatch, PagedCache, store
from llm_adapters.ops.packing import LengthBucket, additive
from llm_adapters.ops.padded_attention import Scores
from llm_adapters.ops.sizes import padded_size


def cached_attention(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: ForwardBatch,
    scale: float,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of a forward's row, whose keys and values are stored in the batch's cache.

    Args:
        layer: the number of the layer.
        query: (heads, tokens, head_dim).
        key: (key-value heads, tokens, head_dim).
        value: (key-value heads, tokens, head_dim).
        batch: the row.
        scale: see `Scores`.
        window: see `Scores`.
        alibi_slopes: see `Scores`.
        softcap: see `Scores`.

    Returns:
        (tokens, heads, head_dim).
    """
    scores = Scores(scale, window, alibi_slopes, softcap)
    num_heads, tokens, _ = query.shape
    out = query.new_empty(tokens, num_heads, value.shape[-1])
    prefix = batch.cache.prefix_of(layer, batch.adapter)  # before `store`, which may add to it
    store(layer, key, value, batch)
    start = 0
    for decode in batch.decodes:
        rows = slice(start, start + decode.positions.numel())
        out[rows] = decode_attention(layer, query[:, rows], batch.cache, decode, scores)
        start = rows.stop
    if batch.prefills is not None:
        query, key, value = (part[:, start:] for part in (query, key, value))
        if prefix is not None:
            key, value = (torch.cat(pair, 1) for pair in zip(prefix, (key, value), strict=True))
        _prefill_attention(query, key, value, batch, scores, out[start:])
    return out


def _prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: ForwardBatch,
    scores: Scores,
    out: torch.Tensor,
) -> None:
    """The prompts of a batch; `key` and `value` begin with the shared prefix; `out` is (tokens, heads, head_dim)."""
    pack = batch.prefills
    assert pack is not None
    (num_heads, _, head_dim), num_kv_heads = query.shape, len(key)
    flat = (query.transpose(0, 1) * scores.scale).reshape(-1, head_dim)
    for number, bucket in enumerate(pack.buckets):
        make = functools.partial(_query_index, bucket, num_heads, num_kv_heads)
        index = batch.cached(("queries", number, num_heads, num_kv_heads), make)
        queries = flat.index_select(0, index).view(len(bucket.lengths) * num_kv_heads, -1, head_dim)
        keys, values = (padded_attention.with_prefix(part, bucket) for part in (key, value))
        found, _ = padded_attention.attend(queries, keys, values, bucket.causal_mask(scores.window), scores)
        padded_attention.scatter(found, bucket, out[bucket.start - pack.prefix : bucket.end - pack.prefix])
    out[pack.end - pack.prefix :] = 0


def _query_index(bucket: LengthBucket, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """Places of the queries of `bucket` in a row that begins after the shared prefix."""
    return bucket.gather_index(num_heads // num_kv_heads, num_kv_heads, with_prefix=False) - bucket.prefix * num_heads


def decode_attention(
    layer: int, query: torch.Tensor, cache: PagedCache, batch: DecodeBatch, scores: Scores
) -> torch.Tensor:
    """Attention of tokens over what their sequences hold, themselves included.

    Args:
        layer: the number of the layer.
        query: (heads, tokens, head_dim).
        cache: where their keys and values are stored already.
        batch: the tokens.
        scores: the family's.

    Returns:
        (tokens, heads, head_dim).
    """
    keys, values = cache.layers[layer]
    if kernel := function("paged_attention", query, keys, values):
        places = batch.adapter_ids, cache.block_table, batch.seq_ids, batch.positions
        return kernel(query.transpose(0, 1), keys, values, cache.prefixes_of(layer), *places, *scores)
    return _decode_reference(layer, query, cache, batch, scores)


def _decode_reference(
    layer: int, query: torch.Tensor, cache: PagedCache, batch: DecodeBatch, scores: Scores
) -> torch.Tensor:
    """`decode_attention` in plain torch. It waits for no device, and loops over nothing but adapters.

    Every block is multiplied with the queries of its owner; the products are laid out by sequence for the softmax, and
    the probabilities go back to the blocks. A row after the last sequence takes what belongs to nobody.
    """
    count, num_query_tokens = batch.positions.shape
    num_heads, _, head_dim = query.shape
    chosen, owner, index, max_blocks = _visible_blocks(batch, cache)
    keys, values = (
        part[: cache.num_used_blocks] if chosen is None else part.index_select(0, chosen)
        for part in cache.layers[layer]
    )
    num_kv_heads, value_dim, num_owned = keys.shape[1], values.shape[-1], len(owner)
    prefix, columns = cache.prefix, max_blocks * BLOCK_SIZE
    # (sequences, heads * query tokens * head_dim): heads before tokens, so that the query heads of a key-value head,
    # with all their tokens, are the rows of one product.
    queries = (query.unflatten(1, (count, num_query_tokens)).transpose(0, 1) * scores.scale).reshape(count, -1)
    bias = _attn_bias(batch, cache, scores, query.dtype)
    # Columns: the sequence's own tokens, block by block, then the shared prefix. Zeros, as a shorter sequence does not
    # have all the blocks; the bias hides them.
    products = queries.new_zeros(count + 1, num_heads * num_query_tokens, bias.shape[-1])
    by_block = products[:, :, :columns].unflatten(-1, (max_blocks, BLOCK_SIZE))

    # Scores of the blocks. A block of nobody takes the last sequence's queries: its results go to the row after it.
    kept_owner = batch.cached("kept_owner", lambda: owner.clamp(max=count - 1))
    block_queries = queries.index_select(0, kept_owner).view(num_owned * num_kv_heads, -1, head_dim)
    of_blocks = torch.bmm(block_queries, keys.flatten(0, 1).transpose(1, 2))
    by_block[owner, :, index] = of_blocks.view(num_owned, -1, BLOCK_SIZE)
    # Scores of the prefix: for each adapter one product with the rows of all its sequences,
    # (key-value heads, sequences * heads of each * query tokens, head_dim).
    prefixes = [(rows, pair) for adapter, rows in _by_adapter(batch) if (pair := cache.prefix_of(layer, adapter))]
    for rows, (prefix_keys, _) in prefixes:
        shared = queries[rows].view(len(rows), num_kv_heads, -1, head_dim).transpose(0, 1)
        found = torch.bmm(shared.reshape(num_kv_heads, -1, head_dim), prefix_keys.transpose(1, 2))
        products[rows, :, columns:] = found.view(num_kv_heads, len(rows), -1, prefix).transpose(0, 1).flatten(1, 2)
    if scores.softcap is not None:
        products.div_(scores.softcap).tanh_().mul_(scores.softcap)
    products.unflatten(1, (num_heads, num_query_tokens)).add_(bias)
    probabilities = torch.softmax(products, -1)

    # Values of the blocks, and their sum over the blocks of each sequence: through a table, as sums that are added by
    # index come in any order on a GPU.
    block_probs = probabilities[:, :, :columns].unflatten(-1, (max_blocks, BLOCK_SIZE))[owner, :, index]
    parts = torch.bmm(block_probs.reshape(num_owned * num_kv_heads, -1, BLOCK_SIZE), values.flatten(0, 1))
    by_seq = parts.new_zeros(count + 1, max_blocks, num_heads * num_query_tokens * value_dim)
    by_seq[owner, index] = parts.view(num_owned, -1)
    out = by_seq[:count].sum(1).view(count, num_kv_heads, -1, value_dim)
    for rows, (_, prefix_values) in prefixes:
        prefix_probs = probabilities[rows, :, columns:].unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
        found = torch.bmm(prefix_probs.reshape(num_kv_heads, -1, prefix), prefix_values)
        out[rows] += found.view(num_kv_heads, len(rows), -1, value_dim).transpose(0, 1)
    by_token = out.reshape(count, num_heads, num_query_tokens, value_dim).transpose(1, 2)
    return by_token.reshape(-1, num_heads, value_dim)


def _visible_blocks(
    batch: DecodeBatch, cache: PagedCache
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int]:
    """The blocks that a batch reads.

    Returns:
        Their numbers, None for all below `num_used_blocks`, where most of them are of this batch; for each of them the
        row of its sequence in the batch (the row after the last for those that nobody here sees), and its place among
        the blocks of that; and the most blocks of a sequence.
    """

    def make() -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int]:
        count, device = len(batch.seqs), batch.positions.device
        held = [cache.blocks_of(seq) for seq in batch.seqs if seq >= 0]
        row_of = batch.seq_ids.new_full((len(cache.block_table) + 1,), count)
        row_of[batch.seq_ids] = torch.arange(count, device=device)
        row_of[-1] = count  # padding is no sequence, and a free block nobody's
        owner, index = row_of[cache.block_owner[: cache.num_used_blocks]], cache.block_index[: cache.num_used_blocks]
        chosen, size = None, sum(map(len, held))
        if 2 * size < cache.num_used_blocks:
            padding = [NULL_BLOCK] * (padded_size(size, BLOCK_STEP) - size)
            chosen = torch.tensor(sorted(block for blocks in held for block in blocks) + padding, device=device)
            owner, index = owner[chosen], index[chosen]
        return chosen, owner, torch.where(owner < count, index, 0), max(map(len, held), default=1)

    return batch.cached("visible_blocks", make)


def _by_adapter(batch: DecodeBatch) -> list[tuple[int, torch.Tensor]]:
    """The numbers of the adapters, and the rows that are theirs."""

    def make() -> list[tuple[int, torch.Tensor]]:
        rows: dict[int, list[int]] = {}
        for row, adapter in enumerate(batch.adapters):
            rows.setdefault(adapter, []).append(row)
        return [(adapter, torch.tensor(rows[adapter], device=batch.positions.device)) for adapter in sorted(rows)]

    return batch.cached("by_adapter", make)


def _attn_bias(batch: DecodeBatch, cache: PagedCache, scores: Scores, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask, (sequences + 1, 1, query tokens, columns), 0 where a token may look; the last row is nobody's.

    The columns are those of the sequence's blocks in their order, and then of the shared prefix. With a linear bias in
    it, it has a second dimension of all heads.
    """
    _, window, slopes, _ = scores

    def make() -> torch.Tensor:
        prefix, own = cache.prefix, _visible_blocks(batch, cache)[3] * BLOCK_SIZE
        columns = torch.arange(own + prefix, device=batch.positions.device)
        distance = batch.positions[..., None] - torch.where(columns < own, prefix + columns, columns - own)
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        visible[..., 0] |= ~batch.valid  # a token that is dropped sees something, so that its softmax is a number
        mask = additive(torch.cat((visible, visible.new_ones(1, *visible.shape[1:]))), dtype)[:, None]
        if slopes is None:
            return mask
        distance = nn.functional.pad(distance, (0, 0, 0, 0, 0, 1))[:, None]  # nobody's row, too
        return mask - (slopes[:, None, None] * distance).to(dtype)

    return batch.cached(("attn_bias", window, slopes, dtype), make)
