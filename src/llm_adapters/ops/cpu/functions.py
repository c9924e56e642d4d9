"""The CPU backend: one typed function for each C function in csrc.

Each checks shapes, allocates results and workspace, and calls C; precision, device and contiguity are checked by
`prototypes`. Inputs may be views with gaps, which are copied; what is changed in place (a name that ends in `_`) must be
contiguous.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.cpu.prototypes import Library, library
from llm_adapters.ops.dropout import threshold
from llm_adapters.ops.sizes import round_up

if TYPE_CHECKING:
    from llm_adapters.ops.linear import LoraBranch

DROP_NOTHING, DROP_INPUT, DROP_OUTPUT = range(3)  # as in csrc/gemm.c
_UNIT = 32  # sizes that products take are multiples
_MIN_ROWS = 64  # for which it is worth packing a weight
_MAX_IN_FEATURES = 12288  # beyond, a column tile of the weight is in no cache, and too much for a thread's stack


# --- what there is


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """The reason why there are no functions for this precision on this machine; None where there are."""
    found = library(dtype)
    return found if isinstance(found, str) else None


def supports(name: str, *arguments: Any) -> bool:
    """True if the function `name` takes these arguments, which are those of the operator that asks."""
    predicate = _PREDICATES.get(name)
    return predicate is None or predicate(*arguments)


def has_fast_linear(weight: torch.Tensor) -> bool:
    """True if `linear` exists for the precision of `weight`: the processor multiplies pairs of bfloat16."""
    return bool(_library(weight).row_tile)


def _supports_linear(x: torch.Tensor, in_features: int, out_features: int) -> bool:
    sizes_fit = not (in_features % _UNIT or out_features % _UNIT) and in_features <= _MAX_IN_FEATURES
    return has_fast_linear(x) and len(x) >= _MIN_ROWS and sizes_fit


def _supports_linear_lora(x: torch.Tensor, in_features: int, out_features: int, branch: "LoraBranch") -> bool:
    masters = branch.a.dtype == branch.b.dtype == torch.float32
    return masters and _supports_linear(x, in_features, out_features)


def _supports_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Heads within tokens, as projections leave them, and one position for all heads."""
    batch, _, tokens, head_dim = x.shape
    dense = x.transpose(1, 2).is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    return dense and cos.dtype == x.dtype and cos.shape == (batch, 1, tokens, head_dim)


def _supports_varlen_attention(query: torch.Tensor, value: torch.Tensor) -> bool:
    return has_fast_linear(query) and query.shape[-1] == value.shape[-1] and query.shape[-1] % _UNIT == 0


_PREDICATES: dict[str, Callable[..., bool]] = {
    "linear": _supports_linear,
    "grad_weight": _supports_linear,
    "linear_lora": _supports_linear_lora,
    "rotary": _supports_rotary,
    "varlen_attention": _supports_varlen_attention,
    "paged_attention": lambda query, keys, values: values.shape[-1] == query.shape[-1],
}


def _library(x: torch.Tensor) -> Library:
    found = library(x.dtype)
    if isinstance(found, str):
        raise TypeError(f"there are no compiled functions for tensors of {x.dtype}: {found}")
    return found


