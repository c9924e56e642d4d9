"""Interfaces of torch that it does not promise to keep, and what each is used for."""

import operator
from typing import Any

import torch

from llm_adapters.errors import WorkError

PRIVATE = {
    "_softmax_backward_data": "the gradient of attention's softmax",
    "ops.aten.native_layer_norm_backward": "the gradient of RMS norms",
    "ops.aten.silu_backward": "the gradient of gated MLPs",
    "ops.mkldnn._is_mkldnn_bf16_supported": "prepacked weights in generation",
    "ops.mkldnn._reorder_linear_weight": "prepacked weights in generation",
    "ops.mkldnn._linear_pointwise": "prepacked weights in generation",
    "ops.mkldnn._linear_pointwise.binary": "prepacked weights in generation",
}


def missing_reason(*names: str) -> str | None:
    """The reason why `names`, keys of `PRIVATE`, cannot be used with this torch; None where all are there."""
    for name in names:
        try:
            operator.attrgetter(name)(torch)
        except (AttributeError, RuntimeError):  # torch.ops raises the one or the other
            return f"torch {torch.__version__} has no torch.{name}, which {PRIVATE[name]} needs"
    return None


def _get(name: str) -> Any:
    if reason := missing_reason(name):
        raise WorkError(f"{reason}: install an older torch, or turn the fast paths off.")
    return operator.attrgetter(name)(torch)


def softmax_backward(grad: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores of a softmax over the last dimension, whose results are `probs`; all of one shape."""
    return _get("_softmax_backward_data")(grad, probs, -1, probs.dtype)


def layer_norm_input_grad(
    grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, inverse_std: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, (..., hidden_size), of a layer norm over the last dimension, from its mean and 1 / std."""
    exact = weight.to(inverse_std.dtype) if x.device.type == "cpu" else weight  # as its CPU kernels want it
    backward = _get("ops.aten.native_layer_norm_backward")
    return backward(grad, x, weight.shape, mean, inverse_std, exact, None, [True, False, False])[0]


def silu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x of ``silu(x)``."""
    return _get("ops.aten.silu_backward")(grad, x)


def prepack_unsupported_reason() -> str | None:
    """The reason why weights cannot be prepacked for this CPU; None where they can."""
    if reason := missing_reason(*(name for name in PRIVATE if name.startswith("ops.mkldnn"))):
        return reason
    if not torch.backends.mkldnn.is_available() or not _get("ops.mkldnn._is_mkldnn_bf16_supported")():
        return "the CPU does not multiply bfloat16"
    return None


def prepack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of a bfloat16 weight (out_features, in_features) in oneDNN's blocks, chosen for so many rows."""
    return _get("ops.mkldnn._reorder_linear_weight")(weight, rows)


def prepacked_linear() -> Any:
    """The function ``(x, blocks, bias, activation, scalars, algorithm)``, with an overload `binary`."""
    return _get("ops.mkldnn._linear_pointwise")
