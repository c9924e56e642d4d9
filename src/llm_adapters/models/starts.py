"""Starts of LoRA that take a part of the base's weights into the adapter (PiSSA, OLoRA).

While such an adapter is on a model, the base is not the base any more: it lacks the part that the adapter began with.
What is saved is therefore a plain LoRA of twice the rank, the trained one less its start, which PEFT makes: it needs
no changed base, draws nothing anew when it is loaded, and has neighbours like any other.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llm_adapters.compat.peft import NO_ADAPTER
from llm_adapters.errors import RequestError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

_TAKING = ("pissa", "olora", "corda", "lora_ga", "loftq")  # values of `init_lora_weights`, or how they begin
_REMEDY = "choose true, gaussian, orthogonal, pissa or olora"
_UNSUPPORTED = {
    "eva": "looks at data before training, which `train` does not do",
    "corda": "looks at data before training, which `train` does not do",
    "lora_ga": "looks at gradients before training, which `train` does not do",
    "loftq": "leaves a base model that only itself can make again",
}
_starts: "WeakKeyDictionary[PeftModel, dict[str, torch.Tensor]]" = WeakKeyDictionary()


def _start(config: "PeftConfig") -> str:
    return str(getattr(config, "init_lora_weights", None)).lower()


def changes_base(config: "PeftConfig") -> bool:
    """Tell whether inserting the adapter takes a part out of the base model's weights."""
    return _start(config).startswith(_TAKING)


def check_start(config: "PeftConfig") -> None:
    """Refuse a start that could not be trained from, or not saved so that loading gives what was trained.

    Raises:
        RequestError: which it is, and what to choose instead.
    """
    start, options = _start(config), vars(config)
    if start in _UNSUPPORTED:
        raise RequestError(f"init_lora_weights {start!r} {_UNSUPPORTED[start]}: {_REMEDY}.")
    if not changes_base(config):
        return
    refused = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if options.get(name)]
    refused += [name for name in ("rank_pattern", "alpha_pattern") if options.get("use_rslora") and options.get(name)]
    if refused:
        raise RequestError(
            f"init_lora_weights {start!r} changes the base model's weights, and with {' and '.join(refused)} what is "
            "trained cannot be saved as a LoRA for the unchanged ones: leave one of them out."
        )


def check_loadable(config: "PeftConfig", folder: Path) -> None:
    """Refuse a saved adapter whose start, which PEFT makes again when it loads it, is not what it was.

    Raises:
        RequestError: it was drawn at random, or made of gradients.
    """
    start = _start(config)
    if "_niter_" in start or start == "lora_ga":
        raise RequestError(
            f"the adapter {str(folder)!r} needs the base model that its start has left (init_lora_weights {start!r}), "
            "and loading it would make another: save it again with PEFT's path_initial_model_for_weight_conversion."
        )


def keep_start(adapted: "PeftModel") -> None:
    """Remember the adapter's weights before training, which `save` will need."""
    on_meta = any(parameter.is_meta for parameter in adapted.parameters())  # to be looked at, not to be trained
    if any(map(changes_base, adapted.peft_config.values())) and not on_meta:
        _starts[adapted] = {name: tensor.clone() for name, tensor in _weights(adapted).items()}


def save(adapted: "PeftModel", folder: Path, **options: Any) -> None:
    """Write the adapter to `folder` as PEFT does, for the unchanged base model.

    Args:
        adapted: the model with the adapter.
        folder: where to write.
        options: of PEFT's `save_pretrained`.
    """
    from safetensors.torch import save_file

    if adapted not in _starts:
        adapted.save_pretrained(folder, **options)
        return
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary) / "start"
        start.mkdir()
        save_file(_starts[adapted], start / "adapter_model.safetensors")
        training = [module for module in adapted.modules() if module.training]
        adapted.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start), **options)
    # PEFT puts the start on the model for a moment, as one more adapter in eval mode.
    for module in training:
        module.training = True
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in trained)


def check_base(model: Any, names: Sequence[str] | None = None) -> None:
    """Refuse to compute with a base model from which another adapter has taken a part.

    Args:
        model: a model with adapters or without.
        names: the adapters that are to compute, or `NO_ADAPTER`; None for the active ones.

    Raises:
        RequestError: names both.
    """
    changing = [name for name, config in getattr(model, "peft_config", {}).items() if changes_base(config)]
    if not changing:
        return
    if names is None:
        names = list(model.active_adapters) if model.has_active_enabled_adapter else [NO_ADAPTER]
    others = [name for name in names if [name] != changing]
    if others:
        raise RequestError(
            f"the adapter {changing[0]!r} has changed the base model's weights "
            f"(init_lora_weights {_start(model.peft_config[changing[0]])!r}), so {others[0]!r} would not compute with "
            "its own: load each on a model of its own, or save the adapter with `train`, as a plain LoRA."
        )


def _weights(adapted: "PeftModel") -> "dict[str, torch.Tensor]":
    from peft import get_peft_model_state_dict

    return {
        name: tensor.detach().cpu()
        for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
