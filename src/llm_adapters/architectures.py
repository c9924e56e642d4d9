"""WHERE adapters go: one row per model family, and structural discovery for families without one.

Every decoder layer has two sub-layers, attention and MLP. A row names, relative to a decoder layer, the module each
adapter needs. The list of decoder layers itself is found by structure, so that a row holds for a model with or without
its language-model head.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llm_adapters.errors import RequestError

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

PLACEMENTS = ("attention", "mlp")


@dataclass(frozen=True)
class Sublayer:
    """Start and end of one sub-layer, as module names relative to a decoder layer.

    Attributes:
        output: the module whose output is the sub-layer's output **before** the residual is added. Where a family
            normalises or scales that output before adding it (gemma2, olmo2, granite), this is the block itself: its
            output before the norm, which is also what LoRA on the block's last projection changes.
        input: the module whose input is the sub-layer's input (after the layer's norm). Empty: the `output` module's
            own input. Named where a block adds the residual itself (BLOOM, MPT) or there is no block (OPT's MLP).
    """

    output: str
    input: str = ""


@dataclass(frozen=True)
class Architecture:
    """One model family: which module plays which role in a decoder layer.

    Attributes:
        attention, mlp: the two sub-layers, for series and parallel adapters.
        qkv: the attention's input projections (one name where they are fused).
        o: the attention's output projection.
        up: the MLP's input projections without its gate; `gate`: the gate, where it is a projection of its own.
        down: the MLP's output projection. Empty where the MLP is a mixture of experts, which has no plain linear.
        conv1d: projections are transformers' `Conv1D`, whose weight is stored transposed.
    """

    attention: Sublayer
    mlp: Sublayer
    qkv: tuple[str, ...] = ()
    o: str = ""
    up: str = ""
    down: str = ""
    gate: str = ""
    conv1d: bool = False
    discovered: bool = field(default=False, compare=False)

    def sublayer(self, placement: str) -> Sublayer:
        """The sub-layer of that name: ``"attention"`` or ``"mlp"``."""
        return self.attention if placement == "attention" else self.mlp

    @property
    def lora_targets(self) -> list[str]:
        """The projections that the paper's recipes give LoRA: q, k, v, up and down (arXiv 2304.01933, section 3)."""
        return [name for name in (*self.qkv, self.up, self.down) if name]


def _separate_qkv(block: str, names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


_LLAMA = Architecture(
    attention=Sublayer("self_attn"),
    mlp=Sublayer("mlp"),
    qkv=_separate_qkv("self_attn"),
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
_GLM = Architecture(  # gate and up are one projection
    attention=Sublayer("self_attn"),
    mlp=Sublayer("mlp"),
    qkv=_separate_qkv("self_attn"),
    o="self_attn.o_proj",
    up="mlp.gate_up_proj",
    down="mlp.down_proj",
)
_MIXTURE = Architecture(  # the experts are fused parameters, not linears
    attention=Sublayer("self_attn"),
    mlp=Sublayer("mlp"),
    qkv=_separate_qkv("self_attn"),
    o="self_attn.o_proj",
)

FAMILIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo2": _LLAMA,
    "granite": _LLAMA,
    "stablelm": _LLAMA,
    "cohere": _LLAMA,
    "smollm3": _LLAMA,
    "glm": _GLM,
    "glm4": _GLM,
    "phi3": Architecture(
        attention=Sublayer("self_attn"),
        mlp=Sublayer("mlp"),
        qkv=("self_attn.qkv_proj",),
        o="self_attn.o_proj",
        up="mlp.gate_up_proj",
        down="mlp.down_proj",
    ),
    "phi": Architecture(
        attention=Sublayer("self_attn"),
        mlp=Sublayer("mlp"),
        qkv=_separate_qkv("self_attn"),
        o="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
    ),
    "starcoder2": Architecture(
        attention=Sublayer("self_attn"),
        mlp=Sublayer("mlp"),
        qkv=_separate_qkv("self_attn"),
        o="self_attn.o_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    "bloom": Architecture(  # both blocks add the residual themselves
        attention=Sublayer(output="self_attention.dense", input="self_attention.query_key_value"),
        mlp=Sublayer(output="mlp.dense_4h_to_h", input="mlp.dense_h_to_4h"),
        qkv=("self_attention.query_key_value",),
        o="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    "gptj": Architecture(  # attention and MLP run side by side from one norm
        attention=Sublayer("attn"),
        mlp=Sublayer("mlp"),
        qkv=_separate_qkv("attn"),
        o="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
    ),
    "gpt2": Architecture(
        attention=Sublayer("attn"),
        mlp=Sublayer("mlp"),
        qkv=("attn.c_attn",),
        o="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        conv1d=True,
    ),
    "gpt_neo": Architecture(
        attention=Sublayer("attn"),
        mlp=Sublayer("mlp"),
        qkv=_separate_qkv("attn.attention"),
        o="attn.attention.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    "gpt_neox": Architecture(
        attention=Sublayer("attention"),
        mlp=Sublayer("mlp"),
        qkv=("attention.query_key_value",),
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    "opt": Architecture(  # the MLP has no module of its own
        attention=Sublayer("self_attn"),
        mlp=Sublayer(output="fc2", input="fc1"),
        qkv=_separate_qkv("self_attn"),
        o="self_attn.out_proj",
        up="fc1",
        down="fc2",
    ),
    "falcon": Architecture(
        attention=Sublayer("self_attention"),
        mlp=Sublayer("mlp"),
        qkv=("self_attention.query_key_value",),
        o="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    "mpt": Architecture(  # the MLP adds the residual itself
        attention=Sublayer("attn"),
        mlp=Sublayer(output="ffn.down_proj", input="ffn.up_proj"),
        qkv=("attn.Wqkv",),
        o="attn.out_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
    ),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "olmoe": _MIXTURE,
}


@dataclass(frozen=True)
class Site:
    """One sub-layer of a model, where a series or parallel adapter goes; names are full module names in that model."""

    layer: int
    placement: str
    output: str
    input: str


def text_config(model: Any) -> Any:
    """The configuration of the text decoder (of a multimodal model, that of its language part)."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_layers(model: "nn.Module", inside: Iterable[str] = ()) -> tuple[str, "nn.ModuleList"]:
    """Find the list of decoder layers: the one `ModuleList` as long as the configuration says.

    Args:
        model: a transformers model, with or without its head, wrapped by PEFT or not.
        inside: module names that every layer must have; it tells the decoder from lists of equal length.

    Returns:
        The list's module name in `model`, and the list.

    Raises:
        RequestError: there is no such list, or more than one.
    """
    from torch import nn

    count = getattr(text_config(model), "num_hidden_layers", None)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or len(module) != count:
            continue
        if all(_has(layer, wanted) for layer in module for wanted in inside):
            found.append((name, module))
    # A list inside a found one (the experts of a layer, say) is not the decoder's.
    found = [f for f in found if not any(f[0].startswith(other + ".") for other, _ in found)]
    if len(found) != 1:
        what = ", ".join(name for name, _ in found) or "none"
        raise RequestError(
            f"cannot tell the list of {count} decoder layers of {type(model).__name__} (candidates: {what}); "
            "name the modules to adapt with target_modules"
        )
    return found[0]


def architecture_of(model: "nn.Module") -> Architecture:
    """Find the row of the model's family, or one discovered from its structure (which is then logged).

    Raises:
        RequestError: no row, and the structure is ambiguous; the message shows the candidates.
    """
    config = text_config(model)
    family = getattr(config, "model_type", None)
    if family in FAMILIES:
        return FAMILIES[family]
    return discover(model)


def sites(model: "nn.Module", placement: Iterable[str], layers: Iterable[int] | None = None) -> list[Site]:
    """List the sites for series or parallel adapters in `model`, in layer order.

    Args:
        model: a transformers decoder; adapters may already be in it.
        placement: ``"attention"``, ``"mlp"`` or both.
        layers: indices of the decoder layers to use, negative ones counting from the end; None for all.

    Raises:
        RequestError: an index out of range, or a family that cannot be told (see `architecture_of`).
    """
    architecture = architecture_of(model)
    wanted = [architecture.sublayer(p).output for p in placement]
    prefix, stack = decoder_layers(model, inside=wanted)
    indices = range(len(stack)) if layers is None else sorted({checked_index(i, len(stack)) for i in layers})
    result = []
    for index in indices:
        for p in PLACEMENTS:
            if p in placement:
                sub = architecture.sublayer(p)
                start = f"{prefix}.{index}."
                result.append(Site(index, p, start + sub.output, start + (sub.input or sub.output)))
    return result


def discover(model: "nn.Module") -> Architecture:
    """Tell attention and MLP of an unknown family from the structure of its decoder layers.

    A decoder layer's children that hold matrices are its blocks; the one whose class is an attention is the attention
    and the only other one is the MLP, the same in every layer. A block that adds the residual itself ends somewhere
    inside, which only its author knows: that is an error, not a guess. What was found is logged.

    Raises:
        RequestError: not exactly one attention and one other block; lists what was found in the first such layer.
    """
    prefix, stack = decoder_layers(model)
    family = getattr(text_config(model), "model_type", type(model).__name__)
    for index, layer in enumerate(stack):
        blocks = {name: child for name, child in layer.named_children() if any(p.dim() > 1 for p in child.parameters())}
        attentions = [name for name, child in blocks.items() if _is_attention(child)]
        others = [name for name in blocks if name not in attentions]
        roles = (attentions, others)
        if index == 0:
            first = roles
        clear = len(attentions) == len(others) == 1 and not any(_adds_residual(block) for block in blocks.values())
        if not clear or roles != first:
            seen = ", ".join(f"{name} ({type(_unwrapped(child)).__name__})" for name, child in blocks.items())
            raise RequestError(
                f"the family {family!r} has no row and its layers are ambiguous: {prefix}.{index} holds {seen}. Name "
                "the modules with target_modules and insertion (before, after or parallel), or add a row to "
                "architectures.FAMILIES"
            )
    (attention,), (mlp,) = first
    # LoRA's targets, where the projections have the names that most families give them.
    projections = {f"{attention}.{p}_proj" for p in "qkvo"} | {f"{mlp}.{p}_proj" for p in ("gate", "up", "down")}
    usual = {name for name in projections if all(_has(layer, name) for layer in stack)}
    qkv = _separate_qkv(attention)

    def if_usual(name: str) -> str:
        return name if name in usual else ""

    found = Architecture(
        attention=Sublayer(attention),
        mlp=Sublayer(mlp),
        qkv=qkv if usual.issuperset(qkv) else (),
        o=if_usual(f"{attention}.o_proj"),
        gate=if_usual(f"{mlp}.gate_proj"),
        up=if_usual(f"{mlp}.up_proj"),
        down=if_usual(f"{mlp}.down_proj"),
        discovered=True,
    )
    logger.warning(
        "the family %r has no row; found by structure in %s: attention = %s, MLP = %s",
        family,
        prefix,
        found.attention.output,
        found.mlp.output,
    )
    return found


def _is_attention(block: "nn.Module") -> bool:
    return "attention" in type(_unwrapped(block)).__name__.lower()


def _adds_residual(block: "nn.Module") -> bool:
    """True where the block adds the residual itself: it takes it as an argument, or norms its attention's input."""
    import inspect

    block = _unwrapped(block)
    inside = [child for _, child in block.named_children()]
    norms = any("norm" in type(child).__name__.lower() for child in inside)
    return "residual" in inspect.signature(block.forward).parameters or (norms and any(map(_is_attention, inside)))


def _unwrapped(module: Any) -> Any:
    while "base_layer" in getattr(module, "_modules", ()):
        module = module.base_layer
    return module


def submodule(module: "nn.Module", name: str) -> "nn.Module | None":
    """Find the descendant of that dotted name, None for none; adapter layers in between are looked through."""
    here: Any = module
    for part in name.split("."):
        here = _unwrapped(here)._modules.get(part)
        if here is None:
            return None
    return here


def _has(module: "nn.Module", name: str) -> bool:
    return submodule(module, name) is not None


def checked_index(index: int, count: int) -> int:
    """`index` as a layer's number from 0; a negative one counts from the end of `count` layers.

    Raises:
        RequestError: there is no such layer.
    """
    if not -count <= index < count:
        raise RequestError(f"layer {index} does not exist: the model has {count} layers, 0 to {count - 1}")
    return index % count
