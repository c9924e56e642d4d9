"""References run on any device and never wait for it: a GPU would stand still while the host reads a tensor."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_adapters.ops.cross_entropy import fused_linear_cross_entropy
from llm_adapters.ops.dropout import sparse_dropout
from llm_adapters.ops.linear import frozen_linear
from llm_adapters.ops.lora import LoraStack, lora_linear
from llm_adapters.ops.packing import Pack
from llm_adapters.ops.rms_norm import rms_norm
from llm_adapters.ops.rotary import apply_rotary_pos_emb
from llm_adapters.ops.swiglu import swiglu, swiglu_lora
from llm_adapters.ops.varlen_attention import varlen_attention

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal"}


class NeverWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device; an index by a mask does, too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert not any(part is not None and part.dtype == torch.bool for part in args[1]), "an index by a mask"
        return function(*args, **(kwargs or {}))


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


PACK = Pack.of([[1] * 4 + [2] * length for length in (9, 30, 2, 50)], prefix=4)
WEIGHT, COS = torch.randn(24, 16), torch.randn(1, 5, 8)


def stack(x: torch.Tensor) -> torch.Tensor:
    made = LoraStack({0: (torch.randn(2, 16), torch.randn(24, 2))}, 2, WEIGHT)
    with torch.no_grad():
        made.add_(torch.zeros(6, 24), x, torch.tensor([0, 0, -1, 1, 0, 1]))
    return x.sum()


OPERATORS = {
    "rms_norm": (lambda x: rms_norm(x, WEIGHT[0], 1e-5), (6, 16)),
    "swiglu": (swiglu, (6, 16), (6, 16)),
    "swiglu_lora": (
        lambda g, u, a, b: swiglu_lora(g, u, WEIGHT, None, a, b, 2.0, 0.1),
        *[(6, 16)] * 2,
        (2, 16),
        (24, 2),
    ),
    "lora_linear": (lambda x, a, b: lora_linear(x, WEIGHT, None, a, b, 2.0, 0.1), (6, 16), (2, 16), (24, 2)),
    "LoraStack": (stack, (6, 16)),
    "frozen_linear": (lambda x: frozen_linear(x, WEIGHT, None), (6, 16)),
    "sparse_dropout": (lambda x: sparse_dropout(x, 0.1), (6, 16)),
    "rotary": (lambda q, k: torch.cat(apply_rotary_pos_emb(q, k, COS, COS), 1), (1, 2, 5, 8), (1, 1, 5, 8)),
    "cross_entropy": (lambda h: fused_linear_cross_entropy(h, WEIGHT, None, torch.arange(6)), (6, 16)),
    "varlen_attention": (lambda *rows: varlen_attention(*rows, PACK, 0.3, 7), *[(4, PACK.tokens, 8)] * 3),
    "attention with dropout": (lambda *rows: varlen_attention(*rows, PACK, 0.3, 7, 0.1), *[(4, PACK.tokens, 8)] * 3),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_waits_for_the_device(name: str, functions: str) -> None:
    if functions == "backend":
        pytest.skip("of the references alone")
    operator, *shapes = OPERATORS[name]
    with NeverWaiting():
        operator(*(tensor(*shape) for shape in shapes)).sum().backward()


def test_the_guard_sees_what_waits() -> None:
    for waits in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: (x > 0).nonzero(), lambda x: int(x.max())):
        with NeverWaiting(), pytest.raises(AssertionError, match=r"waits|mask"):
            waits(torch.randn(5))
