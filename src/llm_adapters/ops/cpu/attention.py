"""Functions of csrc/varlen_attention.c and csrc/paged_attention.c."""

import torch

from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.cpu.gemm import has_fast_linear
from llm_adapters.ops.cpu.prototypes import check_shape, library_for

_UNIT = 32  # head sizes are multiples


def supports_varlen_attention(query: torch.Tensor, value: torch.Tensor) -> bool:
    """True for head sizes that products take, the same for keys and values."""
    return has_fast_linear(query) and query.shape[-1] == value.shape[-1] and query.shape[-1] % _UNIT == 0


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    prefix: int,
    max_seqlen: int,
    scale: float,
    window: int | None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each segment of a pack over the shared prefix and itself.

    Args:
        query: (tokens, num_heads, head_dim), the head size a multiple of 32.
        key: (tokens, num_kv_heads, head_dim); `value` likewise.
        value: see `key`.
        cu_seqlens: (segments + 1,), int32: where segments begin and end, the first of them the prefix.
        prefix: tokens of the shared prefix.
        max_seqlen: tokens of the longest segment that is not the prefix.
        scale: see `padded_attention.Scores`, of which the last four arguments are.
        window: see `scale`.
        alibi_slopes: see `scale`.
        softcap: see `scale`.

    Returns:
        (tokens, num_heads, head_dim), not written beyond the last segment; and the logarithm of each row's sum of
        exponentials, (tokens, num_heads), float32.
    """
    sizes = _attention_sizes(query, key, value, cu_seqlens, prefix, alibi_slopes)
    out, lse = empty(query, *query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
    space = _workspace(query, prefix, max_seqlen, backward=False)
    parts = query, key, value, cu_seqlens, out, lse, alibi_slopes
    library_for(query).call("varlen_attention", *parts, *space, *sizes, window or 0, scale, softcap or 0.0)
    return out, lse


def varlen_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lse: torch.Tensor,
    prefix: int,
    max_seqlen: int,
    scale: float,
    window: int | None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, with their shapes; `grad` has that of the result."""
    sizes = _attention_sizes(query, key, value, cu_seqlens, prefix, alibi_slopes)
    check_shape("the gradient", grad, query.shape)
    check_shape("the rows' lse", lse, query.shape[:2])
    (tokens, num_heads, head_dim), num_kv_heads, segments = query.shape, key.shape[1], len(cu_seqlens) - 1
    d_query, d_key, d_value = (empty(query, tokens, num_heads, head_dim) for _ in range(3))
    of_prefix = [empty(query, segments, prefix, num_heads, head_dim) for _ in range(2)]
    end = int(cu_seqlens[-1])
    for part in (d_query, d_key, d_value):
        part[end:] = 0
    for part in of_prefix:
        part[0] = 0  # the prefix itself sees no other prefix
    space = _workspace(query, prefix, max_seqlen, backward=True)
    parts = grad.contiguous(), query, key, value, cu_seqlens, lse, d_query, d_key, d_value, *of_prefix, alibi_slopes
    library_for(query).call("varlen_attention_backward", *parts, *space, *sizes, window or 0, scale, softcap or 0.0)
    for part, shared in zip((d_key, d_value), of_prefix, strict=True):
        part[:prefix] += shared.sum(0)
    d_key, d_value = (part.view(tokens, num_kv_heads, -1, head_dim).sum(2) for part in (d_key, d_value))
    return d_query, d_key, d_value


