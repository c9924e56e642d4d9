"""Functions of csrc/gemm.c and csrc/lora.c: products with frozen weights, LoRA in training and in generation."""

from typing import TYPE_CHECKING, Any

import torch

from llm_adapters.ops.cpu.allocator import empty
from llm_adapters.ops.cpu.prototypes import check_shape, library_for
from llm_adapters.ops.dropout import threshold
from llm_adapters.ops.sizes import round_up

if TYPE_CHECKING:
    from llm_adapters.ops.linear import LoraBranch

DROP_NOTHING, DROP_INPUT, DROP_OUTPUT = range(3)  # as in csrc/gemm.c
_UNIT = 32  # sizes that products take are multiples
_MIN_ROWS = 64  # for which it is worth packing a weight
_MAX_IN_FEATURES = 12288  # beyond, a column tile of the weight is in no cache, and too much for a thread's stack


def has_fast_linear(weight: torch.Tensor) -> bool:
    """True if `linear` exists for the precision of `weight`: the processor multiplies pairs of bfloat16."""
    return bool(library_for(weight).row_tile)


def supports_linear(x: torch.Tensor, in_features: int, out_features: int) -> bool:
    """True for sizes and numbers of rows for which `linear` exists and is worth it."""
    sizes_fit = not (in_features % _UNIT or out_features % _UNIT) and in_features <= _MAX_IN_FEATURES
    return has_fast_linear(x) and len(x) >= _MIN_ROWS and sizes_fit


def supports_linear_lora(x: torch.Tensor, in_features: int, out_features: int, branch: "LoraBranch") -> bool:
    """True for those sizes with a LoRA whose matrices are float32."""
    masters = branch.a.dtype == branch.b.dtype == torch.float32
    return masters and supports_linear(x, in_features, out_features)


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
    check_shape("the LoRA's A", branch.a, (rank, weight.shape[1]))
    check_shape("the LoRA's B", branch.b, (weight.shape[0], rank))
    out = empty(x, len(x), len(weight))
    lora_hidden = empty(x, round_up(len(x), library_for(x).row_tile), padded_rank)
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
    check_shape("the weight", weight, (out_features, in_features))
    check_shape("the bias", bias, (out_features,))
    check_shape("the result", out, (rows, out_features))
    if in_features % _UNIT or out_features % _UNIT or in_features > _MAX_IN_FEATURES:
        raise ValueError(
            f"a weight of {tuple(weight.shape)}: its sizes must be multiples of {_UNIT}, and not too large"
        )
    transposed = not weight.t().is_contiguous()  # C's matrix is (in_features, out_features) or its transpose
    matrix = (weight if transposed else weight.t()).contiguous()
    a, b, lora_hidden, rank = lora
    sizes = rows, in_features, out_features, rank, transposed
    library_for(x).call("linear", x.contiguous(), matrix, bias, out, a, b, lora_hidden, *sizes, *dropped)


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
    check_shape("x", x, (rows, width))
    if rank % _UNIT or width % _UNIT:
        raise ValueError(f"a gradient of {(rank, width)}: its sizes must be multiples of {_UNIT}")
    out, pairs = x.new_empty(rank, width, dtype=torch.float32), x.new_empty(round_up(rows, 2) * rank)
    dropped = (0, 0, DROP_NOTHING) if seed is None else (seed, threshold(p), DROP_INPUT)
    sizes = rows, rank, width
    library_for(x).call("grad_weight", left.contiguous(), x.contiguous(), pairs, out, *sizes, *dropped, scale)
    return out


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
    library_for(out).call("pack_lora", memory, out, *sizes, scale)
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
    check_shape("the LoRAs' B", b, (num_adapters, rank, round_up(out_features, _UNIT)))
    check_shape("the adapters of the rows", adapter_ids, (rows,))
    if padded := padded_in - x.shape[1]:
        x = torch.nn.functional.pad(x, (0, padded))
    check_shape("x", x, (rows, padded_in))
    library_for(out).call("lora_add", x.contiguous(), adapter_ids, a, b, out, rows, padded_in, rank, out_features)
