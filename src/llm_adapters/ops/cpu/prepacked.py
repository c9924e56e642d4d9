"""Linear layers whose weights stay as they are, prepacked once for the CPU's matrix unit, and not for every product.

oneDNN multiplies with weights in blocks, and for a row-major weight makes them again in every call. For the few rows of
a decoding step that takes up to half of the time. torch's own compiler uses the same operators when it freezes a
model.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from llm_adapters.compat import torch as compat

_ROWS = 64  # for which the blocks are chosen; any other number of rows can be multiplied too
_SHARE = 0.25  # of the free memory, which the copies may take


class PrepackedLinear:
    """``x -> x weight^T + bias`` with a prepacked copy of the weight.

    Args:
        weight: (out_features, in_features), bfloat16, on the CPU.
        bias: (out_features,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._blocks = compat.prepack(weight.detach().contiguous(), _ROWS)
        self._bias = bias
        self._linear = compat.prepacked_linear()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return self._linear(x, self._blocks, self._bias, "none", [], "")

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """``silu`` of the product."""
        return self._linear(x, self._blocks, self._bias, "swish", [], "")

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The product, entry by entry times `factor`."""
        return self._linear.binary(x, factor, self._blocks, self._bias, "mul")


def linear(weight: torch.Tensor, bias: torch.Tensor | None, prepacked: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """``x -> x weight^T + bias``, with a prepacked weight or as it is."""
    return PrepackedLinear(weight, bias) if prepacked else lambda x: functional.linear(x, weight, bias)


def unsupported_reason(model: nn.Module) -> str | None:
    """The reason why the weights of `model` cannot be prepacked; None where they can."""
    import psutil  # PEFT needs it, so it is there

    weights = [p for p in model.parameters() if p.dim() == 2]
    if any(p.device.type != "cpu" for p in weights):
        return "the model is not on a CPU"
    if not any(p.dtype == torch.bfloat16 for p in weights):
        return "the weights are not bfloat16"
    if reason := compat.prepack_unsupported_reason():
        return reason
    size = sum(p.numel() * p.element_size() for p in weights)
    if size > _SHARE * psutil.virtual_memory().available:
        return "there is too little memory for copies"
    return None