def _attention_sizes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    prefix: int,
    alibi_slopes: torch.Tensor | None,
) -> tuple[int, ...]:
    (tokens, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    if num_heads % num_kv_heads or head_dim % _UNIT:
        raise ValueError(f"{num_heads} heads of {head_dim} entries over {num_kv_heads} heads of keys and values")
    check_shape("the keys", key, (tokens, num_kv_heads, head_dim))
    check_shape("the values", value, (tokens, num_kv_heads, head_dim))
    check_shape("the slopes", alibi_slopes, (num_heads,))
    if int(cu_seqlens[-1]) > tokens or int(cu_seqlens[1]) != prefix:
        raise ValueError(f"segments that end at {int(cu_seqlens[-1])} and a prefix of {prefix}, in {tokens} tokens")
    return len(cu_seqlens) - 1, prefix, num_heads, num_kv_heads, head_dim


def _workspace(query: torch.Tensor, prefix: int, max_seqlen: int, backward: bool) -> tuple[torch.Tensor, int, int]:
    """Memory for all threads to work in, the bytes that each has of it, and their number."""
    sizes = ((max_seqlen, prefix), (prefix, 0))  # the largest segment, and the prefix itself
    measure = library_for(query).call
    each = max(measure("varlen_attention_workspace", *size, query.shape[-1], backward) for size in sizes)
    threads = torch.get_num_threads()
    return empty(torch.empty(0, dtype=torch.uint8), threads * each), each, threads


def store_kv(part: torch.Tensor, cache: torch.Tensor, pages: torch.Tensor, columns: torch.Tensor) -> None:
    """Put the keys (or values) of tokens in their pages.

    Args:
        part: (tokens, num_kv_heads, head_dim).
        cache: (num_pages, num_kv_heads, page_size, head_dim), which is written to.
        pages: (tokens,), int64: the page of each token.
        columns: (tokens,), int64: its place in the page.
    """
    (tokens, num_kv_heads, head_dim), page_size = part.shape, cache.shape[2]
    check_shape("the cache", cache, (len(cache), num_kv_heads, page_size, head_dim))
    check_shape("the tokens' pages", pages, (tokens,))
    check_shape("the tokens' columns", columns, (tokens,))
    sizes = page_size, tokens, num_kv_heads, head_dim
    library_for(part).call("store_kv", part.contiguous(), cache, pages, columns, *sizes)


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix_kv: tuple[torch.Tensor, torch.Tensor] | None,
    adapter_ids: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of the new tokens of some sequences over what these have in the cache, themselves included.

    Args:
        query: (num_seqs * num_query_tokens, num_heads, head_dim).
        keys: (num_pages, num_kv_heads, page_size, head_dim); `values` likewise.
        values: see `keys`.
        prefix_kv: keys and values of the shared prefix by each adapter, (num_adapters, num_kv_heads, prefix, head_dim);
            None without one.
        adapter_ids: (num_seqs,), int64.
        block_table: (num_slots, max_blocks), int64: the pages of each slot in their order.
        slots: (num_seqs,), int64: the slot of each sequence, -1 for padding.
        positions: (num_seqs, num_query_tokens), int64.
        scale: see `padded_attention.Scores`, of which the last four arguments are.
        window: see `scale`.
        alibi_slopes: see `scale`.
        softcap: see `scale`.

    Returns:
        The shape of `query`.
    """
    num_seqs, num_query_tokens = positions.shape
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, page_size = keys.shape[1:3]
    check_shape("the queries", query, (num_seqs * num_query_tokens, num_heads, head_dim))
    for part in (keys, values):
        check_shape("the cache", part, (len(keys), num_kv_heads, page_size, head_dim))
    prefix_keys, prefix_values = prefix_kv or (None, None)
    prefix = 0 if prefix_keys is None else prefix_keys.shape[2]
    for part in prefix_kv or ():
        check_shape("the prefix", part, (len(part), num_kv_heads, prefix, head_dim))
    for part in (adapter_ids, slots):
        check_shape("adapters or slots", part, (num_seqs,))
    check_shape("the slopes", alibi_slopes, (num_heads,))
    query = query.contiguous()
    out = torch.empty_like(query)
    parts = (
        query,
        keys,
        values,
        prefix_keys,
        prefix_values,
        adapter_ids,
        block_table,
        slots,
        positions.contiguous(),
        out,
        alibi_slopes,
    )
    sizes = num_seqs, num_query_tokens, num_heads, num_kv_heads, head_dim, page_size, prefix, block_table.shape[1]
    library_for(query).call("paged_attention", *parts, *sizes, window or 0, scale, softcap or 0.0)
    return out
