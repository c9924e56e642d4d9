"""Adapter fusion is a PEFT method: what holds for every method holds for it."""

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import (
    assert_unchanged,
    fresh,
    ids,
    plain,
    snapshot,
)
from fusion_helpers import (
    CLOSE,
    IDS,
    SOURCES,
    Sources,
    config,
    every_family,
    frozen_parameters,
    fused,
    loss_and_gradients,
    own_parameters,
    perturb,
    reference,
    varied_families,
)
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from tiny import FAMILIES, HIDDEN, save_tiny
from torch import nn

from llm_adapters.bottleneck.wrapper import Tap
from llm_adapters.errors import RequestError
from llm_adapters.fusion import FusionConfig, FusionLayer


@pytest.mark.proves("disabled is the base", "unloads", method="fusion")
@every_family
@torch.no_grad()
def test_disabled_is_the_base_and_unload_gives_it_back(sources: Sources, family: str) -> None:
    base = fresh(family)
    before = snapshot(base)
    expected = plain(family)(IDS).logits
    model = get_peft_model(base, config(sources, family)).eval()
    perturb(model)
    changed = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, changed)
    assert model.unload() is base
    before["trained"] = set()
    assert_unchanged(base, before)
    assert not any(isinstance(h, Tap) for m in base.modules() for h in m._forward_pre_hooks.values())
    assert torch.equal(base(IDS).logits, expected)


@pytest.mark.proves("saves and loads", method="fusion")
@every_family
@torch.no_grad()
def test_saves_and_loads_bit_for_bit_without_its_sources(sources: Sources, family: str, tmp_path: Path) -> None:
    folders = [str(shutil.copytree(made.folder, tmp_path / "sources" / name)) for name, made in sources(family).items()]
    model = get_peft_model(fresh(family), FusionConfig(adapters=folders, task_type="CAUSAL_LM")).eval()
    perturb(model)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "fusion")
    shutil.rmtree(tmp_path / "sources")
    cheap = FAMILIES.index(family) % 2 == 0
    loaded = PeftModel.from_pretrained(
        fresh(family), tmp_path / "fusion", adapter_name="other", low_cpu_mem_usage=cheap
    )
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(loaded(IDS).logits, expected)
    assert loaded.peft_config["other"].to_dict() == model.peft_config["default"].to_dict() | {"inference_mode": True}
    own, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded, adapter_name="other")
    assert own.keys() == again.keys() != set()
    assert all(torch.equal(own[key], tensor) for key, tensor in again.items())
    assert str(tmp_path) not in (tmp_path / "fusion" / "adapter_config.json").read_text()
    again_saved = PeftModel.from_pretrained(fresh(family), tmp_path / "fusion")
    again_saved.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(fresh(family), tmp_path / "again")
    assert torch.equal(third(IDS).logits, expected)
    other = fresh(family)
    other.load_adapter(tmp_path / "fusion", adapter_name="second")  # transformers' own
    assert torch.equal(other(IDS).logits, expected)


@pytest.mark.proves("stable keys", method="fusion", family="llama")
def test_keys_of_checkpoints(sources: Sources, tmp_path: Path) -> None:
    model = fused(sources, "llama", "series", "learned")
    tensors = get_peft_model_state_dict(model)
    start = "base_model.model.model.layers.0.mlp.fusion_"
    assert {key: list(t.shape) for key, t in tensors.items() if key.startswith(start)} == {
        f"{start}query.weight": [HIDDEN, HIDDEN],
        f"{start}key.weight": [HIDDEN, HIDDEN],
        f"{start}value.weight": [HIDDEN, HIDDEN],
        f"{start}adapters.bottleneck_down.0.weight": [6, HIDDEN],
        f"{start}adapters.bottleneck_up.0.weight": [HIDDEN, 6],
        f"{start}adapters.bottleneck_down.1.weight": [5, HIDDEN],
        f"{start}adapters.bottleneck_down.1.bias": [5],
        f"{start}adapters.bottleneck_up.1.weight": [HIDDEN, 5],
        f"{start}adapters.bottleneck_up.1.bias": [HIDDEN],
        f"{start}adapters.bottleneck_scale.1": [1],
    }
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "FUSION"
    assert [(a["insertion"], a["bottleneck_size"], a["scaling"]) for a in saved["adapters"]] == [
        ("series", 6, 1.0),
        ("series", 5, "learned"),
    ]


