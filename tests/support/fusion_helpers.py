"""Helpers of the tests of adapter fusion: three adapters to fuse, and fusions of them."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bottleneck_helpers import BLOCKS, LLAMA_LIKE, OUTPUT_INSIDE, RESIDUAL_INSIDE, VARIED, delta_of, fresh, ids, plain
from peft import PeftModel, get_peft_model
from tiny import FAMILIES
from torch import nn

from llm_adapters.fusion import FusionConfig

IDS = ids()
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
every_family = pytest.mark.parametrize("family", FAMILIES)
varied_families = pytest.mark.parametrize("family", VARIED)

# Three adapters of different kind, size and place: at the attention there are two of them, at the MLP all three.
SOURCES: dict[str, dict[str, Any]] = {
    "series": {"insertion": "series", "bottleneck_dropout": 0.5},
    "parallel": {"insertion": "parallel", "scaling": 2.0, "bottleneck_size": 3, "placement": ["attention", "mlp"]},
    "learned": {"placement": ["attention", "mlp"], "scaling": "learned", "use_bias": True, "bottleneck_size": 5},
}
SCALES = {"series": 1.0, "parallel": 2.0, "learned": 1.0}  # "learned" holds its own
WHERE = {"series": ["mlp"], "parallel": ["attention", "mlp"], "learned": ["attention", "mlp"]}


Sources = Callable[[str], dict[str, PeftModel]]


def config(sources: Sources, family: str, *names: str, **more: Any) -> FusionConfig:
    folders = [sources(family)[name].folder for name in names or SOURCES]
    return FusionConfig(**({"adapters": folders, "task_type": "CAUSAL_LM"} | more))


def perturb(model: nn.Module, name: str = "default", std: float = 0.3) -> None:
    for key, parameter in model.named_parameters():
        if any(f".fusion_{what}.{name}." in key for what in ("query", "key", "value")):
            nn.init.normal_(parameter, std=std)


def fused(sources: Sources, family: str, *names: str, **more: Any) -> PeftModel:
    """A copy of the base model with a fusion whose own weights are away from their start."""
    model = get_peft_model(fresh(family), config(sources, family, *names, **more))
    perturb(model)
    return model.eval()


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: p
        for name, p in model.named_parameters()
        if any(f".fusion_{what}." in name for what in ("query", "key", "value"))
    }


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".fusion_adapters." in name}


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def hook_sublayer(layer: nn.Module, block: Any, addition: Callable[..., torch.Tensor], residual_inside: bool) -> None:
    """Make a plain layer's sub-layer return ``x + addition(x, h)``, x its output and h its input."""
    if isinstance(block, tuple):
        first, last = (layer.get_submodule(name) for name in block)
        seen: list[torch.Tensor] = []
        first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        last.register_forward_hook(lambda module, args, x: x + addition(x, seen.pop()))
        return

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        out = output[0] if isinstance(output, tuple) else output
        x = out - given["residual"] if residual_inside else out
        out = out + addition(x, next(iter(given.values())))
        return (out, *output[1:]) if isinstance(output, tuple) else out

    layer.get_submodule(block).register_forward_hook(hook, with_kwargs=True)


def reference(family: str, model: PeftModel, adapters: dict[str, PeftModel], name: str = "default") -> torch.Tensor:
    """The equations of the paper on the plain model, with the deltas of the adapters' own models."""
    expected = copy.deepcopy(plain(family))
    stack, *blocks = BLOCKS.get(family, LLAMA_LIKE)
    state = model.state_dict()
    for index, layer in enumerate(expected.get_submodule(stack)):
        for placement, block in zip(("attention", "mlp"), blocks, strict=True):
            inside = (family, placement) in RESIDUAL_INSIDE
            output = block[-1] if isinstance(block, tuple) else block + OUTPUT_INSIDE.get((family, placement), "")
            place = f"{stack}.{index}.{output}"
            here = [n for n in adapters if placement in WHERE[n]]
            if not here:
                continue
            deltas = {n: delta_of(adapters[n], place, scale=SCALES[n]) for n in here}
            q, k, v = (state[f"base_model.model.{place}.fusion_{w}.{name}.weight"].T for w in ("query", "key", "value"))

            def addition(x: torch.Tensor, h: torch.Tensor, deltas: Any = deltas, q=q, k=k, v=v) -> torch.Tensor:
                z = [delta(h if n == "parallel" else x) for n, delta in deltas.items()]
                weights = torch.stack([((x @ q) * (z_n @ k)).sum(-1) for z_n in z]).softmax(0)
                return sum(w.unsqueeze(-1) * (z_n @ v) for w, z_n in zip(weights, z, strict=True))

            hook_sublayer(layer, block, addition, inside)
    return expected(IDS).logits
