"""Adapter fusion computes the published equations, against plain models with forward hooks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import (
    delta_of,
    fresh,
    plain,
)
from fusion_helpers import (
    CLOSE,
    IDS,
    Sources,
    config,
    every_family,
    fused,
    perturb,
    reference,
    varied_families,
)
from peft import (
    get_peft_model,
)
from tiny import HIDDEN, LAYERS
from torch import nn

from llm_adapters import BottleneckConfig
from llm_adapters.fusion import FusionConfig, FusionLayer


@pytest.mark.proves("formula", method="fusion")
@every_family
@torch.no_grad()
def test_matches_hooks_on_the_plain_model(sources: Sources, family: str) -> None:
    model = fused(sources, family)
    logits = model(IDS).logits
    torch.testing.assert_close(logits, reference(family, model, sources(family)), **CLOSE)
    assert (logits - plain(family)(IDS).logits).abs().max() > 0.01
    assert sum(isinstance(m, FusionLayer) for m in model.modules()) == 2 * LAYERS
    perturb(model)  # other weights are told apart
    assert (logits - model(IDS).logits).abs().max() > 0.001


@pytest.mark.parametrize("kind", ["series", "parallel", "learned"])
@varied_families
@torch.no_grad()
def test_one_adapter_with_the_identity_as_value_is_that_adapter(sources: Sources, family: str, kind: str) -> None:
    model = fused(sources, family, kind)
    for key, parameter in model.named_parameters():
        if "fusion_value" in key:
            assert not torch.equal(parameter, torch.eye(HIDDEN))
            nn.init.eye_(parameter)
    expected = sources(family)[kind](IDS).logits
    assert (expected - plain(family)(IDS).logits).abs().max() > 0.01
    torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)


@torch.no_grad()
def test_starts_as_a_weighted_mean_of_the_adapters(sources: Sources) -> None:
    """So an adapter fused with itself is that adapter, whatever the attention says."""
    model = get_peft_model(fresh("llama"), config(sources, "llama", "series", "series", "series")).eval()
    values = [p for n, p in model.named_parameters() if "fusion_value" in n]
    assert len(values) == LAYERS
    assert all(torch.equal(value, torch.eye(HIDDEN)) for value in values)
    for what in ("query", "key"):  # 2048 draws: the standard error of the deviation is 3.1e-4
        drawn = torch.cat([p.flatten() for n, p in model.named_parameters() if f"fusion_{what}" in n])
        assert drawn.std().item() == pytest.approx(0.02, abs=1.5e-3)
        assert drawn.mean().item() == pytest.approx(0, abs=2e-3)
    torch.testing.assert_close(model(IDS).logits, sources("llama")["series"](IDS).logits, **CLOSE)


@torch.no_grad()
def test_adapters_on_linears(tmp_path: Path) -> None:
    """Two on the same linear, one reading its input and one its output, of another width."""
    base = fresh("llama")
    folders = []
    for insertion in ("parallel", "after"):
        made = get_peft_model(
            fresh("llama"), BottleneckConfig(target_modules=["up_proj"], insertion=insertion, bottleneck_size=4)
        )
        for parameter in (p for n, p in made.named_parameters() if "bottleneck_" in n):
            nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(tmp_path / insertion)
        folders.append(made)
    model = get_peft_model(base, FusionConfig(adapters=[tmp_path / "parallel", tmp_path / "after"])).eval()
    perturb(model)
    expected = copy.deepcopy(plain("llama"))
    for index, layer in enumerate(expected.model.layers):
        place = f"model.layers.{index}.mlp.up_proj"
        beside, after = (delta_of(made, place) for made in folders)
        state = model.state_dict()
        q, k, v = (state[f"base_model.model.{place}.fusion_{w}.default.weight"] for w in ("query", "key", "value"))

        def hook(module: nn.Module, args: Any, x: torch.Tensor, b=beside, a=after, q=q, k=k, v=v) -> torch.Tensor:
            z = torch.stack([b(args[0]), a(x)], -2)
            s = torch.einsum("bti,btni->btn", x @ q.T, z @ k.T).softmax(-1)
            return x + torch.einsum("btn,btni->bti", s, z @ v.T)

        layer.mlp.up_proj.register_forward_hook(hook)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, **CLOSE)
    assert (model(IDS).logits - plain("llama")(IDS).logits).abs().max() > 0.01
