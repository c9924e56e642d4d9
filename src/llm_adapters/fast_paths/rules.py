"""The fast paths of single modules, a row each: what they match, what they put in its place, and where they do not."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llm_adapters.bottleneck.layer import BottleneckLayer
from llm_adapters.compat.transformers import ROTARY_FUNCTION
from llm_adapters.fast_paths import bottleneck, linear, lora, quantized, rms_norm, rotary, swiglu
from llm_adapters.fast_paths.patches import Patches
from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops import backends
from llm_adapters.ops.cpu.prepacked import PrepackedLinear
from llm_adapters.ops.linear import is_fast

TRAINING, INFERENCE = "training", "inference"
BOTH = frozenset((TRAINING, INFERENCE))


@dataclass
class Context:
    """The model that fast paths are for, and the session that wants them.

    Attributes:
        base: the causal model.
        inference: weights do not change.
        merge: LoRA may be merged into copies of the weights.
        route: which adapter computes which rows; None for one adapter.
        unpackable: why weights are not prepacked; None where they are.
        on: names of the rows that are on.
    """

    base: Any
    inference: bool = False
    merge: bool = False
    route: Route | None = None
    unpackable: str | None = "for generation"
    on: set[str] = field(default_factory=set)

    @property
    def prepack(self) -> bool:
        """True where weights are laid out once, in blocks."""
        return self.unpackable is None

    @functools.cached_property
    def inside_lora(self) -> set[int]:
        """The ids of the parts of LoRA layers, whose forward has its own copy of them."""
        layers = (m for m in self.base.modules() if lora.base_weight(m) is not None)
        return {id(part) for layer in layers for part in layer.modules() if part is not layer}


@dataclass(frozen=True)
class FastPath:
    """A faster way to compute modules of one kind.

    Attributes:
        name: for the report.
        match: ``match(module, context)``: what `install` needs to know of a module of this kind; None for others.
        install: ``install(module, matched, context, patches)``: give the module its faster forward. False where that
            is not possible after all.
        modes: in training, in inference or in both.
        unsupported_reason: why there is none in this session, for all modules; None where there may be.
        whole_layer: the trial compares the decoder layer around the module: it reads what others leave for it.
    """

    name: str
    match: Callable[[nn.Module, Context], Any]
    install: Callable[[Any, Any, Context, Patches], bool]
    modes: frozenset[str] = BOTH
    unsupported_reason: Callable[[Context], str | None] = lambda context: None
    whole_layer: bool = False


def _set_forward(module: nn.Module, forward: Any, patches: Patches) -> bool:
    if forward is not None:
        patches.set(module, "forward", forward)
    return forward is not None


def _match_lora(module: nn.Module, context: Context) -> Any:
    return lora.base_weight(module)


def _merge_lora(module: nn.Module, matched: Any, context: Context, patches: Patches) -> bool:
    return _set_forward(module, lora.merged_forward(module, context.prepack), patches)


def _install_lora(module: nn.Module, matched: Any, context: Context, patches: Patches) -> bool:
    if not context.inference:
        return _set_forward(module, functools.partial(lora.forward, module, module.forward), patches)
    return _set_forward(module, lora.inference_forward(module, context.route, context.prepack), patches)


def _install_quantized_lora(module: nn.Module, matched: Any, context: Context, patches: Patches) -> bool:
    return _set_forward(module, functools.partial(quantized.forward, module, module.forward), patches)


def _match_prepacked(module: nn.Module, context: Context) -> Any:
    fits = type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and id(module) not in context.inside_lora
    return True if fits else None


def _prepack(module: Any, matched: Any, context: Context, patches: Patches) -> bool:
    return _set_forward(module, PrepackedLinear(module.weight, module.bias), patches)


def _match_linear(module: nn.Module, context: Context) -> Any:
    head = module is context.base.get_output_embeddings()  # its product is in the loss
    return True if not head and id(module) not in context.inside_lora and linear.match(module) else None


def _install_linear(module: nn.Module, matched: Any, context: Context, patches: Patches) -> bool:
    return _set_forward(module, functools.partial(linear.forward, module, module.forward), patches)


def _no_linear(context: Context) -> str | None:
    weight = next(context.base.parameters())
    if reason := backends.unsupported_reason(context.base.dtype, weight.device.type):
        return reason
    return None if is_fast(weight) else "the processor or the precision has none"


def _match_bottleneck(module: nn.Module, context: Context) -> Any:
    return True if isinstance(module, BottleneckLayer) else None


def _install_bottleneck(module: nn.Module, matched: Any, context: Context, patches: Patches) -> bool:
    if context.inference:
        delta = functools.partial(bottleneck.inference_delta, module, {}, context.prepack)
    else:
        delta = functools.partial(bottleneck.delta, module)
    patches.set(module, "delta", delta)
    if context.route is not None:
        patches.set(module, "routing", context.route.names)
        patches.set(module, "add", functools.partial(bottleneck.routed_add, module, context.route))
    return True


def _install_rms_norm(module: nn.Module, matched: Any, context: Context, patches: Patches) -> bool:
    return _set_forward(module, functools.partial(rms_norm.forward, module.forward, *matched), patches)


def _install_swiglu(module: nn.Module, matched: Any, context: Context, patches: Patches) -> bool:
    own = swiglu.inference_forward(module) if context.inference else None
    return _set_forward(module, own or functools.partial(swiglu.forward, module), patches)


def _install_rotary(module: nn.Module, file: Any, context: Context, patches: Patches) -> bool:
    patches.share(file, ROTARY_FUNCTION, rotary.apply_rotary_pos_emb)
    return True


# In the order in which they are installed: a row meets the forwards that those above it have set.
FAST_PATHS = (
    FastPath(
        "LoRA merged",
        _match_lora,
        _merge_lora,
        frozenset((INFERENCE,)),
        lambda context: None if context.merge else "not asked for",
    ),
    FastPath(
        "LoRA",
        _match_lora,
        _install_lora,
        unsupported_reason=lambda context: "it is merged" if "LoRA merged" in context.on else None,
    ),
    FastPath(
        "LoRA beside quantised weights",
        lambda module, context: quantized.match(module) or None,
        _install_quantized_lora,
        unsupported_reason=lambda context: "each row has its own adapter" if context.route is not None else None,
    ),
    FastPath(
        "prepacked weights",
        _match_prepacked,
        _prepack,
        frozenset((INFERENCE,)),
        lambda context: context.unpackable,
    ),
    FastPath("frozen linear", _match_linear, _install_linear, frozenset((TRAINING,)), _no_linear),
    FastPath("bottleneck", _match_bottleneck, _install_bottleneck, whole_layer=True),
    FastPath("RMS norm", lambda module, context: rms_norm.match(module), _install_rms_norm),
    FastPath("SwiGLU", lambda module, context: swiglu.match(module) or None, _install_swiglu),
    FastPath(
        "rotary positions",
        lambda module, context: rotary.modelling_file(module) if module is context.base else None,
        _install_rotary,
    ),
)
