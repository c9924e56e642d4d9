"""Private interfaces of PEFT, imported late: loading PEFT registers this package's methods, which need this module.

Methods of PEFT's own classes that this package overrides or calls are in `MEMBERS`; `_enable_peft_forward_hooks`, which
`PeftModel` calls on a tuner that has it, is overridden too.
"""

import contextlib
import enum
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner
    from torch import nn

NO_ADAPTER = "__base__"  # in `adapter_names`: none for this sequence

# Class (in peft.tuners.tuners_utils) -> its non-public method -> the parameters that it is called with.
MEMBERS: dict[str, dict[str, tuple[str, ...]]] = {
    "BaseTuner": {
        "_check_merge_allowed": ("self",),
        "_check_target_module_exists": ("peft_config", "key"),
        "_create_and_replace": (
            "self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"
        ),
        "_prepare_adapter_config": ("self", "peft_config", "model_config"),
        "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
        "_remove_adapter_name_from_key": ("key", "adapter_name"),
        "_replace_module": ("self", "parent", "child_name", "new_module", "child"),
    },
    "BaseTunerLayer": {
        "_cast_input_dtype": ("self", "x", "dtype"),
        "_get_base_layer_device_and_dtype": ("self", "base_layer"),
        "_move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
    },
}  # fmt: skip


def register_method(key: enum.Enum, config: "type[PeftConfig]", tuner: "type[BaseTuner]") -> None:
    """Make a method known to PEFT; calling it again changes nothing.

    PEFT's own `register_peft_method` refuses every name outside its closed enum, so this fills the same three tables,
    after the same checks that the name and the prefix are free.

    Args:
        key: the method's name, a `str` enumeration (PEFT compares it with strings, transformers asks for `.value`).
        config: its configuration.
        tuner: its tuner, which has the prefix.

    Raises:
        KeyError: another package has taken the name or the prefix.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    if PEFT_TYPE_TO_CONFIG_MAPPING.get(key) is config:
        return
    if key in PEFT_TYPE_TO_CONFIG_MAPPING or key in PEFT_TYPE_TO_TUNER_MAPPING:
        raise KeyError(f"there is already a PEFT method called {key.value!r}")
    if tuner.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise KeyError(f"there is already a PEFT method with the prefix {tuner.prefix!r}")
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner


def config_classes() -> "dict[str, type[PeftConfig]]":
    """Configuration class of every method that PEFT knows, this package's included, by PEFT's name of the method."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {key.value: config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def features(module: "nn.Module") -> tuple[int | None, int | None]:
    """Numbers of features that a layer takes and gives; None where PEFT does not know its kind."""
    import warnings

    from peft.tuners.tuners_utils import _get_in_out_features

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        return _get_in_out_features(module)


def is_plain_lora_linear(layer: "nn.Module") -> bool:
    """True for PEFT's LoRA on a linear layer that is not quantised; its class says nothing of its adapters yet."""
    from peft.tuners.lora.layer import Linear

    return type(layer) is Linear


def is_quantized_lora_linear(layer: "nn.Module") -> bool:
    """True for PEFT's LoRA on one of bitsandbytes' linear layers."""
    kind = type(layer)  # without bitsandbytes, PEFT does not define them
    return kind.__module__ == "peft.tuners.lora.bnb" and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def is_plain_lora_adapter(layer: Any, name: str) -> bool:
    """True where the adapter `name` of a LoRA layer is ``s * x A^T B^T`` and no more (no DoRA, no bias of its own)."""
    return not (layer.lora_variant.get(name) or layer.lora_bias.get(name))


@contextlib.contextmanager
def routed_module_copies(model: "nn.Module", names: Sequence[str]) -> Iterator[None]:
    """Route each row through its adapter's own copy of a `modules_to_save` module, during one call of `model`.

    Args:
        model: the model, whose copied modules are wrapped by PEFT.
        names: the adapter of each sequence; `NO_ADAPTER`, or one without a copy, takes the base model's module.
    """
    from peft.utils import AuxiliaryTrainingWrapper

    copies = {m: m._active_adapter for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    handles = []

    def pass_names(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        repeats = args[0].shape[0] // len(names) if args else 1  # beams multiply the rows
        own = [name if name in module._adapters else NO_ADAPTER for name in names for _ in range(repeats)]
        return args, {**kwargs, "adapter_names": own}

    try:
        for module in copies:  # PEFT routes nothing through one that the active adapter has no copy of
            module._active_adapter = sorted(module._adapters)[:1]
            handles.append(module.register_forward_pre_hook(pass_names, with_kwargs=True))
        yield
    finally:
        for module, active in copies.items():
            module._active_adapter = active
        for handle in handles:
            handle.remove()
