"""Attention over packs, as an attention implementation of transformers.

With kernels, see csrc/segments.c. Without: two batched matrix products and a softmax over the segments, padded to the
longest of them, with the shared prefix in front of each. On a CPU that is several times faster than its fused attention
at the lengths of worked problems, and the backward pass is written out so that nothing but the probabilities is kept.
Long segments are attended to in blocks of rows, each over what it may see, and their probabilities are computed again
in the backward pass: what a layer keeps grows with the length, and not with its square (without kernels the mask does,
but there is one for all layers).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.packing import Band, Pack, Visible

BLOCK = 512  # rows; a longer segment is cut into so many


class PackedAttention(torch.autograd.Function):
    """(heads, tokens, width), twice (key-value heads, tokens, width) -> (tokens, heads, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pack: Pack,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.kernel = None
        if (kernel := _kernel(query, value)) is not None:
            rows = [part.transpose(0, 1).contiguous() for part in (query, key, value)]
            return _by_kernel(ctx, kernel, rows, pack, scale, window)
        heads, tokens, _ = query.shape
        out = empty(query, tokens, heads, value.shape[-1])
        kept = []
        for band in pack.bands:
            queries = _segments(query, band, len(key)).mul_(scale)
            keys, values = with_prefix(key, band), with_prefix(value, band)
            found, probabilities = attend(queries, keys, values, band.visible(window))
            kept.append(probabilities)
            scatter(found, band, out[band.start : band.end])
        out[pack.end :] = 0
        if pack.prefix:
            own = slice(0, pack.prefix)
            queries = _grouped(query[:, own], len(key)) * scale
            found, probabilities = attend(queries, key[:, own], value[:, own], pack.visible(window))
            kept.append(probabilities)
            out[own] = found.view(heads, pack.prefix, -1).transpose(0, 1)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, *kept)
            ctx.pack, ctx.scale, ctx.window = pack, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if ctx.kernel is not None:
            return *_gradients_by_kernel(ctx, gradients[0]), None, None, None
        query, key, value, *kept = ctx.saved_tensors
        pack, scale, prefix = ctx.pack, ctx.scale, ctx.pack.prefix
        groups = len(key)
        grad = gradients[0].transpose(0, 1)  # (heads, tokens, width)
        # (tokens, heads, width), as the projections have it.
        d_query, d_key, d_value = (empty(t, t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value))
        for whole in (d_query, d_key, d_value):
            whole[pack.end :] = 0
        if prefix:
            own = slice(0, prefix)
            dq, dk, dv = _backward(
                _grouped(grad[:, own], groups),
                _grouped(query[:, own], groups) * scale,
                key[:, own],
                value[:, own],
                pack.visible(ctx.window),
                kept[-1],
            )
            d_query[own] = dq.mul_(scale).view(len(query), prefix, -1).transpose(0, 1)
            d_key[own] = dk.transpose(0, 1)
            d_value[own] = dv.transpose(0, 1)
        for band, probabilities in zip(pack.bands, kept, strict=False):  # the prefix's stand last
            d_segments = _segments(grad, band, groups)
            # What is padded is computed and dropped, and must have no gradient.
            d_segments.view(-1, d_segments.shape[-1]).index_fill_(0, band.padding(len(query)), 0)
            dq, dk, dv = _backward(
                d_segments,
                _segments(query, band, groups).mul_(scale),
                with_prefix(key, band),
                with_prefix(value, band),
                band.visible(ctx.window),
                probabilities,
            )
            scatter(dq.mul_(scale), band, d_query[band.start : band.end])
            for whole, part in ((d_key, dk), (d_value, dv)):
                scatter(part, band, whole[band.start : band.end], before=True)
                shared = part.view(len(band.lengths), groups, -1, part.shape[-1])[:, :, :prefix]
                whole[:prefix] += shared.sum(0).transpose(0, 1)
        return d_query.transpose(0, 1), d_key.transpose(0, 1), d_value.transpose(0, 1), None, None, None


def _kernel(query: torch.Tensor, value: torch.Tensor) -> kernels.Kernels | None:
    kernel = kernels.of(query)
    fits = query.shape[-1] == value.shape[-1] and query.shape[-1] % 32 == 0
    return kernel if kernel is not None and kernel.strip and fits else None


