"""Rotary positions: which modelling files rotate the two halves of a head, as the fused function does."""

from typing import Any

import torch
from torch import nn

from llm_adapters.compat.transformers import modelling_module, rotary_function
from llm_adapters.ops.rotary import apply_rotary_pos_emb


def modelling_file(model: nn.Module) -> Any:
    """Find the Python module of `model`'s family, if its rotary function does what ours does, by trying.

    Most families rotate the two halves of a head; GPT-J's neighbouring pairs are another thing. The function is a
    global of the file, so replacing it concerns every model of the family in this process (`Patches.share`).
    """
    own, file = rotary_function(model), modelling_module(model)
    if own is None or own is apply_rotary_pos_emb:  # another session has replaced it
        return own and file
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 3, 8, generator=generator)
    same = []
    for rotary_dim in (8, 4):  # some families rotate a part of each head, and hand over the whole
        half = (torch.randn(1, 3, rotary_dim // 2, generator=generator) for _ in range(2))
        cos, sin = (values.repeat(1, 1, 2) for values in half)
        try:
            pairs = list(zip(own(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True))
        except Exception:  # noqa: S112 -- a size that the family does not have, or a function that takes something else
            continue
        same += [torch.allclose(theirs, ours, atol=1e-6) for theirs, ours in pairs]
    return file if same and all(same) else None
