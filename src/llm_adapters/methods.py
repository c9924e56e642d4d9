"""The names people type for an adapter method, each a row that becomes a `PeftConfig` for the model at hand.

Series and parallel adapters and their fusion are this package's; every other method is PEFT's own. A row says which
options it starts from, where it goes on a model (from the architecture row), and what it can do; tests and docs read
the same rows.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llm_adapters import architectures
from llm_adapters.compat.peft import config_classes
from llm_adapters.errors import RequestError, first_line, unknown

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

# Set by this package or by PEFT, not by a person.
_INTERNAL = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version"}


def _lora_options(model: "nn.Module") -> dict[str, Any]:
    architecture = architectures.architecture_of(model)
    return {"target_modules": architecture.lora_targets} | ({"fan_in_fan_out": True} if architecture.conv1d else {})


def _targets_of_lora(model: "nn.Module") -> dict[str, Any]:
    return {"target_modules": architectures.architecture_of(model).lora_targets}


def _ia3_options(model: "nn.Module") -> dict[str, Any]:
    """Keys, values and the MLP's inner activations (Liu et al. 2022, section 3.3)."""
    architecture = architectures.architecture_of(model)
    attention = list(architecture.qkv[1:] or architecture.qkv)
    feedforward = [architecture.down] if architecture.down else []
    targets: dict[str, Any] = {"target_modules": attention + feedforward, "feedforward_modules": feedforward}
    return targets | ({"fan_in_fan_out": True} if architecture.conv1d else {})


def _prompt_options(model: "nn.Module") -> dict[str, Any]:
    """Sizes of the decoder, which PEFT does not find under every family's names for them (MPT)."""
    config = architectures.text_config(model)
    return {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "token_dim": config.hidden_size,
    }


# What a method may be able to do: be merged into the base weights (exactly, up to rounding); have several adapters in
# one batch (`adapter_names`); give the same gradients with gradient checkpointing.
CAPABILITIES = ("merge", "mixed_batch", "recompute")


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: what people type.
        summary: one line for help and docs, with its source.
        peft_type: PEFT's name of the method.
        defaults: options that differ from PEFT's own defaults; the paper's recipe where the paper has one.
        model_options: the options that the model decides (target modules, or sizes); None where PEFT needs none.
        can: those of `CAPABILITIES` that it has; None where this project has not tried it.
    """

    name: str
    summary: str
    peft_type: str
    defaults: dict[str, Any] = field(default_factory=dict)
    model_options: Callable[["nn.Module"], dict[str, Any]] | None = None
    can: frozenset[str] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Every option with the value it starts from."""
        declared = {f.name: _default(f) for f in dataclasses.fields(_config_class(self)) if f.name not in _INTERNAL}
        return declared | self.defaults


_SERIES = {"insertion": "series", "placement": ["mlp"]}
_PARALLEL = {"insertion": "parallel", "placement": ["mlp"]}
_SCALED = {**_PARALLEL, "scaling": 4.0, "non_linearity": "relu"}
_LORA = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05}
_RSLORA = {"r": 32, "lora_alpha": 8, "lora_dropout": 0.05, "use_rslora": True}
_TOKENS = {"num_virtual_tokens": 10}

_ALL = frozenset(CAPABILITIES)
_ALL_BUT_MERGE = _ALL - {"merge"}
_ALL_BUT_MIXED = _ALL - {"mixed_batch"}
_RECOMPUTE = frozenset({"recompute"})