def _by_kernel(
    ctx: Any, kernel: kernels.Kernels, rows: list[torch.Tensor], pack: Pack, scale: float, window: int | None
) -> torch.Tensor:
    """`PackedAttention.forward`; nothing of the probabilities is kept but the logarithm of each row's sum.

    `rows` are queries, keys and values, (tokens, heads, width).
    """
    (tokens, heads, width), groups = rows[0].shape, rows[1].shape[1]
    if tokens != pack.tokens or heads % groups or any(part.shape != (tokens, groups, width) for part in rows[1:]):
        raise ValueError(f"{[tuple(part.shape) for part in rows]} of a pack of {pack.tokens} tokens")
    out, logarithms = empty(rows[0], tokens, heads, width), rows[0].new_empty(tokens, heads, dtype=torch.float32)
    out[pack.end :] = 0
    spans = pack.spans
    kernel.call("attention", *rows, spans, out, logarithms, len(spans), heads, groups, width, float(scale), window or 0)
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*rows, logarithms)
        ctx.kernel, ctx.pack, ctx.scale, ctx.window = kernel, pack, scale, window
    return out


def _gradients_by_kernel(ctx: Any, grad: torch.Tensor) -> Iterator[torch.Tensor]:
    """The gradients of queries, keys and values."""
    *rows, logarithms = ctx.saved_tensors
    pack, (tokens, heads, width), groups, spans = ctx.pack, rows[0].shape, rows[1].shape[1], ctx.pack.spans
    own = [empty(grad, tokens, heads, width) for _ in range(3)]
    before = [empty(grad, len(spans), pack.prefix, heads, width) for _ in range(2)]
    for whole in own:
        whole[pack.end :] = 0
    before[0][0], before[1][0] = 0, 0
    sizes = len(spans), heads, groups, width
    ctx.kernel.call(
        "attention_backward",
        grad.contiguous(),
        *rows,
        spans,
        logarithms,
        *own,
        *before,
        *sizes,
        float(ctx.scale),
        ctx.window or 0,
    )
    for part, shared in zip(own[1:], before, strict=True):
        part[: pack.prefix] += shared.sum(0)
    own[1:] = [part.view(tokens, groups, -1, width).sum(2) for part in own[1:]]
    return (part.transpose(0, 1) for part in own)


