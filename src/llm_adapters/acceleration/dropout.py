"""Dropout that draws one random number per dropped entry, not one per entry.

Random numbers are what dropout costs on a CPU. The gaps between the dropped entries of independent draws are
geometrically distributed, so drawing the gaps gives exactly the same noise for a twentieth of the numbers at p = 0.05.
"""

import math

import torch


def dropped(count: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Indices of the dropped ones of `count` entries, each dropped with probability `p` independently; ascending int32.

    int32, as they are kept until the backward pass (int64 from 2^31 entries on).

    Draws from torch's own random state, so that seeds, resuming and recomputation work as with torch's dropout.
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p}: a probability above 0 and below 1 is needed")
    pieces: list[torch.Tensor] = []
    start = 0
    while start < count:
        expected = (count - start) * p
        draws = int(expected + 4 * math.sqrt(expected)) + 8
        uniform = 1.0 - torch.rand(draws, dtype=torch.float64, device=device)  # (0, 1], so that the log is finite
        gaps = (uniform.log_() / math.log1p(-p)).floor_().to(torch.int64)
        found = start + (gaps + 1).cumsum(0) - 1
        pieces.append(found)
        start = int(found[-1]) + 1
    found = torch.cat(pieces)
    found = found[: int(torch.searchsorted(found, count))]
    return found.to(torch.int32) if count < 2**31 else found


def drop(values: torch.Tensor, indices: torch.Tensor, p: float) -> torch.Tensor:
    """`values`, scaled by 1 / (1 - p), with the entries at the flat `indices` set to zero; a new tensor."""
    return blank(values * (1.0 / (1.0 - p)), indices)


def blank(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`values` with the entries at the flat `indices` set to zero, in place."""
    values.view(-1).index_fill_(0, indices.long(), 0)
    return values
