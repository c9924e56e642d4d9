"""What holds for every adapter of every family: the matrix methods x families x invariants of a PEFT method."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import (
    METHODS,
    VARIED,
    adapted,
    assert_unchanged,
    config_of,
    fresh,
    ids,
    perturb,
    plain,
    snapshot,
)
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny import FAMILIES, LAYERS, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from write_state_dict_keys import FILE, keys

from llm_adapters.architectures import decoder_layers
from llm_adapters.bottleneck import BottleneckConfig, BottleneckLayer
from llm_adapters.bottleneck.wrapper import Tap
from llm_adapters.errors import RequestError

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


# --- one adapter, every family


@pytest.mark.proves("starts as the base", "disabled is the base", "unloads")
@methods
@every_family
@torch.no_grad()
def test_starts_as_the_identity_disabled_is_the_base_and_unload_gives_it_back(family: str, method: str) -> None:
    base = fresh(family)
    before = snapshot(base)
    expected = plain(family)(IDS).logits
    model = get_peft_model(base, config_of(method, family)).eval()
    assert torch.equal(model(IDS).logits, expected)
    perturb(model)
    changed = model(IDS).logits
    assert not torch.allclose(changed, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, changed)
    unloaded = model.unload()
    assert unloaded is base
    before["trained"] = set()  # as every PEFT method, it leaves the base frozen
    assert_unchanged(base, before)
    assert not any(isinstance(h, Tap) for m in base.modules() for h in m._forward_pre_hooks.values())
    assert torch.equal(base(IDS).logits, expected)


@pytest.mark.proves("saves and loads")
@methods
@every_family
@torch.no_grad()
def test_saves_and_loads_bit_for_bit_under_any_name(family: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, method)
    model.save_pretrained(tmp_path)
    cheap = FAMILIES.index(family) % 2 == 0
    loaded = PeftModel.from_pretrained(fresh(family), tmp_path, adapter_name="other", low_cpu_mem_usage=cheap)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.peft_config["other"].to_dict() == model.peft_config["default"].to_dict() | {"inference_mode": True}
    own = get_peft_model_state_dict(model)
    again = get_peft_model_state_dict(loaded, adapter_name="other")
    assert own.keys() == again.keys() != set()
    assert all(torch.equal(own[key], tensor) for key, tensor in again.items())


@pytest.mark.proves("trains nothing else")
@methods
@every_family
def test_trains_the_adapter_and_nothing_else(family: str, method: str) -> None:
    model = adapted(family, method).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, gradients = losses_and_gradients(model)
    ours = adapter_parameters(model)
    assert gradients.keys() == ours.keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == ours.keys()


STORED = json.loads(FILE.read_text())


@pytest.mark.proves("stable keys")
@methods
@every_family
def test_keys_of_checkpoints_are_those_that_are_stored(family: str, method: str) -> None:
    assert keys(method, family) == STORED[method][family]


# --- one adapter, the families that differ most


@pytest.mark.proves("gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@methods
@varied_families
def test_gradient_checkpointing_changes_nothing(family: str, method: str, reentrant: bool) -> None:
    model = adapted(family, method).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    loss, gradients = losses_and_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    block = next(m for m in model.modules() if isinstance(m, BottleneckLayer))
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed_loss, checkpointed = losses_and_gradients(model)
    assert len(runs) == 2  # it really ran again
    torch.testing.assert_close(checkpointed_loss, loss, atol=0, rtol=1e-6)
    assert checkpointed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.proves("half precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@methods
@varied_families
def test_half_precision_bases_keep_adapters_in_fp32(family: str, method: str, dtype: torch.dtype) -> None:
    base = fresh(family).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(base)(IDS).logits
    model = get_peft_model(base, config_of(method, family))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, expected)
    perturb(model)
    logits = model(IDS).logits
    assert logits.dtype == dtype
    with torch.no_grad():
        reference = adapted(family, method)
        reference.load_state_dict(model.state_dict(), strict=True)
        full = reference(IDS).logits
    error = (logits.float() - full).abs().max() / full.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in adapter_parameters(model).values())


@methods
@pytest.mark.parametrize("family", [f for f in VARIED if f != "mixtral"])  # rounding sends tokens to other experts
@torch.no_grad()
def test_autocast(family: str, method: str) -> None:
    model = adapted(family, method)
    full = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS).logits
        routed = model(IDS, adapter_names=["default", "__base__"]).logits
    assert (logits.float() - full).abs().max() / full.abs().max() < 0.1
    torch.testing.assert_close(routed[0], logits[0], atol=0.05, rtol=0.05)


@pytest.mark.proves("generates")
@methods
@varied_families
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(family: str, method: str) -> None:
    model = adapted(family, method)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(input_ids=IDS, use_cache=True, **options)
    assert torch.equal(model.generate(input_ids=IDS, use_cache=False, **options), with_cache)
    assert with_cache.shape == (2, IDS.shape[1] + 6)
    own = IDS
    for _ in range(6):  # the loop that generation stands for
        own = torch.cat([own, model(own).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(own, with_cache)


@varied_families
@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded(family: str) -> None:
    model = adapted(family, "both-learned")
    model.set_attn_implementation("eager")
    seen: list[torch.Tensor] = []
    _, layers = decoder_layers(model)
    layers[0].register_forward_hook(lambda module, args, y: seen.append(y[0] if isinstance(y, tuple) else y))
    output = model(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(output.hidden_states[1], seen[0])
    assert torch.equal(output.logits, model(IDS).logits)
    attentions = model(IDS, output_attentions=True).attentions
    assert [attention.shape[-2:] for attention in attentions] == [(IDS.shape[1], IDS.shape[1])] * LAYERS


@pytest.mark.proves("merges", but="refused")
@methods
@varied_families
@torch.no_grad()
def test_merging_is_refused(family: str, method: str) -> None:
    model = adapted(family, method)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_adapter):
        with pytest.raises(RequestError, match="cannot be merged: its non-linearity"):
            merge()
        assert_unchanged(model, before)
    model.unmerge_adapter()
    assert_unchanged(model, before)


@pytest.mark.proves("copies and pickles")
@methods
@varied_families
@torch.no_grad()
def test_copies_and_pickles(family: str, method: str) -> None:
    model = adapted(family, method)
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    perturb(model)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)
    assert torch.equal(twin(IDS).logits, expected)
    assert torch.equal(loaded(IDS).logits, expected)


@methods
@varied_families
def test_status_and_counts(family: str, method: str) -> None:
    model = adapted(family, method)
    status = model.get_model_status()
    ours = adapter_parameters(model)
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    assert status.peft_types == {"default": "BOTTLENECK"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert (
        status.num_adapter_layers
        == len(layers)
        == {"series": 2, "parallel": 2, "both-learned": 4, "linears": 6}[method]
    )
    assert status.trainable_params == sum(p.numel() for p in ours.values())
    assert {s.module_type for s in model.get_layer_status()} == {"BottleneckLayer"}
    assert model.get_nb_trainable_parameters()[0] == status.trainable_params
    with pytest.raises(AttributeError):
        _ = model.add_weighted_adapter


@methods
@pytest.mark.parametrize("family", ["llama", "bloom", "opt"])
@torch.no_grad()
def test_auto_class_loads_base_and_adapter(family: str, method: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", family)
    model = get_peft_model(type(plain(family)).from_pretrained(folder), config_of(method, family))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    trainable = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert all(p.requires_grad for p in adapter_parameters(trainable).values())


@methods
@varied_families
@torch.no_grad()
def test_transformers_own_adapter_methods(family: str, method: str, tmp_path: Path) -> None:
    expected = adapted(family, method)
    model = fresh(family)
    model.add_adapter(config_of(method, family), adapter_name="first")
    set_peft_model_state_dict(model, get_peft_model_state_dict(expected), adapter_name="first")
    wanted = expected(IDS).logits
    assert torch.equal(model(IDS).logits, wanted)
    model.save_pretrained(tmp_path)
    other = fresh(family)
    other.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(other(IDS).logits, wanted)
    other.add_adapter(
        config_of("series", family, layers=[0]) if method != "linears" else config_of(method, family), "third"
    )
    other.set_adapter("second")
    assert torch.equal(other(IDS).logits, wanted)
    other.disable_adapters()
    assert torch.equal(other(IDS).logits, plain(family)(IDS).logits)
    other.enable_adapters()
    other.delete_adapter("third")
    other.set_adapter("second")
    assert torch.equal(other(IDS).logits, wanted)
    assert other.active_adapters() == ["second"]
    # and back to PEFT
    again = PeftModel.from_pretrained(fresh(family), tmp_path)
    assert torch.equal(again(IDS).logits, wanted)


@pytest.mark.proves("modules_to_save")
@methods
@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "gpt2"])
def test_modules_to_save(family: str, method: str, tmp_path: Path) -> None:
    base = tiny_model(family, tie_word_embeddings=False)
    before = snapshot(base)
    kept = copy.deepcopy(base)
    model = get_peft_model(copy.deepcopy(base), config_of(method, family, modules_to_save=["lm_head"]))
    perturb(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_parameters(model).keys() | {"base_model.model.lm_head.modules_to_save.default.weight"}
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
        loaded.unload()
        before["trained"] = set()
        assert_unchanged(base, before)
        assert torch.equal(base(IDS).logits, kept(IDS).logits)


@pytest.mark.parametrize("method", ["series", "parallel", "both-learned"])
@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "gpt2"])
@torch.no_grad()
def test_sequence_classification(family: str, method: str, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels=3)).eval()
    kept = copy.deepcopy(base)
    expected = base(IDS).logits
    model = get_peft_model(base, config_of(method, family, task_type="SEQ_CLS")).eval()
    perturb(model)
    logits = model(IDS).logits
    assert not torch.allclose(logits, expected, atol=1e-4)
    mixed = model(IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.stack([logits[0], expected[1]]), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(kept, tmp_path)(IDS).logits, logits)


@pytest.mark.parametrize("method", ["series", "parallel"])
@torch.no_grad()
def test_without_a_task_type_any_transformer_takes_one(method: str, tmp_path: Path) -> None:
    base = AutoModelForTokenClassification.from_config(tiny_config("qwen2", num_labels=3)).eval()
    kept = copy.deepcopy(base)
    model = get_peft_model(base, config_of(method, "qwen2", task_type=None)).eval()
    assert type(model) is PeftModel
    perturb(model)
    logits = model(IDS).logits
    assert not torch.allclose(logits, kept(IDS).logits, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(kept, tmp_path)(IDS).logits, logits)


def test_without_a_task_type_a_decoder_routes_each_sequence_in_generate() -> None:
    model = get_peft_model(fresh("gpt2"), config_of("parallel", "gpt2", task_type=None)).eval()
    perturb(model)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "__base__"], **options)
    own, base = model.generate(input_ids=IDS, **options), plain("gpt2").generate(input_ids=IDS, **options)
    assert torch.equal(mixed, torch.stack([own[0], base[1]]))
    assert not torch.equal(own[1], base[1])


@torch.no_grad()
def test_a_module_that_is_no_transformer(tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    kept, x = copy.deepcopy(base), torch.randn(3, 6)
    model = get_peft_model(base, BottleneckConfig(insertion={"0": "before", "2": "after"}, bottleneck_size=2)).eval()
    perturb(model)
    assert not torch.allclose(model(x), kept(x), atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(kept, tmp_path)(x), model(x))


@methods
@varied_families
@torch.no_grad()
def test_init_weights_false_is_a_random_start(family: str, method: str) -> None:
    model = get_peft_model(fresh(family), config_of(method, family, init_weights=False)).eval()
    assert (model(IDS).logits - plain(family)(IDS).logits).abs().max() > 1e-5
    assert all(layer.weight.std() > 0 for name, layer in model.named_modules() if name.endswith(".default"))


@methods
@varied_families
def test_inference_mode_is_frozen(family: str, method: str, tmp_path: Path) -> None:
    model = get_peft_model(fresh(family), config_of(method, family, inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(family), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    trainable = PeftModel.from_pretrained(fresh(family), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == adapter_parameters(trainable).keys()
