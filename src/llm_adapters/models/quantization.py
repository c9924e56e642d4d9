"""Base models in fewer bits, by bitsandbytes: the frozen weights alone, with adapters beside them (QLoRA).

``nf4`` stores 4 bits a weight (Dettmers et al. 2023), ``int8`` 8 bits, with what is far off the rest in float16
(Dettmers et al. 2022). The linear layers inside the decoder are quantised; embeddings, norms, the output head and
adapters are not. Products are computed in the precision of the model, for which a layer's weights are restored.
"""

import importlib.util
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llm_adapters.compat.bitsandbytes import keep_layout, silence_casts
from llm_adapters.errors import RequestError, unknown

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

KINDS = ("nf4", "int8")
# PEFT's names of the methods that give the same results and gradients on quantised weights as on the same weights
# restored. Others take the packed weights for weights, most of them with an error, some without.
METHODS = frozenset(
    (
        *("ADALORA", "BEFT", "BOFT", "BOTTLENECK", "FOURIERFT", "FUSION", "GRALORA", "HIRA", "IA3", "LILY", "LORA"),
        *("MISS", "OFT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "RANDLORA", "ROAD", "SHIRA", "VERA"),
        "WAVEFT",
    )
)


@dataclass(frozen=True)
class Quantization:
    """How a base model's weights are stored.

    Attributes:
        kind: ``"nf4"`` or ``"int8"``.
        double: with nf4, the scales of its blocks are quantised too, which saves 0.4 bits a weight.

    Raises:
        RequestError: another kind.
    """

    kind: str
    double: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("quantization", self.kind, KINDS)
        if not isinstance(self.double, bool):
            raise RequestError(f"double_quantization is {self.double!r}: it must be true or false")

    @classmethod
    def of(cls, settings: "dict[str, Any]") -> "Quantization | None":
        """What the section `model` of a recipe, or an adapter's note, says; None where nothing is quantised."""
        kind = settings.get("quantization")
        return cls(kind, settings.get("double_quantization", True)) if kind else None

    def __str__(self) -> str:
        return f"{self.kind}, double quantisation" if self.kind == "nf4" and self.double else self.kind

    def to_dict(self) -> dict[str, Any]:
        """For records."""
        return asdict(self)

    def require(self) -> None:
        """Refuse it where bitsandbytes is not installed.

        Raises:
            RequestError: it is not.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise RequestError(
                f"the quantization {self.kind} needs bitsandbytes, which is not installed: install the extra "
                "llm-adapter-family[quantization], or leave model.quantization out"
            )

    def config(self, dtype: "torch.dtype") -> "BitsAndBytesConfig":
        """What transformers takes to load a model whose products are computed in `dtype`."""
        from transformers import BitsAndBytesConfig

        if self.kind == "int8":
            silence_casts()
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=dtype,
        )

    def finish(self, model: "nn.Module") -> None:
        """Make a model that was loaded with `config` fit to be trained."""
        keep_layout(model)


def check_optimizer(name: str) -> None:
    """Refuse an optimiser of bitsandbytes where that is not installed; `name` is transformers'.

    Raises:
        RequestError: it is not.
    """
    if ("8bit" in name or "paged" in name) and importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError(
            f"the optimizer {name} needs bitsandbytes, which is not installed: install the extra "
            "llm-adapter-family[quantization], or take adamw_torch_fused"
        )


def check_method(name: str, peft_type: str) -> None:
    """Refuse a method that does not work on quantised weights.

    Args:
        name: as it was asked for.
        peft_type: PEFT's name.

    Raises:
        RequestError: it does not, or nobody has shown that it does.
    """
    if peft_type not in METHODS:
        allowed = ", ".join(sorted(METHODS)).lower().replace("_", "-")
        raise RequestError(
            f"the method {name} does not work on a quantised base: leave model.quantization out, or choose one of "
            f"PEFT's {allowed}"
        )
