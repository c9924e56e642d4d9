"""Several adapters on one model: switched, deleted, and each sequence of a batch with its own."""

from typing import Any

import pytest
import torch
from bottleneck_helpers import (
    METHODS,
    VARIED,
    adapted,
    config_of,
    fresh,
    ids,
    perturb,
    plain,
    with_adapters,
)
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny import FAMILIES, tiny_model

from llm_adapters import BottleneckConfig
from llm_adapters.bottleneck import BottleneckLayer
from llm_adapters.bottleneck.wrapper import Tap

IDS = ids()
every_family = pytest.mark.parametrize("family", FAMILIES)
varied_families = pytest.mark.parametrize("family", VARIED)
methods = pytest.mark.parametrize("method", METHODS)


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "bottleneck_" in name}


def losses_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


THREE = {"one": "series", "two": "series", "three": "parallel"}


@pytest.mark.proves("several adapters", method=["series", "parallel"])
@varied_families
@torch.no_grad()
def test_switching_and_deleting(family: str) -> None:
    model = with_adapters(family, THREE)
    alone = {}
    for name in THREE:
        model.set_adapter(name)
        alone[name] = model(IDS).logits
    assert not torch.allclose(alone["one"], alone["two"], atol=1e-3)
    for name in ("two", "one", "three"):
        model.set_adapter(name)
        assert torch.equal(model(IDS).logits, alone[name])
    model.delete_adapter("two")
    assert model.active_adapters == ["three"]
    assert torch.equal(model(IDS).logits, alone["three"])
    model.delete_adapter("three")
    assert model.active_adapters == ["one"]
    assert torch.equal(model(IDS).logits, alone["one"])
    assert not any(isinstance(h, Tap) for m in model.modules() for h in m._forward_pre_hooks.values())
    assert {n.split(".")[-2] for n in adapter_parameters(model)} == {"one"}


@varied_families
def test_the_inactive_ones_are_not_trained(family: str) -> None:
    model = with_adapters(family, THREE).train()
    for active in ("three", "one"):
        model.set_adapter(active)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        _, gradients = losses_and_gradients(model)
        assert gradients
        assert all(f".{active}." in name for name in gradients)
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == gradients.keys()


@varied_families
def test_adding_an_adapter_leaves_the_trained_one_trained(family: str) -> None:
    model = with_adapters(family, {"one": "series"})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("two", config_of("both-learned", family))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        expected = with_adapters(family, {"one": "series"})
        expected.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_deleting_adapters_of_different_layers_leaves_one_active_everywhere() -> None:
    model = get_peft_model(fresh("llama"), config_of("series", "llama", layers=[0]), adapter_name="first")
    model.add_adapter("second", config_of("series", "llama", layers=[1]))
    model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    status = model.get_model_status()
    assert (status.active_adapters, status.available_adapters) == (["second"], ["second"])
    assert status.num_adapter_layers == 1  # what nothing is left on is unwrapped
    perturb(model, "second")
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, plain("llama")(IDS).logits, atol=1e-3)