def attention_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scale: float,
    window: int | None,
    p: float,
) -> torch.Tensor:
    """As `PackedAttention`, with dropout and with autograd's own backward pass, for the older families that drop here."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = torch.bmm(query, key.transpose(1, 2)) * scale
        scores = (scores.view(len(bias), -1, *bias.shape[1:]) + bias[:, None]).view_as(scores)
        return torch.bmm(nn.functional.dropout(torch.softmax(scores, -1), p), value)

    parts = []
    if pack.prefix:
        own = slice(0, pack.prefix)
        bias = pack.visible(window).bias(query.dtype)
        first = attend(_grouped(query[:, own], len(key)), key[:, own], value[:, own], bias)
        parts.append(first.view(len(query), pack.prefix, -1).transpose(0, 1))
    for band in pack.bands:
        queries, bias = _segments(query, band, len(key)), band.visible(window).bias(query.dtype)
        found = attend(queries, with_prefix(key, band), with_prefix(value, band), bias)
        parts.append(_rows(found, band, len(query)).view(-1, len(query), found.shape[-1]))
    return torch.cat((*parts, parts[0].new_zeros(pack.tokens - pack.end, *parts[0].shape[1:])))


def _probabilities(query: torch.Tensor, key: torch.Tensor, visible: Visible, rows: slice) -> torch.Tensor:
    """The softmax of the scores of some rows of all segments.

    Args:
        query: (segments * key-value heads, heads of each * rows, width), scaled.
        key: (segments * key-value heads, columns, width), what these rows may see.
        visible: what they see of it.
        rows: which of the segments' rows they are.

    Returns:
        (segments * key-value heads, heads of each * rows, columns).
    """
    scores = torch.bmm(query, key.transpose(1, 2), out=empty(query, *query.shape[:2], key.shape[1]))
    count, columns = rows.stop - rows.start, key.shape[1]
    by_segment = scores.view(len(visible.lengths), -1, count, columns)
    if kernel := kernels.of(scores):
        shape = by_segment.shape
        kernel.call("softmax", scores, visible.lengths, *shape, visible.prefix, rows.start, visible.window or 0)
        return scores
    by_segment.add_(visible.bias(scores.dtype)[:, None, rows, :columns])
    return torch.softmax(scores, -1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Visible
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``softmax(query key^T) value`` of what is visible, and the probabilities if they are few."""
    longest = visible.longest
    if longest <= BLOCK:
        probabilities = _probabilities(query, key, visible, slice(0, longest))
        return torch.bmm(probabilities, value), probabilities
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    for rows, seen in _blocks(visible):
        probabilities = _probabilities(_cut(query, rows, longest), key[:, seen], visible, rows)
        found = torch.bmm(probabilities, value[:, seen])
        out.unflatten(1, (-1, longest))[:, :, rows] = found.unflatten(1, (-1, rows.stop - rows.start))
    return out, None


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: Visible,
    probabilities: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `attend`, whose results are its `probabilities`."""
    if probabilities is not None:
        return _gradients(grad, query, key, value, probabilities)
    longest = visible.longest
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, seen in _blocks(visible):
        asking, keys = _cut(query, rows, longest), key[:, seen]
        again = _probabilities(asking, keys, visible, rows)
        dq, dk, dv = _gradients(_cut(grad, rows, longest), asking, keys, value[:, seen], again)
        d_query.unflatten(1, (-1, longest))[:, :, rows] = dq.unflatten(1, (-1, rows.stop - rows.start))
        d_key[:, seen] += dk
        d_value[:, seen] += dv
    return d_query, d_key, d_value


def _blocks(visible: Visible) -> Iterator[tuple[slice, slice]]:
    """Rows, and the columns that they may see: what stands before all rows, and the rows up to their own."""
    for start in range(0, visible.longest, BLOCK):
        stop = min(start + BLOCK, visible.longest)
        yield slice(start, stop), slice(0, visible.prefix + stop)


def _cut(values: torch.Tensor, rows: slice, longest: int) -> torch.Tensor:
    """These `rows` of every head: (batch, heads * longest, width) -> (batch, heads * rows, width)."""
    return values.unflatten(1, (-1, longest))[:, :, rows].flatten(1, 2)


def _gradients(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of ``softmax(query key^T + bias) value``, each tensor (batch, rows, width).

    A batched product whose first factor is a transposed view is ten times slower on a CPU, so the narrow factor is
    copied in its transposed order and not the wide one.
    """
    d_value = torch.bmm(grad.transpose(1, 2).contiguous(), probabilities).transpose(1, 2)
    d_probabilities = torch.bmm(grad, value.transpose(1, 2))
    if kernel := kernels.of(probabilities):
        d_scores = d_probabilities
        kernel.call("softmax_backward", d_scores, probabilities, d_scores.shape[:2].numel(), d_scores.shape[2])
    else:
        d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
    d_key = torch.bmm(query.transpose(1, 2).contiguous(), d_scores).transpose(1, 2)
    return torch.bmm(d_scores, key), d_key.contiguous(), d_value.contiguous()


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(heads, rows, width) -> (key-value heads, heads of each * rows, width)."""
    return rows.reshape(groups, -1, rows.shape[-1])


def _segments(rows: torch.Tensor, band: Band, groups: int) -> torch.Tensor:
    """(heads, tokens, width) -> (segments * key-value heads, heads of each * longest, width)."""
    heads, _, width = rows.shape
    flat = rows.transpose(0, 1).reshape(-1, width)  # no copy, as projections lay heads within tokens
    taken = flat.index_select(0, band.places(heads // groups, groups, before=False))
    return taken.view(len(band.lengths) * groups, -1, width)


def with_prefix(rows: torch.Tensor, band: Band) -> torch.Tensor:
    """(heads, tokens, width) -> (segments * heads, prefix + longest, width)."""
    heads, _, width = rows.shape
    flat = rows.transpose(0, 1).reshape(-1, width)
    return flat.index_select(0, band.places(1, heads, before=True)).view(len(band.lengths) * heads, -1, width)


def _rows(values: torch.Tensor, band: Band, heads: int, before: bool = False) -> torch.Tensor:
    """(segments, heads, [prefix and] longest, width), in any grouping, -> (segment tokens * heads, width)."""
    return values.reshape(-1, values.shape[-1]).index_select(0, band.back(heads, before))


def scatter(values: torch.Tensor, band: Band, out: torch.Tensor, before: bool = False) -> None:
    """`_rows`, written to `out`, (segment tokens, heads, width)."""
    flat = values.reshape(-1, values.shape[-1])
    torch.index_select(flat, 0, band.back(out.shape[1], before), out=out.view(-1, out.shape[-1]))
