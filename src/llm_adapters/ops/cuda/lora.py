"""Triton functions of a LoRA beside a linear layer whose product is cuBLAS's: dropout costs no pass of its own.

forward    h = (dropout(x) a^T)            one read of x
backward   out += dropout(h a)             one read and write of out
           d_a = h^T dropout(x)            one read of x
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.nn import functional

from llm_adapters.ops.cuda.elementwise import keep_mask, threshold

if TYPE_CHECKING:
    from llm_adapters.ops.linear import LoraBranch

_MAX_RANK = 128  # columns that one program holds


@triton.jit
def _down_kernel(
    x,
    a,
    out,
    seed,
    threshold,
    scale,
    rows,
    features: tl.constexpr,
    rank,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    # out (rows, rank) = dropout(x) (rows, features) a^T (features, rank)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, R)
    key = tl.load(seed)
    total = tl.zeros((ROWS, R), tl.float32)
    for start in range(0, features, K):
        k = start + tl.arange(0, K)
        index = row[:, None] * features + k[None, :]
        inside = (row[:, None] < rows) & (k[None, :] < features)
        tile = tl.load(x + index, inside, other=0.0)
        tile = tl.where(keep_mask(index, key, threshold), tile, 0.0).to(x.dtype.element_ty)
        down = tl.load(a + r[None, :] * features + k[:, None], (r[None, :] < rank) & (k[:, None] < features), other=0.0)
        total = tl.dot(tile, down, total)
    inside = (row[:, None] < rows) & (r[None, :] < rank)
    tl.store(out + row[:, None] * rank + r[None, :], (total * scale).to(out.dtype.element_ty), inside)


@triton.jit
def _up_add_kernel(
    h, a, out, seed, threshold, scale, rows, features, rank, ROWS: tl.constexpr, K: tl.constexpr, R: tl.constexpr
):
    # out (rows, features) += dropout(h (rows, rank) a (rank, features))
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * K + tl.arange(0, K)
    r = tl.arange(0, R)
    left = tl.load(h + row[:, None] * rank + r[None, :], (row[:, None] < rows) & (r[None, :] < rank), other=0.0)
    right = tl.load(a + r[:, None] * features + k[None, :], (r[:, None] < rank) & (k[None, :] < features), other=0.0)
    product = tl.dot(left, right) * scale
    index = row[:, None] * features + k[None, :]
    inside = (row[:, None] < rows) & (k[None, :] < features)
    value = tl.load(out + index, inside, other=0.0).to(tl.float32)
    value += tl.where(keep_mask(index, tl.load(seed), threshold), product, 0.0)
    tl.store(out + index, value.to(out.dtype.element_ty), inside)


@triton.jit
def _grad_kernel(
    h, x, out, seed, threshold, scale, rows, features, rank, ROWS: tl.constexpr, K: tl.constexpr, R: tl.constexpr
):
    # out (rank, features) = scale * h^T (rank, rows) dropout(x) (rows, features)
    k = tl.program_id(0) * K + tl.arange(0, K)
    r = tl.arange(0, R)
    key = tl.load(seed)
    total = tl.zeros((R, K), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        left = tl.load(h + row[None, :] * rank + r[:, None], (row[None, :] < rows) & (r[:, None] < rank), other=0.0)
        index = row[:, None] * features + k[None, :]
        tile = tl.load(x + index, (row[:, None] < rows) & (k[None, :] < features), other=0.0)
        tile = tl.where(keep_mask(index, key, threshold), tile, 0.0).to(x.dtype.element_ty)
        total = tl.dot(left, tile, total)
    inside = (r[:, None] < rank) & (k[None, :] < features)
    tl.store(out + r[:, None] * features + k[None, :], total * scale, inside)


def lora_weights(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in the precision of `x`, rounded once for the forward and the backward pass."""
    return a.to(x.dtype), b.to(x.dtype)


def supports_linear_lora(x: torch.Tensor, in_features: int, out_features: int, branch: "LoraBranch") -> bool:
    """True in half precision, for ranks that one program holds."""
    return x.dtype in (torch.bfloat16, torch.float16) and len(branch.a) <= _MAX_RANK


def supports_grad_weight(x: torch.Tensor, rank: int, width: int) -> bool:
    """True in half precision, for ranks that one program holds."""
    return x.dtype in (torch.bfloat16, torch.float16) and rank <= _MAX_RANK


def linear_lora(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, branch: "LoraBranch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.linear.linear_lora`."""
    a, b, a_scale, b_scale, seed, p, drops_input = branch
    down, up = a.to(x.dtype), b.to(x.dtype)
    out, x = functional.linear(x, weight, bias), x.contiguous()
    hidden = x.new_empty(len(x), len(down))
    # The factors are the products' own: no pass over a matrix for them.
    if seed is not None and drops_input:
        _run_down(x, down.contiguous(), hidden, seed, p, a_scale)
    else:
        torch.addmm(hidden, x, down.t(), beta=0, alpha=a_scale, out=hidden)
    if seed is None or drops_input:
        return out.addmm_(hidden, up.t(), alpha=b_scale), hidden
    _run_up_add(hidden, up.t().contiguous(), out, seed, p, b_scale)
    return out, hidden


def grad_weight(left: torch.Tensor, x: torch.Tensor, scale: float, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """See `ops.linear.grad_weight`."""
    if seed is None:
        out = torch.mm(left.t(), x, out_dtype=torch.float32)
        return out if scale == 1.0 else out.mul_(scale)
    left, x = left.contiguous(), x.contiguous()
    (rows, rank), features = left.shape, x.shape[1]
    out = x.new_empty(rank, features, dtype=torch.float32)
    sizes = {"ROWS": 64, "K": 32, "R": max(16, triton.next_power_of_2(rank))}
    grid = (triton.cdiv(features, sizes["K"]),)
    _grad_kernel[grid](left, x, out, seed, threshold(p), float(scale), rows, features, rank, **sizes)
    return out


def _run_down(x: torch.Tensor, a: torch.Tensor, out: torch.Tensor, seed: torch.Tensor, p: float, scale: float) -> None:
    (rows, features), rank = x.shape, len(a)
    sizes = {"ROWS": 16, "K": 128, "R": max(16, triton.next_power_of_2(rank))}
    numbers = threshold(p), float(scale), rows, features, rank
    _down_kernel[(triton.cdiv(rows, 16),)](x, a, out, seed, *numbers, **sizes)


def _run_up_add(
    h: torch.Tensor, a: torch.Tensor, out: torch.Tensor, seed: torch.Tensor, p: float, scale: float
) -> None:
    (rows, rank), features = h.shape, a.shape[1]
    sizes = {"ROWS": 64, "K": 64, "R": max(16, triton.next_power_of_2(rank))}
    numbers = threshold(p), float(scale), rows, features, rank
    _up_add_kernel[(triton.cdiv(rows, 64), triton.cdiv(features, 64))](h, a, out, seed, *numbers, **sizes)
