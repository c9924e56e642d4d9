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
from llm_adapters.errors import RequestError, unknown

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

# Set by this package or by PEFT, not by a person.
_INTERNAL = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version"}


def _lora_places(model: "nn.Module") -> dict[str, Any]:
    architecture = architectures.architecture_of(model)
    return {"target_modules": architecture.lora_targets} | ({"fan_in_fan_out": True} if architecture.conv1d else {})


def _same_places_as_lora(model: "nn.Module") -> dict[str, Any]:
    return {"target_modules": architectures.architecture_of(model).lora_targets}


def _ia3_places(model: "nn.Module") -> dict[str, Any]:
    """Keys, values and the MLP's inner activations (Liu et al. 2022, section 3.3)."""
    architecture = architectures.architecture_of(model)
    attention = list(architecture.qkv[1:] or architecture.qkv)
    feedforward = [architecture.down] if architecture.down else []
    where: dict[str, Any] = {"target_modules": attention + feedforward, "feedforward_modules": feedforward}
    return where | ({"fan_in_fan_out": True} if architecture.conv1d else {})


def _prompt_shape(model: "nn.Module") -> dict[str, Any]:
    """The decoder's sizes, which PEFT does not find under every family's names for them (MPT)."""
    config = architectures.text_config(model)
    return {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "token_dim": config.hidden_size,
    }


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: what people type.
        summary: one line for help and docs, with its source.
        peft_type: PEFT's name of the method.
        defaults: options that differ from PEFT's own defaults; the paper's recipe where the paper has one.
        places: the options that say where on a model, or how wide; None where PEFT needs none.
        mergeable: whether it can be merged into the base weights (exactly, up to rounding); None where this project
            has not tried it.
        mixed_batch: whether one batch may use several adapters (`adapter_names`); None likewise.
        recompute: whether gradient checkpointing gives the same gradients; None likewise.
    """

    name: str
    summary: str
    peft_type: str
    defaults: dict[str, Any] = field(default_factory=dict)
    places: Callable[["nn.Module"], dict[str, Any]] | None = None
    mergeable: bool | None = None
    mixed_batch: bool | None = None
    recompute: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Every option with the value it starts from."""
        declared = {f.name: _default(f) for f in dataclasses.fields(_config_class(self)) if f.name not in _INTERNAL}
        return declared | self.defaults