def _check(what: str, tensor: torch.Tensor | None, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape: C would read or write beyond its end."""
    if tensor is not None and tensor.shape != torch.Size(shape):
        raise ValueError(f"{what} has the shape {tuple(tensor.shape)}, where {tuple(shape)} is needed")


# --- norm, SwiGLU, dropout, rotary positions


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight * x / rms(x)`` over the last dimension.

    Args:
        x: (..., hidden_size).
        weight: (hidden_size,).
        eps: added to the mean square.

    Returns:
        The result, and 1 / rms, (..., 1), float32.
    """
    _check("the norm's weight", weight, x.shape[-1:])
    x, out = x.contiguous(), empty(x, *x.shape)
    inverse_rms = torch.empty(*x.shape[:-1], 1)
    _library(x).call("rms_norm", x, weight, out, inverse_rms, inverse_rms.numel(), x.shape[-1], eps)
    return out, inverse_rms


def rms_norm_backward(
    grad: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> torch.Tensor:
    """The gradient of x from `rms_norm`'s results; `grad` has the shape of the first of them."""
    _check("the gradient", grad, result.shape)
    _check("1 / rms", inverse_rms, (*result.shape[:-1], 1))
    d_x = empty(result, *result.shape)
    parts = grad.contiguous(), result, weight, inverse_rms, d_x
    _library(result).call("rms_norm_backward", *parts, inverse_rms.numel(), result.shape[-1])
    return d_x


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, both of one shape."""
    _check("up", up, gate.shape)
    out = empty(gate, *gate.shape)
    _library(gate).call("swiglu", gate.contiguous(), up.contiguous(), out, out.numel())
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of `gate` and `up`, all of one shape, and `swiglu`'s result again if asked to `recompute` it."""
    _check("up", up, gate.shape)
    _check("the gradient", grad, gate.shape)
    d_gate, d_up = empty(gate, *gate.shape), empty(gate, *gate.shape)
    out = empty(gate, *gate.shape) if recompute else None
    parts = grad.contiguous(), gate.contiguous(), up.contiguous(), d_gate, d_up, out
    _library(gate).call("swiglu_backward", *parts, gate.numel())
    return d_gate, d_up, out


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float, scale: float) -> torch.Tensor:
    """``scale * x`` with the entries set to zero that `seed` drops, each with probability `p`; any shape."""
    x, out = x.contiguous(), empty(x, *x.shape)
    _library(x).call("dropout", x, out, x.numel(), seed, threshold(p), scale)
    return out


def dropout_add_(out: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, p: float) -> None:
    """Add to `out` the entries of `x`, of the same shape, that `seed` does not drop."""
    _check("what is added", x, out.shape)
    _library(x).call("dropout_add", out, x.contiguous(), x.numel(), seed, threshold(p))


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """Rotary positions of the two halves of each head, or with `backward` their gradient.

    Args:
        x: (batch, num_heads, tokens, head_dim), a view of a contiguous (batch, tokens, num_heads, head_dim).
        cos: (batch, 1, tokens, head_dim); `sin` likewise.
        sin: see `cos`.
        backward: compute the gradient of x from that of the result.

    Returns:
        The same shape and memory layout as `x`.
    """
    rows = x.transpose(1, 2)
    batch, tokens, num_heads, head_dim = rows.shape
    for part in (cos, sin):
        _check("cos or sin", part, (batch, 1, tokens, head_dim))
    out = empty(rows, *rows.shape)
    _library(x).call("rotary", rows, cos, sin, out, batch * tokens, num_heads, head_dim, backward)
    return out.transpose(1, 2)


# --- softmax and cross-entropy


def masked_softmax_(
    scores: torch.Tensor, lengths: torch.Tensor, prefix: int, first_row: int, window: int | None
) -> None:
    """Softmax over what each row of padded segments may see, in place.

    Args:
        scores: (segments, num_heads, rows, columns): columns are the shared prefix and the segment's own tokens.
        lengths: (segments,), int64: tokens of each; rows beyond become zeros.
        prefix: tokens of the shared prefix.
        first_row: the place within its segment of the first of the rows.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.
    """
    segments, num_heads, rows, columns = scores.shape
    _check("the segments' lengths", lengths, (segments,))
    if prefix + first_row + rows > columns:
        raise ValueError(f"{rows} rows from {first_row} on see more than {columns} columns with a prefix of {prefix}")
    sizes = segments, num_heads, rows, columns, prefix, first_row, window or 0
    _library(scores).call("masked_softmax", scores, lengths, *sizes)


def softmax_backward_(grad: torch.Tensor, probs: torch.Tensor) -> None:
    """Turn the gradient of a softmax's results `probs`, (..., columns), into that of its scores, in place."""
    _check("the gradient", grad, probs.shape)
    _library(grad).call("softmax_backward", grad, probs, probs.shape[:-1].numel(), probs.shape[-1])


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row; `logits` become its gradient, in place.

    Args:
        logits: (rows, vocab_size).
        targets: (rows,), int64.

    Returns:
        (rows,), float32.

    Raises:
        IndexError: a target is not in the vocabulary.
    """
    rows, vocab_size = logits.shape
    _check("the targets", targets, (rows,))
    smallest, largest = (int(bound) for bound in targets.aminmax())
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise IndexError(f"label {wrong} of a vocabulary of {vocab_size}")
    losses = torch.empty(rows)
    _library(logits).call("cross_entropy", logits, targets.contiguous(), losses, rows, vocab_size)
    return losses


# --- products


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """``x weight^T + bias``.

    Args:
        x: (rows, in_features); all sizes but the rows are multiples of 32.
        weight: (out_features, in_features), contiguous or the transpose of a contiguous one (others are copied).
        bias: (out_features,) or None.
        out: (rows, out_features), which is written to.
    """
    _linear(x, weight, bias, out, (None, None, None, 0), (0, 0, DROP_NOTHING))
    return out


def linear_lora(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, branch: "LoraBranch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` with a LoRA in the same pass.

    Returns:
        The result, (rows, out_features), and x A^T, (rows, rank up to a multiple of 32), zeros where there is no rank.
    """
    rank, padded_rank = len(branch.a), round_up(len(branch.a), _UNIT)
    _check("the LoRA's A", branch.a, (rank, weight.shape[1]))
    _check("the LoRA's B", branch.b, (weight.shape[0], rank))
    out = empty(x, len(x), len(weight))
    lora_hidden = empty(x, round_up(len(x), _library(x).row_tile), padded_rank)
    a, b = (
        pack_lora(part.t(), scale, x.new_empty(*(round_up(size, _UNIT) for size in part.t().shape)))
        for part, scale in ((branch.a, branch.a_scale), (branch.b, branch.b_scale))
    )
    drops = DROP_NOTHING if branch.seed is None else DROP_INPUT if branch.drops_input else DROP_OUTPUT
    dropped = (0, 0, drops) if branch.seed is None else (branch.seed, threshold(branch.p), drops)
    _linear(x, weight, bias, out, (a, b, lora_hidden, padded_rank), dropped)
    return out, lora_hidden[: len(x)]


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lora: tuple[Any, Any, Any, int],
    dropped: tuple[Any, int, int],
) -> None:
    """Call the product; `lora`: packed A and B, where x A^T goes, the rank; `dropped`: seed, threshold, of what."""
    (rows, in_features), out_features = x.shape, len(weight)
    _check("the weight", weight, (out_features, in_features))
    _check("the bias", bias, (out_features,))
    _check("the result", out, (rows, out_features))
    if in_features % _UNIT or out_features % _UNIT or in_features > _MAX_IN_FEATURES:
        raise ValueError(
            f"a weight of {tuple(weight.shape)}: its sizes must be multiples of {_UNIT}, and not too large"
        )
    transposed = not weight.t().is_contiguous()  # C's matrix is (in_features, out_features) or its transpose
    matrix = (weight if transposed else weight.t()).contiguous()
    a, b, lora_hidden, rank = lora
    sizes = rows, in_features, out_features, rank, transposed
    _library(x).call("linear", x.contiguous(), matrix, bias, out, a, b, lora_hidden, *sizes, *dropped)