def test_after_the_last_one_is_deleted_other_places_are_free_again() -> None:
    model = with_adapters("llama", {"one": "series"})
    model.delete_adapter("one")
    assert {type(m).__name__ for m in model.base_model.model.model.layers[0].children()} == {
        type(m).__name__ for m in plain("llama").model.layers[0].children()
    }
    model.add_adapter("inside", config_of("linears", "llama"))
    model.set_adapter("inside")
    perturb(model, "inside")
    with torch.no_grad():
        expected = adapted("llama", "linears")
        weights = get_peft_model_state_dict(model, adapter_name="inside")
        set_peft_model_state_dict(expected, weights)
        assert torch.equal(model.eval()(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("order", [["opt_mlp", "first_linear"], ["first_linear", "opt_mlp"]])
@torch.no_grad()
def test_a_tapped_module_may_be_wrapped_and_unwrapped(order: list[str]) -> None:
    """OPT's parallel adapter reads the input of fc1, on which another adapter may sit."""
    configs = {
        "opt_mlp": config_of("parallel", "opt"),
        "first_linear": BottleneckConfig(target_modules=["fc1"], insertion="before", bottleneck_size=6),
    }
    torch.manual_seed(3)
    model = get_peft_model(fresh("opt"), configs[order[0]], adapter_name=order[0])
    model.add_adapter(order[1], configs[order[1]])
    for name in sorted(configs):
        perturb(model, name)
    model.eval()
    model.base_model.set_adapter(["opt_mlp", "first_linear"])
    layer = model.base_model.model.model.decoder.layers[0]
    seen = []
    layer.final_layer_norm.register_forward_hook(lambda module, args, y: seen.append(y))
    layer.fc2.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    layer.fc2.register_forward_hook(lambda module, args, y: seen.append(y))
    model(IDS)
    h, without, out = seen
    torch.testing.assert_close(out, without + layer.fc2.delta("opt_mlp", h), atol=1e-6, rtol=1e-6)
    model.delete_adapter("first_linear")
    alone = model(IDS).logits
    expected = adapted("opt", "parallel")
    set_peft_model_state_dict(expected, get_peft_model_state_dict(model, adapter_name="opt_mlp"))
    assert torch.equal(alone, expected(IDS).logits)


# --- an adapter for each sequence of a batch

NAMES = ["one", "three", "__base__", "two", "three", "__base__", "two", "one"]  # 8 sequences over 3 adapters and none
MIXED = ids(8, 6, seed=4)


def one_at_a_time(model: PeftModel, run: Any) -> list[torch.Tensor]:
    results = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(MIXED[row : row + 1]))
        else:
            model.set_adapter(name)
            results.append(run(MIXED[row : row + 1]))
    return results


@pytest.mark.proves("mixed batch", method=["series", "parallel"])
@every_family
@torch.no_grad()
def test_a_mixed_batch_is_each_alone(family: str) -> None:
    model = with_adapters(family, THREE)
    alone = one_at_a_time(model, lambda x: model(x).logits)
    mixed = model(input_ids=MIXED, adapter_names=NAMES).logits
    for row, expected in enumerate(alone):
        torch.testing.assert_close(mixed[row : row + 1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)
    base = plain(family)(MIXED).logits
    torch.testing.assert_close(mixed[2], base[2], atol=1e-5, rtol=1e-5)
    assert all(m.routing is None for m in model.modules() if isinstance(m, BottleneckLayer))


@pytest.mark.proves("mixed batch generates", method=["series", "parallel"])
@pytest.mark.parametrize("beams", [1, 4])
@varied_families
@torch.no_grad()
def test_a_mixed_batch_generates_token_for_token_what_each_does_alone(family: str, beams: int) -> None:
    model = with_adapters(family, THREE)
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    alone = one_at_a_time(model, lambda x: model.generate(input_ids=x, eos_token_id=None, **options))
    mixed = model.generate(input_ids=MIXED, adapter_names=NAMES, eos_token_id=None, **options)
    for row, expected in enumerate(alone):
        assert torch.equal(mixed[row], expected[0]), f"sequence {row}, adapter {NAMES[row]}"
    assert mixed.shape == (8, MIXED.shape[1] + 8)
    assert len({tuple(row.tolist()) for row in mixed[:, MIXED.shape[1] :]}) > 1


@pytest.mark.proves("mixed batch")
@methods
@varied_families
@torch.no_grad()
def test_a_mixed_batch_of_every_method(family: str, method: str) -> None:
    model = with_adapters(family, {"one": method, "two": method})
    names = ["two", "__base__", "one", "two"]
    mixed = model(inputs_embeds=None, input_ids=MIXED[:4], adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter("one" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                expected = model(MIXED[row : row + 1]).logits
        else:
            expected = model(MIXED[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding_in_a_mixed_batch() -> None:
    model = with_adapters("llama", THREE)
    padded = torch.cat([torch.zeros(8, 3, dtype=torch.long), MIXED], 1)
    mask = torch.cat([torch.zeros(8, 3, dtype=torch.long), torch.ones_like(MIXED)], 1)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    short = model.generate(input_ids=MIXED, adapter_names=NAMES, **options)
    long = model.generate(input_ids=padded, attention_mask=mask, adapter_names=NAMES, **options)
    assert torch.equal(short, long[:, 3:])


@pytest.mark.parametrize("active", ["with", "without"])
@torch.no_grad()
def test_a_mixed_batch_with_modules_to_save_on_one_adapter_only(active: str) -> None:
    base = tiny_model("llama", tie_word_embeddings=False)
    model = get_peft_model(base, config_of("series", "llama", modules_to_save=["lm_head"]), adapter_name="with")
    model.add_adapter("without", config_of("parallel", "llama"))
    for name in ("with", "without"):
        perturb(model, name)
    model.eval()
    model.base_model.model.lm_head.modules_to_save["with"].weight.mul_(-2)
    names = ["with", "without", "__base__", "with"]
    alone = []
    for row, name in enumerate(names):
        model.set_adapter("with" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model(MIXED[row : row + 1]).logits)
        else:
            alone.append(model(MIXED[row : row + 1]).logits)
    model.set_adapter(active)
    mixed = model(MIXED[:4], adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    model.set_adapter("without")
    assert torch.equal(model(MIXED[1:2]).logits, alone[1])
