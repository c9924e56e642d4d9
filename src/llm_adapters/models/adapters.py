"""Put a trained adapter on a base model, if it fits.

PEFT loads an adapter whose keys do not fit with a warning at most, and what was not loaded stays at its random start.
Here every key and shape is compared, and anything but a perfect fit is refused.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_adapters.adapter_files import adapter_weights, read_base, read_weights
from llm_adapters.errors import RequestError, first_line, some
from llm_adapters.models import starts, targets
from llm_adapters.models.insertion import LOADED, check_memory, check_patterns

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", folder: Path) -> "PeftModel":
    """Put the adapter in `folder` on `model`, in eval mode; `model` is not to be used after an error.

    Raises:
        RequestError: the adapter is not in PEFT's format, does not fit `model` key by key, shape by shape and type by
            type, holds values that are not finite, or the result computes none.
    """
    from peft import PeftConfig, PeftModel

    adapter_weights(folder)
    read_base(folder)
    with _refusing(folder, "cannot be read"):
        config = PeftConfig.from_pretrained(str(folder))
    starts.check_loadable(config, folder)
    check_patterns(model, config)
    check_memory(model, config, LOADED)
    weights = read_weights(folder)
    misfit = f"does not fit the model {model.name_or_path!r}"
    with _refusing(folder, misfit, weights), warnings.catch_warnings():
        # What is missing or has another shape is let through here, because the comparison that follows tells it better.
        warnings.filterwarnings("ignore", message="Found missing adapter keys|Some weights of")
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, ignore_mismatched_sizes=True)
    _compare(adapted, weights, folder)
    with _refusing(folder, misfit):
        _probe(adapted.eval())
    return adapted


def doubts(adapted: "PeftModel", folder: Path) -> list[str]:
    """Tell what of the adapter in `folder`, which is on the model, has no effect or perhaps another than in training.

    Returns:
        A sentence for each.
    """
    from peft import PeftConfig

    asked = PeftConfig.from_pretrained(str(folder))
    found = [f"the adapter {str(folder)!r}: {told}." for told in targets.unmatched(adapted, asked)]
    if starts.changes_base(asked):
        found.append(
            f"the adapter {str(folder)!r} began with a part of its base model's weights (init_lora_weights "
            f"{asked.init_lora_weights!r}), which PEFT works out anew from the base model that it is loaded on."
        )
    return found


def _compare(adapted: "PeftModel", weights: "dict[str, torch.Tensor]", folder: Path) -> None:
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = expected | adapted.state_dict()  # an adapter may bring embeddings of its own
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - known.keys())
    reshaped = [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(known[name].shape)}"
        for name in sorted(weights.keys() & known.keys())
        if weights[name].shape != known[name].shape
    ]
    retyped = [  # indices and masks are weights too, in some methods
        f"{name} is {weights[name].dtype}, not {known[name].dtype}".replace("torch.", "")
        for name in sorted(weights.keys() & known.keys())
        if weights[name].dtype != known[name].dtype
        and not (weights[name].is_floating_point() and known[name].is_floating_point())
    ]
    faults = [
        *([f"{len(missing)} weights are missing ({some(missing)})"] if missing else []),
        *([f"{len(unexpected)} have no place ({some(unexpected)})"] if unexpected else []),
        *([f"{len(reshaped)} have another shape ({some(reshaped)})"] if reshaped else []),
        *([f"{len(retyped)} have another type ({some(retyped)})"] if retyped else []),
    ]
    if faults:
        raise RequestError(
            f"the adapter {str(folder)!r} does not fit the model {adapted.base_model.name_or_path!r}: "
            f"{'; '.join(faults)}.{_hint(weights)} Nothing was loaded."
        )


def _probe(adapted: "PeftModel") -> None:
    """Run one token: the keys and values of a prefix have the shapes that its config says, not those of the model."""
    import torch

    layers, expected = getattr(adapted.active_peft_config, "num_layers", None), adapted.config.get_text_config()
    if layers not in (None, expected.num_hidden_layers):
        raise ValueError(f"it is for {layers} layers, and the model has {expected.num_hidden_layers}")
    device = adapted.get_input_embeddings().weight.device
    with torch.inference_mode():
        logits = adapted(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device)).logits
    if not logits[:, -1].isfinite().all():
        raise ValueError("its logits are not finite")


@contextlib.contextmanager
def _refusing(folder: Path, what: str, weights: "dict[str, torch.Tensor] | None" = None) -> Iterator[None]:
    try:
        yield
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # PEFT and what it calls raise many kinds, all about this folder
        raise RequestError(
            f"the adapter {str(folder)!r} {what} ({first_line(error)}).{_hint(weights or {})} Nothing was loaded."
        ) from error


def _hint(weights: "dict[str, torch.Tensor]") -> str:
    if any(".adapter_down." in name or ".adapter_up." in name for name in weights):
        return " It was written by the paper's own code: convert it with `llm-adapters convert`."
    return ""
