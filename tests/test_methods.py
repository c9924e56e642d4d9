"""The catalogue of methods: each row trains, says what it can do, and refuses what it cannot read."""

import copy
import re
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_model

from llm_adapters import methods
from llm_adapters.errors import RequestError
from llm_adapters.training.recipe import AdapterSettings

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


def adapted(
    method: str, family: str = "llama", dtype: torch.dtype = torch.float32, **options: object
) -> torch.nn.Module:
    model = tiny_model(family, dtype=dtype)
    if method == "fusion":
        options["adapters"] = trained(family)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, methods.adapter_config(method, model, **options))


def perturb(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


families = pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt2"])
all_methods = pytest.mark.parametrize("method", sorted(methods.METHODS))


def which(capability: str, declared: bool) -> pytest.MarkDecorator:
    """The methods whose rows declare that they have the capability, or that they have not."""
    rows = [m for m in methods.METHODS.values() if m.can is not None and (capability in m.can) is declared]
    return pytest.mark.parametrize("method", [m.name for m in rows])


@pytest.mark.proves("trains nothing else")
@families
@all_methods
def test_only_the_adapter_is_trained(method: str, family: str) -> None:
    model = adapted(method, family)
    perturb(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
    assert trained
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained


@pytest.mark.proves("starts as the base")
@families
@pytest.mark.parametrize("method", ["scaled-parallel", "lora", "dora", "rslora", "ia3"])
@torch.no_grad()
def test_starts_as_the_base(method: str, family: str) -> None:
    torch.testing.assert_close(adapted(method, family).eval()(IDS).logits, tiny_model(family)(IDS).logits)


@pytest.mark.proves("disabled is the base")
@families
@all_methods
@torch.no_grad()
def test_disabled_is_the_base(method: str, family: str) -> None:
    model = adapted(method, family).eval()
    perturb(model)
    changed, base = model(IDS).logits, tiny_model(family)(IDS).logits
    assert (changed[:, -IDS.shape[1] :] - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, changed)


@pytest.mark.proves("saves and loads")
@families
@all_methods
@torch.no_grad()
def test_saves_and_loads_bit_for_bit_under_another_name(method: str, family: str, tmp_path: Path) -> None:
    model = adapted(method, family).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path, adapter_name="other")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.equal(model(IDS).logits, adapted(method, family).eval()(IDS).logits)


@pytest.mark.proves("half precision")
@families
@all_methods
def test_a_bfloat16_base(method: str, family: str) -> None:
    model = adapted(method, family).eval()
    perturb(model)
    with torch.no_grad():
        expected = model(IDS).logits
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    half = adapted(method, family, dtype=torch.bfloat16).eval()
    half.load_state_dict({n: t for n, t in model.state_dict().items() if n in names}, strict=False)
    trained = {n: p for n, p in half.named_parameters() if p.requires_grad}
    assert trained.keys() == names
    assert {p.dtype for p in trained.values()} == {torch.float32}
    logits = half(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() / expected.abs().max() < 0.1
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained.values())


@pytest.mark.proves("generates")
@families
@all_methods
@torch.no_grad()
def test_generation_with_a_cache_is_the_loop_without(method: str, family: str) -> None:
    model = adapted(method, family).eval()
    perturb(model)
    own = IDS
    for _ in range(5):
        own = torch.cat([own, model(input_ids=own).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options), own)


@pytest.mark.proves("merges")
@which("merge", True)
@families
def test_what_is_declared_mergeable_merges_exactly(method: str, family: str) -> None:
    model = adapted(method, family).eval()
    perturb(model)
    with torch.inference_mode():
        expected = model(IDS).logits
        bare = tiny_model(family)(IDS).logits
        assert (expected - bare).abs().max() > 1e-3
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.proves("merges", but="refused")
@which("merge", False)
@families
def test_what_is_declared_not_mergeable_refuses(method: str, family: str) -> None:
    model = adapted(method, family).eval()
    with pytest.raises((ValueError, AttributeError)):
        model.merge_and_unload()


def mixed_and_alone(method: str, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a batch with an adapter, another one and none, and of each sequence alone."""
    model = adapted(method, family)
    config = copy.deepcopy(model.peft_config["default"])
    perturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("other", config)
    model.set_adapter("other")
    perturb(model, seed=2)
    model.eval()
    ids = torch.cat([IDS, IDS[:1].flip(1)])
    alone = [model(ids[:1]).logits]
    model.set_adapter("default")
    alone += [model(ids[1:2]).logits, tiny_model(family)(ids[2:]).logits]
    return model(input_ids=ids, adapter_names=["other", "default", "__base__"]).logits, torch.cat(alone)


@pytest.mark.proves("mixed batch")
@which("mixed_batch", True)
@families
@torch.no_grad()
def test_what_is_declared_to_take_mixed_batches_does(method: str, family: str) -> None:
    mixed, alone = mixed_and_alone(method, family)
    torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


@pytest.mark.proves("mixed batch", but="no")
@which("mixed_batch", False)
@families
@torch.no_grad()
def test_what_is_declared_not_to_take_mixed_batches_does_not(method: str, family: str) -> None:
    """PEFT refuses, fails in the middle, or computes something else without a word."""
    try:
        mixed, alone = mixed_and_alone(method, family)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError):
        return
    assert mixed.shape != alone.shape or not torch.allclose(mixed, alone, rtol=1e-3, atol=1e-3)


def gradients_of(method: str, family: str, recompute: bool) -> dict[str, torch.Tensor]:
    model = adapted(method, family).train()
    perturb(model)
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.proves("gradient checkpointing")
@which("recompute", True)
@families
def test_recomputing_activations_changes_no_gradient(method: str, family: str) -> None:
    expected, recomputed = (gradients_of(method, family, recompute) for recompute in (False, True))
    assert expected.keys() == recomputed.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient)


@pytest.mark.proves("gradient checkpointing", but="no")
@which("recompute", False)
@families
def test_what_is_declared_not_to_take_recomputing_does_not(method: str, family: str) -> None:
    expected = gradients_of(method, family, False)
    try:
        recomputed = gradients_of(method, family, True)
    except (ValueError, RuntimeError):
        return
    assert not all(torch.allclose(recomputed[name], gradient) for name, gradient in expected.items())


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


def test_recipe_and_readme_name_every_method() -> None:
    listed = AdapterSettings.__doc__.partition("method: ")[2].partition("\n        options:")[0]
    named = [name.strip() for name in listed.replace("\n", " ").partition(", or")[0].split(",")]
    assert named == list(methods.METHODS)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if line.startswith("| methods |"))
    assert re.findall(r"`([\w-]+)`", row) == list(methods.METHODS)