@pytest.mark.proves("trains nothing else", method="fusion")
@every_family
def test_trains_query_key_and_value_and_nothing_else(sources: Sources, family: str) -> None:
    model = fused(sources, family).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, gradients = loss_and_gradients(model)
    own = own_parameters(model)
    assert gradients.keys() == own.keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == own.keys()
    assert frozen_parameters(model)


@pytest.mark.parametrize("cheap", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_adapters_stay_frozen(sources: Sources, family: str, cheap: bool, tmp_path: Path) -> None:
    model = fused(sources, family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(family), tmp_path, is_trainable=True, low_cpu_mem_usage=cheap)
    frozen = PeftModel.from_pretrained(fresh(family), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    for trained in (model, loaded):
        trained.add_adapter("second", config(sources, family))
        for step in (
            lambda m: m.set_adapter("second"),
            lambda m: m.set_adapter("default"),
            lambda m: m.train(),
            lambda m: m.disable_adapter().__enter__(),
            lambda m: m.base_model.enable_adapter_layers(),
        ):
            step(trained)
            assert not any(p.requires_grad for p in frozen_parameters(trained).values())
        assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
            n for n in own_parameters(trained) if ".default." in n
        }
    status = loaded.get_model_status()
    assert status.peft_types == {"default": "FUSION", "second": "FUSION"}
    assert status.trainable_params == sum(p.numel() for n, p in own_parameters(loaded).items() if ".default." in n)


def test_frozen_means_without_dropout(sources: Sources) -> None:
    model = fused(sources, "llama")
    assert SOURCES["series"]["bottleneck_dropout"] == 0.5
    with torch.no_grad():
        assert torch.equal(model.train()(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.proves("gradient checkpointing", method="fusion")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@varied_families
def test_gradient_checkpointing_changes_nothing(sources: Sources, family: str, reentrant: bool) -> None:
    model = fused(sources, family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    loss, gradients = loss_and_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    next(m for m in model.modules() if isinstance(m, FusionLayer)).register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed_loss, checkpointed = loss_and_gradients(model)
    assert len(runs) == 2  # it really ran again
    torch.testing.assert_close(checkpointed_loss, loss, atol=0, rtol=1e-6)
    assert checkpointed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.proves("half precision", method="fusion")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@varied_families
def test_half_precision_bases_keep_the_fusion_in_fp32(sources: Sources, family: str, dtype: torch.dtype) -> None:
    model = get_peft_model(fresh(family).to(dtype), config(sources, family)).eval()
    perturb(model, std=0.1)  # with larger ones the softmax is all but a switch, which rounding throws
    full = fused(sources, family)
    full.load_state_dict(model.state_dict())
    ours = {**own_parameters(model), **frozen_parameters(model)}
    assert {p.dtype for p in ours.values()} == {torch.float32}
    stored = fused(sources, family).state_dict()
    assert all(torch.equal(p, stored[name]) for name, p in frozen_parameters(model).items())  # not rounded on the way
    logits = model(IDS).logits
    assert logits.dtype == dtype
    with torch.no_grad():
        expected = full(IDS).logits
    error = (logits.float() - expected).abs().max() / expected.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in own_parameters(model).values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(fused(sources, family)(IDS).logits).all()


@pytest.mark.proves("merges", method="fusion", but="refused")
@varied_families
@torch.no_grad()
def test_merging_is_refused(sources: Sources, family: str) -> None:
    model = fused(sources, family)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_adapter):
        with pytest.raises(RequestError, match="a fusion of adapters cannot be merged: the weights of its adapters"):
            merge()
        assert_unchanged(model, before)


@pytest.mark.proves("generates", method="fusion")
@varied_families
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(sources: Sources, family: str) -> None:
    model = fused(sources, family)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(input_ids=IDS, use_cache=True, **options)
    assert torch.equal(model.generate(input_ids=IDS, use_cache=False, **options), with_cache)


def two_fusions(sources: Sources, family: str) -> PeftModel:
    model = fused(sources, family)
    model.add_adapter("second", config(sources, family, "parallel"))
    perturb(model, "second")
    return model.eval()


@pytest.mark.proves("several adapters", "mixed batch", "mixed batch generates", method="fusion")
@varied_families
@torch.no_grad()
def test_several_fusions_on_one_model(sources: Sources, family: str) -> None:
    model = two_fusions(sources, family)
    alone = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        alone[name] = model(IDS).logits
    torch.testing.assert_close(alone["default"], reference(family, model, sources(family)), **CLOSE)
    only = {"parallel": sources(family)["parallel"]}
    torch.testing.assert_close(alone["second"], reference(family, model, only, "second"), **CLOSE)
    names = ["second", "__base__", "default", "second"]
    batch = ids(4, 6, seed=4)
    mixed = model(batch, adapter_names=names).logits
    generated = model.generate(
        input_ids=batch, adapter_names=names, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        one = plain(family) if name == "__base__" else model
        torch.testing.assert_close(mixed[row : row + 1], one(batch[row : row + 1]).logits, **CLOSE)
        expected = one.generate(
            input_ids=batch[row : row + 1], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert torch.equal(generated[row : row + 1], expected)
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(model(IDS).logits, alone["second"])
    assert not any(".default." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_active_fusions_add_up(sources: Sources, family: str) -> None:
    model = two_fusions(sources, family)
    layer = next(
        m for m in model.modules() if isinstance(m, FusionLayer) and len(m.placements["default"].adapters) == 3
    )
    hidden = torch.randn(2, 3, layer.base_layer.in_features if family == "opt" else HIDDEN)

    def out(*names: str) -> torch.Tensor:
        model.base_model.set_adapter(list(names))
        layer.tapped = hidden[..., :HIDDEN]
        return layer(hidden)

    alone = layer.base_layer(hidden)
    torch.testing.assert_close(out("default", "second") - alone, out("default") + out("second") - 2 * alone, **CLOSE)
    torch.testing.assert_close(out("default", "second"), out("second", "default"), **CLOSE)


@pytest.mark.proves("copies and pickles", method="fusion")
@varied_families
@torch.no_grad()
def test_copies_and_pickles(sources: Sources, family: str) -> None:
    model = fused(sources, family)
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    perturb(model)
    assert torch.equal(twin(IDS).logits, expected)
    assert torch.equal(loaded(IDS).logits, expected)


@pytest.mark.proves("modules_to_save", method="fusion")
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_auto_class_and_modules_to_save(sources: Sources, family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", family, tie_word_embeddings=False)
    base = type(plain(family)).from_pretrained(folder)
    model = get_peft_model(base, config(sources, family, modules_to_save=["lm_head"])).eval()
    perturb(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.proves("compiles", method="fusion", family="llama")
def test_compiled_is_the_same(sources: Sources) -> None:
    model = fused(sources, "llama")
    loss, gradients = loss_and_gradients(model)
    torch._dynamo.reset()
    model.zero_grad()
    again = torch.compile(model, backend="eager")(IDS, labels=IDS).loss
    again.backward()
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=1e-6)
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-5)


def test_a_layer_compiles_without_a_break(sources: Sources) -> None:
    layer = fused(sources, "llama").base_model.model.model.layers[0].mlp
    assert isinstance(layer, FusionLayer)
    hidden = torch.randn(2, 3, HIDDEN)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), layer(hidden), atol=1e-6, rtol=1e-6)
