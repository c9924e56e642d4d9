"""Whether an adapter does anything: one that was never trained gives the bare model's score under its own name."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llm_adapters.errors import RequestError

if TYPE_CHECKING:
    import torch


def check_trained(model: Any, name: str) -> None:
    """Refuse a model whose active adapter changes nothing of what it computes.

    Args:
        model: a model with an adapter or without.
        name: what to call the adapter.

    Raises:
        RequestError: it does nothing.
    """
    if hasattr(model, "peft_config") and does_nothing(model):
        raise RequestError(
            f"the adapter {name!r} does nothing: it is untrained, or all its weights are zero, and the answers would "
            "be the bare base model's. Train it, name the base model alone, or allow this with --allow-untrained "
            "(allow_untrained=True)."
        )


def does_nothing(model: Any) -> bool:
    """Tell whether the active adapter is the identity, as far as can be told.

    Of LoRA and of series and parallel adapters the weights tell it. Of others the logits do, with and without the
    adapter; in half precision these may be equal though it is trained, and then it counts as such.
    """
    import torch

    if model.active_peft_config.is_prompt_learning:
        return False
    last = list(_last_factors(model))
    if None not in last:
        return not any(bool(factor.any()) for factor in last if factor is not None)
    if model.dtype != torch.float32:
        return False
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        with model.disable_adapter():
            return torch.equal(logits, model(input_ids=ids).logits)


def _last_factors(model: Any) -> "Iterator[torch.Tensor | None]":
    """Weights that are a factor of all that the active adapters add; None for a part of which they say too little."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    from llm_adapters.bottleneck.layer import BottleneckLayer

    for layer in model.modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            yield None
        if not isinstance(layer, BaseTunerLayer):
            continue
        for name in layer.active_adapters:
            if isinstance(layer, LoraLayer) and not layer.lora_variant.get(name):
                if name in layer.lora_B and layer.scaling[name]:
                    yield from layer.lora_B[name].parameters()
                if name in layer.lora_embedding_A and layer.scaling[name]:
                    yield layer.lora_embedding_A[name]
            elif isinstance(layer, BottleneckLayer) and name not in layer.bottleneck_prefix:
                if name in layer.bottleneck_up:
                    yield from layer.bottleneck_up[name].parameters()
            else:
                yield None