_LORA = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05}
_PARALLEL = {"insertion": "parallel", "placement": ["mlp"]}

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            "series",
            "bottleneck after the MLP (Houlsby et al. 2019; arXiv 2304.01933, eq. 2)",
            "BOTTLENECK",
            {"insertion": "series", "placement": ["mlp"]},
            mergeable=False,
            mixed_batch=True,
            recompute=True,
        ),
        Method(
            "parallel",
            "bottleneck beside the MLP (He et al. 2022; arXiv 2304.01933, eq. 4)",
            "BOTTLENECK",
            _PARALLEL,
            mergeable=False,
            mixed_batch=True,
            recompute=True,
        ),
        Method(
            "scaled-parallel",
            "parallel adapter with ReLU and a factor of 4 (He et al. 2022, section 4.6)",
            "BOTTLENECK",
            {**_PARALLEL, "scaling": 4.0, "non_linearity": "relu"},
            mergeable=False,
            mixed_batch=True,
            recompute=True,
        ),
        Method(
            "mam",
            "mix-and-match: scaled parallel adapter and a prefix in the attention (He et al. 2022, section 4.6)",
            "BOTTLENECK",
            {**_PARALLEL, "bottleneck_size": 512, "scaling": 4.0, "non_linearity": "relu", "prefix_length": 30},
            mergeable=False,
            mixed_batch=True,
            recompute=True,
        ),
        Method(
            "fusion",
            "attention over trained, frozen series and parallel adapters (Pfeiffer et al. 2021)",
            "FUSION",
            mergeable=False,
            mixed_batch=True,
            recompute=True,
        ),
        Method(
            "lora",
            "low-rank update of projections (Hu et al. 2022)",
            "LORA",
            _LORA,
            _lora_places,
            mergeable=True,
            mixed_batch=True,
            recompute=True,
        ),
        Method(
            "dora",
            "LoRA with the weight's magnitude trained apart (Liu et al. 2024)",
            "LORA",
            {**_LORA, "use_dora": True},
            _lora_places,
            mergeable=True,
            mixed_batch=False,
            recompute=True,
        ),
        Method(
            "rslora",
            "LoRA scaled by the square root of its rank (Kalajdzievski 2023)",
            "LORA",
            {"r": 32, "lora_alpha": 8, "lora_dropout": 0.05, "use_rslora": True},
            _lora_places,
            mergeable=True,
            mixed_batch=True,
            recompute=True,
        ),
        Method(
            "ia3",
            "a learned factor per key, value and MLP channel (Liu et al. 2022)",
            "IA3",
            {},
            _ia3_places,
            mergeable=True,
            mixed_batch=False,
            recompute=True,
        ),
        Method(
            "prefix",
            "learned keys and values before the sequence, in every layer (Li and Liang 2021)",
            "PREFIX_TUNING",
            {"num_virtual_tokens": 10},
            _prompt_shape,
            mergeable=False,
            mixed_batch=False,
            recompute=False,
        ),
        Method(
            "prompt",
            "learned embeddings before the sequence (Lester et al. 2021)",
            "PROMPT_TUNING",
            {"num_virtual_tokens": 10},
            _prompt_shape,
            mergeable=False,
            mixed_batch=False,
            recompute=True,
        ),
        Method(
            "p-tuning",
            "embeddings before the sequence, made by a small network (Liu et al. 2021)",
            "P_TUNING",
            {"num_virtual_tokens": 10},
            _prompt_shape,
            mergeable=False,
            mixed_batch=False,
            recompute=True,
        ),
    )
}


def get(name: str) -> Method:
    """The row called `name`, or one made for a PEFT method of that name (``"vera"``, ``"adalora"``, ``"boft"``, ...).

    Raises:
        RequestError: no such method; lists the rows and PEFT's own.
    """
    if name in METHODS:
        return METHODS[name]
    others = _peft_methods()
    key = name.lower().replace("-", "_")
    if key in others:
        config = others[key][1]
        has_targets = any(f.name == "target_modules" for f in dataclasses.fields(config))
        return Method(
            name, "as PEFT documents it", others[key][0], places=_same_places_as_lora if has_targets else None
        )
    raise unknown("method", name, [*METHODS, *others])


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
    if row.places is not None and not {"target_modules", "target_parameters"} & {k for k, v in options.items() if v}:
        values = {**row.places(model), **{k: v for k, v in values.items() if k != "target_modules"}}
        if values.get("target_modules") == []:
            raise RequestError(
                f"no default place for {row.name} on {type(model).__name__}: name the modules with target_modules"
            )
    try:
        return _config_class(row)(task_type="CAUSAL_LM", **values)
    except RequestError:
        raise
    except (TypeError, ValueError) as error:
        raise RequestError(f"{row.name} refuses its options: {error}") from error


def _peft_methods() -> dict[str, tuple[str, type]]:
    """PEFT's own methods: lower-case name -> (PEFT's key, configuration class)."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import llm_adapters.bottleneck
    import llm_adapters.fusion  # noqa: F401  their entries are in PEFT's table only after this

    return {key.value.lower(): (key.value, config) for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _config_class(row: Method) -> Any:
    return _peft_methods()[row.peft_type.lower()][1]


def _default(entry: "dataclasses.Field[Any]") -> Any:
    if entry.default is not dataclasses.MISSING:
        return entry.default
    factory = typing.cast(Any, entry.default_factory)
    return None if factory is dataclasses.MISSING else factory()