def grad_weight(left: torch.Tensor, x: torch.Tensor, scale: float, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """``scale * left^T x``, with the entries of `x` dropped first that `seed` drops.

    Args:
        left: (rows, rank), the rank a multiple of 32.
        x: (rows, width), the width a multiple of 32.
        scale: a factor.
        seed: of dropout; None for none.
        p: dropout's probability.

    Returns:
        (rank, width), float32.
    """
    (rows, rank), width = left.shape, x.shape[1]
    _check("x", x, (rows, width))
    if rank % _UNIT or width % _UNIT:
        raise ValueError(f"a gradient of {(rank, width)}: its sizes must be multiples of {_UNIT}")
    out, pairs = x.new_empty(rank, width, dtype=torch.float32), x.new_empty(round_up(rows, 2) * rank)
    dropped = (0, 0, DROP_NOTHING) if seed is None else (seed, threshold(p), DROP_INPUT)
    sizes = rows, rank, width
    _library(x).call("grad_weight", left.contiguous(), x.contiguous(), pairs, out, *sizes, *dropped, scale)
    return out


# --- LoRA in generation


def pack_lora(matrix: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """Write `scale` times a matrix to `out`, in the order that products read (csrc/lora.c); returns that.

    Args:
        matrix: (rows, columns), float32.
        scale: a factor.
        out: (at least rows, at least columns), multiples of 32; zeros where the matrix does not reach.
    """
    rows, columns = matrix.shape
    if out.shape[0] < rows or out.shape[1] < columns or out.shape[0] % _UNIT or out.shape[1] % _UNIT:
        raise ValueError(f"a matrix of {(rows, columns)} does not fit in a packed one of {tuple(out.shape)}")
    if not matrix.t().is_contiguous():
        matrix = matrix.contiguous()
    sizes = rows, columns, *matrix.stride(), *out.shape
    memory = matrix if matrix.is_contiguous() else matrix.t()  # the same numbers, as C is told the strides
    _library(out).call("pack_lora", memory, out, *sizes, scale)
    return out


def lora_add_(
    out: torch.Tensor, x: torch.Tensor, adapter_ids: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Add to each row of `out` the LoRA of its adapter, in place.

    Args:
        out: (rows, out_features).
        x: (rows, in_features).
        adapter_ids: (rows,), int64, -1 for no adapter; None for adapter 0 everywhere.
        a: (num_adapters, in_features up to a multiple of 32, rank), each as `pack_lora` gives it.
        b: (num_adapters, rank, out_features up to a multiple of 32), likewise.
    """
    (rows, out_features), (num_adapters, padded_in, rank) = out.shape, a.shape
    _check("the LoRAs' B", b, (num_adapters, rank, round_up(out_features, _UNIT)))
    _check("the adapters of the rows", adapter_ids, (rows,))
    if padded := padded_in - x.shape[1]:
        x = torch.nn.functional.pad(x, (0, padded))
    _check("x", x, (rows, padded_in))
    _library(out).call("lora_add", x.contiguous(), adapter_ids, a, b, out, rows, padded_in, rank, out_features)


# --- attention


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    prefix: int,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each segment of a pack over the shared prefix and itself.

    Args:
        query: (tokens, num_heads, head_dim), the head size a multiple of 32.
        key: (tokens, num_kv_heads, head_dim); `value` likewise.
        value: see `key`.
        cu_seqlens: (segments + 1,), int32: where segments begin and end, the first of them the prefix.
        prefix: tokens of the shared prefix.
        max_seqlen: tokens of the longest segment that is not the prefix.
        scale: the factor on the scores.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.

    Returns:
        (tokens, num_heads, head_dim), not written beyond the last segment; and the logarithm of each row's sum of
        exponentials, (tokens, num_heads), float32.
    """
    sizes = _attention_sizes(query, key, value, cu_seqlens, prefix)
    out, lse = empty(query, *query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
    space = _workspace(query, prefix, max_seqlen, backward=False)
    parts = query, key, value, cu_seqlens, out, lse
    _library(query).call("varlen_attention", *parts, *space, *sizes, scale, window or 0)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, with their shapes; `grad` has that of the result."""
    sizes = _attention_sizes(query, key, value, cu_seqlens, prefix)
    _check("the gradient", grad, query.shape)
    _check("the rows' lse", lse, query.shape[:2])
    (tokens, num_heads, head_dim), num_kv_heads, segments = query.shape, key.shape[1], len(cu_seqlens) - 1
    d_query, d_key, d_value = (empty(query, tokens, num_heads, head_dim) for _ in range(3))
    of_prefix = [empty(query, segments, prefix, num_heads, head_dim) for _ in range(2)]
    end = int(cu_seqlens[-1])
    for part in (d_query, d_key, d_value):
        part[end:] = 0
    for part in of_prefix:
        part[0] = 0  # the prefix itself sees no other prefix
    space = _workspace(query, prefix, max_seqlen, backward=True)
    parts = grad.contiguous(), query, key, value, cu_seqlens, lse, d_query, d_key, d_value, *of_prefix
    _library(query).call("varlen_attention_backward", *parts, *space, *sizes, scale, window or 0)
    for part, shared in zip((d_key, d_value), of_prefix, strict=True):
        part[:prefix] += shared.sum(0)
    d_key, d_value = (part.view(tokens, num_kv_heads, -1, head_dim).sum(2) for part in (d_key, d_value))
    return d_query, d_key, d_value


def _attention_sizes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, prefix: int
) -> tuple[int, ...]:
    (tokens, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    if num_heads % num_kv_heads or head_dim % _UNIT:
        raise ValueError(f"{num_heads} heads of {head_dim} entries over {num_kv_heads} heads of keys and values")
    _check("the keys", key, (tokens, num_kv_heads, head_dim))
    _check("the values", value, (tokens, num_kv_heads, head_dim))
    if int(cu_seqlens[-1]) > tokens or int(cu_seqlens[1]) != prefix:
        raise ValueError(f"segments that end at {int(cu_seqlens[-1])} and a prefix of {prefix}, in {tokens} tokens")
    return len(cu_seqlens) - 1, prefix, num_heads, num_kv_heads, head_dim


def _workspace(query: torch.Tensor, prefix: int, max_seqlen: int, backward: bool) -> tuple[torch.Tensor, int, int]:
    """Memory for all threads to work in, the bytes that each has of it, and their number."""
    sizes = ((max_seqlen, prefix), (prefix, 0))  # the largest segment, and the prefix itself
    measure = _library(query).call
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
    _check("the cache", cache, (len(cache), num_kv_heads, page_size, head_dim))
    _check("the tokens' pages", pages, (tokens,))
    _check("the tokens' columns", columns, (tokens,))
    sizes = page_size, tokens, num_kv_heads, head_dim
    _library(part).call("store_kv", part.contiguous(), cache, pages, columns, *sizes)


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
        scale: the factor on the scores.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all before it.

    Returns:
        The shape of `query`.
    """
    num_seqs, num_query_tokens = positions.shape
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, page_size = keys.shape[1:3]
    _check("the queries", query, (num_seqs * num_query_tokens, num_heads, head_dim))
    for part in (keys, values):
        _check("the cache", part, (len(keys), num_kv_heads, page_size, head_dim))
    prefix_keys, prefix_values = prefix_kv or (None, None)
    prefix = 0 if prefix_keys is None else prefix_keys.shape[2]
    for part in prefix_kv or ():
        _check("the prefix", part, (len(part), num_kv_heads, prefix, head_dim))
    for part in (adapter_ids, slots):
        _check("adapters or slots", part, (num_seqs,))
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
    )
    sizes = num_seqs, num_query_tokens, num_heads, num_kv_heads, head_dim, page_size, prefix, block_table.shape[1]
    _library(query).call("paged_attention", *parts, *sizes, scale, window or 0)
    return out
