"""Gated MLPs (SwiGLU): which modules are one, and their fused forwards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llm_adapters.fast_paths import lora
from llm_adapters.fast_paths.rms_norm import close
from llm_adapters.ops.cpu.prepacked import PrepackedLinear
from llm_adapters.ops.swiglu import swiglu, swiglu_lora


def match(module: nn.Module) -> bool:
    """Tell whether `module` is ``down(silu(gate(x)) * up(x))``, by its children and by trying."""
    children = dict(module.named_children())
    act = children.pop("act_fn", getattr(module, "act_fn", None))
    if sorted(children) != ["down_proj", "gate_proj", "up_proj"] or list(module.parameters(recurse=False)):
        return False
    in_features = getattr(children["gate_proj"], "in_features", None)
    if not callable(act) or in_features is None:
        return False
    weight = next(children["gate_proj"].parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # a quantised one takes any
    x = torch.randn(1, 3, in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    with torch.no_grad():
        try:
            return torch.equal(act(x), functional.silu(x)) and close(forward(module, x), module(x))
        except Exception:  # a module that takes something else is simply not this one
            return False


def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a gated MLP with the gate's product in one function, and with a fused LoRA after it in the same."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    down = module.down_proj
    hooked = down._forward_hooks or down._forward_pre_hooks  # would not see the call
    parts = None if hooked or not lora.is_fused(down) else lora.active_weights(down, gate.dtype)
    return down(swiglu(gate, up)) if parts is None else swiglu_lora(gate, up, *parts)


def inference_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Make the forward of a gated MLP of prepacked layers, which activates (and without a LoRA on `up_proj`
    multiplies) while it computes the linear layer; None for another MLP."""
    gate, up = (vars(part).get("forward") for part in (module.gate_proj, module.up_proj))
    if not isinstance(gate, PrepackedLinear):
        return None
    if not isinstance(up, PrepackedLinear):  # it has a LoRA
        return lambda x: module.down_proj(module.up_proj(x).mul_(gate.silu(x)))
    return lambda x: module.down_proj(up.times(x, gate.silu(x)))
