"""A look at what an adapter would do to a model, without its weights: where, how many parameters, how much memory."""

import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from llm_adapters import architectures, methods
from llm_adapters.errors import RequestError
from llm_adapters.models import loading as models
from llm_adapters.models.insertion import insert

ADAM_STATES = 2  # AdamW keeps two numbers per trained parameter, in float32 like the adapter and its gradient


@dataclass(frozen=True)
class Inspection:
    """Places where adapters would go on a model, and what they would cost.

    Attributes:
        model: the name that was asked for.
        family: transformers' name of the model family.
        discovered: whether attention and MLP were told by structure, as the family has no row.
        layers: number of decoder layers.
        hidden_size: width of the residual stream.
        parameters: of the base model.
        roles: which module of a decoder layer plays which role.
        method: the method that was asked for, or None.
        places: names of the adapted modules, those of all layers as one (``model.layers.*.mlp``), with their count.
        trainable: parameters that the method would train.
        base_bytes: memory of the base model's weights in `dtype`.
        training_bytes: memory of adapter, gradient and optimiser states; activations come on top.
        dtype: precision of the base model on this machine.
    """

    model: str
    family: str
    discovered: bool
    layers: int
    hidden_size: int
    parameters: int
    roles: dict[str, Any]
    method: str | None
    places: dict[str, int]
    trainable: int
    base_bytes: int
    training_bytes: int
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def inspect(name: str | os.PathLike[str], method: str | None = None, **options: Any) -> Inspection:
    """Tell where `method` would put adapters on the model `name`, from its config alone.

    Args:
        name: a local folder, a short name or a hub id; only the config is read.
        method: a method's name; None for the roles alone.
        options: the method's options.

    Raises:
        RequestError: the model, the method or an option is unknown, or the family's structure is ambiguous.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    config = models.model_config(name)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise RequestError(f"{name} is not a causal language model: {error}") from error
    parameters = sum(p.numel() for p in model.parameters())
    architecture = architectures.architecture_of(model)
    _, stack = architectures.decoder_layers(model)
    settings = architectures.text_config(model)
    places: dict[str, int] = {}
    trainable = 0
    if method is not None:
        chosen = methods.adapter_config(method, model, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = insert(model, chosen, low_cpu_mem_usage=not chosen.is_prompt_learning)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        for path, module in adapted.named_modules():
            if isinstance(module, BaseTunerLayer):
                parts = path.removeprefix("base_model.model.").split(".")
                place = ".".join("*" if part.isdigit() else part for part in parts)
                places[place] = places.get(place, 0) + 1
        if chosen.is_prompt_learning:
            places["before the sequence"] = chosen.num_virtual_tokens
    dtype = models.resolve_dtype("auto", models.resolve_device("auto"))
    return Inspection(
        model=str(name),
        family=settings.model_type,
        discovered=architecture.discovered,
        layers=len(stack),
        hidden_size=settings.hidden_size,
        parameters=parameters,
        roles={
            "attention": architecture.attention.output,
            "mlp": architecture.mlp.output,
            **{role: getattr(architecture, role) for role in ("qkv", "o", "gate", "up", "down")},
        },
        method=method,
        places=places,
        trainable=trainable,
        base_bytes=parameters * dtype.itemsize,
        training_bytes=trainable * 4 * (2 + ADAM_STATES),
        dtype=str(dtype).removeprefix("torch."),
    )
