"""The forwards that fast paths give to single modules: they leave to the module's own what is not theirs."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llm_adapters.fast_paths import linear, lora
from llm_adapters.fast_paths.routing import Route

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


class OneLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features)


def peft_linear(in_features: int, out_features: int, ranks: tuple[int, ...]) -> Any:
    """PEFT's LoRA layer with an adapter, "0", "1", ..., of each of the `ranks`, no weight of which is zero."""
    first, *others = (LoraConfig(r=rank, target_modules=["layer"]) for rank in ranks)
    model = get_peft_model(OneLayer(in_features, out_features), first, adapter_name="0")
    for number, config in enumerate(others, 1):
        model.add_adapter(str(number), config)
    layer = model.base_model.model.layer
    for name in layer.lora_B:
        nn.init.normal_(layer.lora_B[name].weight)
    return layer


def test_under_autocast_lora_is_pefts_own() -> None:
    layer, x = peft_linear(32, 32, (4,)), torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = lora.forward(layer, layer.forward, x)
        assert torch.equal(found, layer(x))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "in_features", "out_features", "ranks"), [(1, 5, 3, (2,)), (9, 64, 40, (8, 33))])
def test_lora_with_an_adapter_for_each_row(rows: int, in_features: int, out_features: int, ranks: tuple) -> None:
    """Each row is PEFT's own with its adapter; "__base__" is the layer without one."""
    layer, x = peft_linear(in_features, out_features, ranks).eval(), torch.randn(1, rows, in_features)
    names = [*map(str, range(len(ranks))), "__base__"]
    route, which = Route(names), torch.arange(rows) % len(names)
    route.set(which)
    with torch.no_grad():
        found = lora.inference_forward(layer, route, prepack=False)(x)[0]
        for number, name in enumerate(names):
            mine = which == number
            layer._disable_adapters = name == "__base__"
            if name != "__base__":
                layer.set_adapter([name])
            torch.testing.assert_close(found[mine], layer(x)[0][mine], rtol=1e-4, atol=1e-5)
    route.set(which[1:])
    with pytest.raises(RuntimeError, match=f"adapters were set for {rows - 1} rows, and there are {rows}"):
        lora.inference_forward(layer, route, prepack=False)(x)


@DTYPES
def test_a_linear_layer_that_is_trained_later_gets_its_gradient(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 96).to(dtype).requires_grad_(False)
    layer.weight.requires_grad_(True)
    assert not linear.match(layer)
    linear.forward(layer, layer.forward, torch.randn(70, 64).to(dtype)).sum().backward()
    assert layer.weight.grad is not None


@DTYPES
def test_results_may_be_changed_in_place_and_have_no_rows(dtype: torch.dtype) -> None:
    """OLMo clamps its queries; an expert may get no token."""
    layer = nn.Linear(64, 96).to(dtype).requires_grad_(False)
    out = linear.forward(layer, layer.forward, torch.randn(2, 600, 64).to(dtype).requires_grad_())
    out.clamp_(-0.1, 0.1).sum().backward()
    none = torch.zeros(0, 64).to(dtype).requires_grad_()
    found = linear.forward(layer, layer.forward, none)
    assert found.shape == (0, 96)
    found.sum().backward()
    assert none.grad is not None
