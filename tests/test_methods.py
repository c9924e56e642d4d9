"""The catalogue of methods: each row trains, says what it can do, and refuses what it cannot read."""

import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from llm_adapters import methods
from llm_adapters.errors import RequestError

IDS = torch.arange(3, 21).reshape(2, 9)


@cache
def trained(family: str) -> list[Path]:
    """The folders of two adapters of different kind that a fusion can combine."""
    folders = []
    for method in ("series", "parallel"):
        model = adapted(method, family, init_weights="paper")
        folders.append(Path(mkdtemp()))
        model.save_pretrained(folders[-1])
    return folders


def adapted(method: str, family: str = "llama", **options: object) -> torch.nn.Module:
    model = tiny_model(family)
    if method == "fusion":
        options["adapters"] = trained(family)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, methods.adapter_config(method, model, **options))


def perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt2"])
@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_only_the_adapter_gets_gradients(method: str, family: str) -> None:
    model = adapted(method, family)
    model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert [n for n, p in model.named_parameters() if p.grad is not None] == trained


@pytest.mark.parametrize("method", [m.name for m in methods.METHODS.values() if m.mergeable])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_what_is_declared_mergeable_merges_exactly(method: str, family: str) -> None:
    model = adapted(method, family).eval()
    perturb(model)
    with torch.inference_mode():
        expected = model(IDS).logits
        bare = tiny_model(family)(IDS).logits
        assert (expected - bare).abs().max() > 1e-3
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [m.name for m in methods.METHODS.values() if m.mergeable is False])
def test_what_is_declared_not_mergeable_refuses(method: str) -> None:
    model = adapted(method).eval()
    with pytest.raises((ValueError, AttributeError)):
        model.merge_and_unload()


@pytest.mark.parametrize("row", methods.METHODS.values(), ids=lambda m: m.name)
def test_recomputing_activations_changes_no_gradient(row: methods.Method) -> None:
    if not row.recompute:
        pytest.skip(f"{row.name} is declared not to work with gradient checkpointing")
    gradients = []
    for recompute in (False, True):
        model = adapted(row.name).train()
        perturb(model)
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_lora_goes_where_the_papers_recipes_put_it() -> None:
    places = {"llama": {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}}
    places["bloom"] = {"query_key_value", "dense_4h_to_h", "dense_h_to_4h"}
    places["gptj"] = {"q_proj", "k_proj", "v_proj", "fc_in", "fc_out"}
    for family, expected in places.items():
        config = methods.adapter_config("lora", tiny_model(family))
        assert {name.rpartition(".")[2] for name in config.target_modules} == expected
        assert (config.r, config.lora_alpha) == (32, 64)


def test_other_methods_of_peft_go_by_their_own_names() -> None:
    model = adapted("vera", r=4)
    assert any("vera_lambda" in n for n, p in model.named_parameters() if p.requires_grad)
    assert methods.get("ln_tuning").peft_type == methods.get("LN-Tuning").peft_type == "LN_TUNING"


def test_options_override_the_row_and_the_row_overrides_peft() -> None:
    model = tiny_model("llama")
    assert methods.adapter_config("lora", model, r=4).r == 4
    assert methods.adapter_config("lora", model).lora_dropout == 0.05
    assert methods.adapter_config("lora", model, target_modules=["q_proj"]).target_modules == {"q_proj"}
    assert methods.adapter_config("series", model, placement="attention").placement == ["attention"]
    assert methods.adapter_config("scaled-parallel", model).scaling == 4.0


def test_an_unknown_name_lists_what_is_allowed() -> None:
    with pytest.raises(RequestError, match=r"unknown method 'loar'.*lora.*Did you mean 'lora'"):
        methods.get("loar")
    with pytest.raises(RequestError, match=r"unknown option of lora 'rank': choose one of .*lora_alpha"):
        methods.adapter_config("lora", tiny_model("llama"), rank=4)
    with pytest.raises(RequestError, match="bottleneck_size is -1"):
        methods.adapter_config("series", tiny_model("llama"), bottleneck_size=-1)


def test_a_mixture_of_experts_has_no_linear_for_the_mlp_but_lora_still_fits() -> None:
    config = methods.adapter_config("lora", tiny_model("mixtral"))
    assert {n.rpartition(".")[2] for n in config.target_modules} == {"q_proj", "k_proj", "v_proj"}
