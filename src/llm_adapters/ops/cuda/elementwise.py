"""Triton functions of rows and entries: norms, SwiGLU, rotary positions, dropout, cross-entropy.

All arithmetic is float32; only what is in memory has the tensors' precision. Results are rounded where the CPU's
functions of the same names round them (csrc/elementwise.c).
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # entries of a program
_MAX_HIDDEN = 16384  # entries of a row that one program holds


@triton.jit
def keep_mask(index, seed, threshold):
    """True for the entries that dropout keeps: MurmurHash3's last mixing step, as `ops.dropout.keep_mask`."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    h = index.to(tl.uint32) + low
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= high
    h ^= h >> 13
    h *= 0xC2B2AE35
    h ^= h >> 16
    return h >= threshold.to(tl.uint32)


def threshold(p: float) -> int:
    """The number of 32 bits below which a hash means that an entry is dropped."""
    return min(round(p * 2**32), 2**32 - 1)


# --- RMS norm


@triton.jit
def _rms_norm_kernel(x, weight, out, inverse_rms, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row * hidden + columns, inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value) / hidden + eps)
    tl.store(inverse_rms + row, factor)
    normed = (value * factor).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + columns, (normed * w).to(out.dtype.element_ty), inside)


@triton.jit
def _rms_norm_backward_kernel(grad, result, weight, inverse_rms, out, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    g = tl.load(grad + row * hidden + columns, inside, other=0.0).to(tl.float32)
    y = tl.load(result + row * hidden + columns, inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, inside, other=1.0).to(tl.float32)
    mean = tl.sum(g * y) / hidden
    d_x = tl.load(inverse_rms + row) * (g * w - y / w * mean)
    tl.store(out + row * hidden + columns, d_x.to(out.dtype.element_ty), inside)


def supports_rms_norm(x: torch.Tensor) -> bool:
    """True for rows that one program holds."""
    return x.shape[-1] <= _MAX_HIDDEN


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight * x / rms(x)`` over the last dimension, and the inverse of the rms, (..., 1), float32."""
    x = x.contiguous()
    hidden = x.shape[-1]
    out, inverse_rms = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        grid = (x.numel() // hidden,)
        _rms_norm_kernel[grid](x, weight, out, inverse_rms, hidden, eps, BLOCK=triton.next_power_of_2(hidden))
    return out, inverse_rms


def rms_norm_backward(
    grad: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, from the norm's result: ``inverse_rms * (grad w - result / w * mean(grad result))``."""
    grad, hidden = grad.contiguous(), grad.shape[-1]
    out = torch.empty_like(grad)
    if grad.numel():
        grid = (grad.numel() // hidden,)
        block = triton.next_power_of_2(hidden)
        _rms_norm_backward_kernel[grid](grad, result, weight, inverse_rms, out, hidden, BLOCK=block)
    return out


# --- SwiGLU


@triton.jit
def _swiglu_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x = tl.load(gate + index, inside, other=0.0).to(tl.float32)
    active = (x * tl.sigmoid(x)).to(out.dtype.element_ty).to(tl.float32)
    product = active * tl.load(up + index, inside, other=0.0).to(tl.float32)
    tl.store(out + index, product.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward_kernel(grad, gate, up, d_gate, d_up, out, count, RECOMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    g = tl.load(grad + index, inside, other=0.0).to(tl.float32)
    x = tl.load(gate + index, inside, other=0.0).to(tl.float32)
    u = tl.load(up + index, inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(x)
    dtype = d_up.dtype.element_ty
    tl.store(d_up + index, (g * x * s).to(dtype), inside)
    tl.store(d_gate + index, (g * u * (s + x * s * (1.0 - s))).to(dtype), inside)
    if RECOMPUTE:
        tl.store(out + index, ((x * s).to(dtype).to(tl.float32) * u).to(dtype), inside)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, all of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        _swiglu_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK)
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of both factors, and the result again if asked to `recompute` it."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
    out = torch.empty_like(gate) if recompute else None
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), _BLOCK),)
        parts = grad, gate, up, d_gate, d_up, gate if out is None else out, gate.numel()
        _swiglu_backward_kernel[grid](*parts, RECOMPUTE=recompute, BLOCK=_BLOCK)
    return d_gate, d_up, out


# --- dropout


@triton.jit
def _dropout_kernel(x, out, seed, threshold, scale, count, ADD: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    kept = keep_mask(index, tl.load(seed), threshold)
    value = tl.where(kept, tl.load(x + index, inside, other=0.0).to(tl.float32) * scale, 0.0)
    if ADD:
        value += tl.load(out + index, inside, other=0.0).to(tl.float32)
    tl.store(out + index, value.to(out.dtype.element_ty), inside)


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float, scale: float) -> torch.Tensor:
    """``scale * x`` with the entries set to zero that `seed` drops; a new tensor."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _dropout(out, x, seed, p, scale, add=False)
    return out


def dropout_add_(out: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, p: float) -> None:
    """Add to `out`, contiguous, the entries of `x` that `seed` does not drop."""
    _dropout(out, x.contiguous(), seed, p, 1.0, add=True)


def _dropout(out: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, p: float, scale: float, add: bool) -> None:
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        _dropout_kernel[grid](x, out, seed, threshold(p), float(scale), x.numel(), ADD=add, BLOCK=_BLOCK)


# --- rotary positions


@triton.jit
def _rotary_kernel(x, cos, sin, out, heads, head_dim, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    half = head_dim // 2
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # over heads and the entries of a half
    inside = index < heads * half
    head, at = index // half, index % half
    first = (token * heads + head) * head_dim + at
    a = tl.load(x + first, inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + half, inside, other=0.0).to(tl.float32)
    angle = token * head_dim + at
    c_a = tl.load(cos + angle, inside, other=0.0).to(tl.float32)
    c_b = tl.load(cos + angle + half, inside, other=0.0).to(tl.float32)
    s_a = tl.load(sin + angle, inside, other=0.0).to(tl.float32)
    s_b = tl.load(sin + angle + half, inside, other=0.0).to(tl.float32)
    if BACKWARD:
        to_a, to_b = a * c_a + b * s_b, b * c_b - a * s_a
    else:
        to_a, to_b = a * c_a - b * s_a, b * c_b + a * s_b
    tl.store(out + first, to_a.to(out.dtype.element_ty), inside)
    tl.store(out + first + half, to_b.to(out.dtype.element_ty), inside)


def supports_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """True for whole heads in the layout that projections leave, and one angle for each token."""
    rows = x.transpose(1, 2)  # (batch, tokens, num_heads, head_dim)
    batch, tokens, _, head_dim = rows.shape
    shape = cos.shape == sin.shape == (batch, 1, tokens, head_dim)
    return shape and cos.is_contiguous() and sin.is_contiguous() and rows.is_contiguous() and cos.dtype == x.dtype


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """``x * cos + (-x2, x1) * sin`` for x = (x1, x2), or the gradient of x from that of the result.

    Args:
        x: (batch, num_heads, tokens, head_dim), the transpose of a contiguous (batch, tokens, num_heads, head_dim).
        cos: (batch, 1, tokens, head_dim), contiguous.
        sin: likewise.
        backward: whether `x` is the gradient.
    """
    rows = x.transpose(1, 2)
    batch, tokens, heads, head_dim = rows.shape
    out = torch.empty_like(rows)
    if x.numel():
        grid = (batch * tokens, triton.cdiv(heads * head_dim // 2, _BLOCK))
        _rotary_kernel[grid](rows, cos, sin, out, heads, head_dim, BACKWARD=backward, BLOCK=_BLOCK)
    return out.transpose(1, 2)


# --- cross-entropy


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * vocab_size
    target = tl.load(targets + row)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(values + columns, columns < vocab_size, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, value)
        # exp(-inf - -inf) is no number: a lane that has seen nothing yet has nothing to rescale
        total = total * tl.where(largest == above, 1.0, tl.exp(largest - above))
        total += tl.where(value == -float("inf"), 0.0, tl.exp(value - above))
        largest = above
    highest = tl.max(largest)
    normaliser = highest + tl.log(tl.sum(total * tl.exp(largest - highest)))
    ignored = target < 0
    at_target = tl.load(values + tl.maximum(target, 0)).to(tl.float32)
    tl.debug_barrier()  # everyone has read the target before anyone writes
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        prob = tl.exp(tl.load(values + columns, inside, other=0.0).to(tl.float32) - normaliser)
        prob = tl.where(ignored, 0.0, prob - tl.where(columns == target, 1.0, 0.0))
        tl.store(values + columns, prob.to(logits.dtype.element_ty), inside)
    tl.store(losses + row, tl.where(ignored, 0.0, normaliser - at_target))


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row, (rows,), float32; `logits` (rows, vocab_size), contiguous, become their gradient.

    A negative target is ignored: no loss, no gradient. One beyond the vocabulary is not looked for, as that would wait
    for the device.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    if len(logits):
        _cross_entropy_kernel[(len(logits),)](logits, targets, losses, logits.shape[1], BLOCK=4096, num_warps=8)
    return losses