METHODS: dict[str, Method] = {
    row[0]: Method(*row)
    for row in (
        ("series", "bottleneck after the MLP (Houlsby et al. 2019; arXiv 2304.01933, eq. 2)",
         "BOTTLENECK", _SERIES, None, _ALL_BUT_MERGE),
        ("parallel", "bottleneck beside the MLP (He et al. 2022; arXiv 2304.01933, eq. 4)",
         "BOTTLENECK", _PARALLEL, None, _ALL_BUT_MERGE),
        ("scaled-parallel", "parallel adapter with ReLU and a factor of 4 (He et al. 2022, section 4.6)",
         "BOTTLENECK", _SCALED, None, _ALL_BUT_MERGE),
        ("mam", "mix-and-match: scaled parallel adapter and a prefix in the attention (He et al. 2022, section 4.6)",
         "BOTTLENECK", {**_SCALED, "bottleneck_size": 512, "prefix_length": 30}, None, _ALL_BUT_MERGE),
        ("fusion", "attention over trained, frozen series and parallel adapters (Pfeiffer et al. 2021)",
         "FUSION", {}, None, _ALL_BUT_MERGE),
        ("lora", "low-rank update of projections (Hu et al. 2022)", "LORA", _LORA, _lora_options, _ALL),
        ("dora", "LoRA with the weight's magnitude trained apart (Liu et al. 2024)",
         "LORA", {**_LORA, "use_dora": True}, _lora_options, _ALL_BUT_MIXED),
        ("rslora", "LoRA scaled by the square root of its rank (Kalajdzievski 2023)",
         "LORA", _RSLORA, _lora_options, _ALL),
        ("ia3", "a learned factor per key, value and MLP channel (Liu et al. 2022)",
         "IA3", {}, _ia3_options, _ALL_BUT_MIXED),
        ("prefix", "learned keys and values before the sequence, in every layer (Li and Liang 2021)",
         "PREFIX_TUNING", _TOKENS, _prompt_options, frozenset()),
        ("prompt", "learned embeddings before the sequence (Lester et al. 2021)",
         "PROMPT_TUNING", _TOKENS, _prompt_options, _RECOMPUTE),
        ("p-tuning", "embeddings before the sequence, made by a small network (Liu et al. 2021)",
         "P_TUNING", _TOKENS, _prompt_options, _RECOMPUTE),
    )
}  # fmt: skip


def get(name: str) -> Method:
    """The row called `name`, or one made for a PEFT method of that name (``"vera"``, ``"adalora"``, ``"boft"``, ...).

    Raises:
        RequestError: no such method; lists the rows and PEFT's own.
    """
    if name in METHODS:
        return METHODS[name]
    others = config_classes()
    key = name.upper().replace("-", "_")
    if key in others:
        has_targets = any(f.name == "target_modules" for f in dataclasses.fields(others[key]))
        return Method(name, "as PEFT documents it", key, model_options=_targets_of_lora if has_targets else None)
    raise unknown("method", name, [*METHODS, *map(str.lower, others)])


def check_options(method: str, options: Iterable[str]) -> Method:
    """Row of `method`, once the names of its `options` are known to be right.

    Raises:
        RequestError: unknown method or option; the allowed ones are listed.
    """
    row = get(method)
    for option in options:
        if option not in row.options:
            raise unknown(f"option of {row.name}", option, row.options)
    return row


def adapter_config(method: str, model: "nn.Module", **options: Any) -> "PeftConfig":
    """The PEFT configuration of `method` for `model`.

    Args:
        method: a name of `METHODS`, or any PEFT method by PEFT's own name.
        model: the transformers decoder that it is for; it says where the adapter goes.
        options: the method's own options, by PEFT's names (`BottleneckConfig`'s for series and parallel). What they
            leave open comes from the method's row, then from the model's architecture row, then from PEFT.

    Raises:
        RequestError: unknown method or option (the allowed ones are listed), or a value that the method refuses.
    """
    row = check_options(method, options)
    values: dict[str, Any] = {**row.defaults, **options}
    if row.model_options is not None and not {"target_modules", "target_parameters"} & {
        k for k, v in options.items() if v
    }:
        if options.get("target_modules") is not None:
            raise RequestError("target_modules is empty: name modules, or leave it out for the usual ones")
        values = {**row.model_options(model), **{k: v for k, v in values.items() if k != "target_modules"}}
        if values.get("target_modules") == []:
            raise RequestError(
                f"no default target for {row.name} on {type(model).__name__}: name the modules with target_modules"
            )
    try:
        return _config_class(row)(task_type="CAUSAL_LM", **values)
    except RequestError:
        raise
    except Exception as error:  # PEFT raises many kinds, all about its options
        raise RequestError(f"{row.name} refuses its options: {first_line(error)}") from error


def _config_class(row: Method) -> Any:
    return config_classes()[row.peft_type]


def _default(entry: "dataclasses.Field[Any]") -> Any:
    if entry.default is not dataclasses.MISSING:
        return entry.default
    factory = typing.cast(Any, entry.default_factory)
    return None if factory is dataclasses.MISSING else factory()
