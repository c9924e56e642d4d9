"""Adapter fusion: what it computes, against plain models with forward hooks, and that it is a PEFT method."""

import copy
import inspect
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import (
    BLOCKS,
    DEAR,
    LLAMA_LIKE,
    OUTPUT_INSIDE,
    RESIDUAL_INSIDE,
    adapted,
    assert_unchanged,
    config_of,
    delta_of,
    fresh,
    ids,
    plain,
    snapshot,
)
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from tiny import FAMILIES, HIDDEN, LAYERS, save_tiny, tiny_model
from torch import nn

from llm_adapters import BottleneckConfig
from llm_adapters.bottleneck.wrapper import Tap, Wrapper
from llm_adapters.errors import RequestError
from llm_adapters.fusion import FusionConfig, FusionLayer

IDS = ids()
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
everything = pytest.mark.parametrize("family", FAMILIES)
dear = pytest.mark.parametrize("family", DEAR)

# Three adapters of different kind, size and place: at the attention there are two of them, at the MLP all three.
SOURCES: dict[str, dict[str, Any]] = {
    "series": {"insertion": "series", "bottleneck_dropout": 0.5},
    "parallel": {"insertion": "parallel", "scaling": 2.0, "bottleneck_size": 3, "placement": ["attention", "mlp"]},
    "learned": {"placement": ["attention", "mlp"], "scaling": "learned", "use_bias": True, "bottleneck_size": 5},
}
SCALES = {"series": 1.0, "parallel": 2.0, "learned": 1.0}  # "learned" holds its own
WHERE = {"series": ["mlp"], "parallel": ["attention", "mlp"], "learned": ["attention", "mlp"]}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, PeftModel]]:
    """For a family, the models with the three adapters; each is also saved, in `model.folder`."""
    made: dict[str, dict[str, PeftModel]] = {}

    def get(family: str) -> dict[str, PeftModel]:
        if family not in made:
            made[family] = {}
            for name, options in SOURCES.items():
                model = adapted(family, "series", **options)
                model.folder = str(tmp_path_factory.mktemp(f"{family}-{name}"))
                model.save_pretrained(model.folder)
                made[family][name] = model
        return made[family]

    return get


Sources = Callable[[str], dict[str, PeftModel]]


def config(sources: Sources, family: str, *names: str, **more: Any) -> FusionConfig:
    return FusionConfig(adapters=[sources(family)[name].folder for name in names or SOURCES], **more)


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


# --- what it computes


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


@pytest.mark.proves("formula", method="fusion")
@everything
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
@dear
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


# --- a PEFT method


@pytest.mark.proves("disabled is the base", "unloads", method="fusion")
@everything
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
@everything
@torch.no_grad()
def test_saves_and_loads_bit_for_bit_without_its_sources(sources: Sources, family: str, tmp_path: Path) -> None:
    folders = [str(shutil.copytree(made.folder, tmp_path / "sources" / name)) for name, made in sources(family).items()]
    model = get_peft_model(fresh(family), FusionConfig(adapters=folders)).eval()
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
@everything
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
@dear
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
@dear
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
@dear
@torch.no_grad()
def test_merging_is_refused(sources: Sources, family: str) -> None:
    model = fused(sources, family)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_adapter):
        with pytest.raises(RequestError, match="a fusion of adapters cannot be merged: the weights of its adapters"):
            merge()
        assert_unchanged(model, before)


@pytest.mark.proves("generates", method="fusion")
@dear
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
@dear
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
@dear
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


# --- what is refused, in a sentence, with nothing changed


def refused(match: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_cannot_be_fused(sources: Sources, tmp_path: Path) -> None:
    good = sources("llama")["series"].folder
    refused("adapters is empty: name at least one folder", FusionConfig)
    refused("adapters is empty", FusionConfig, adapters=[])
    refused("adapters is 3: a list of folders", FusionConfig, adapters=3)
    refused(r"adapters is \[.*, 3\]: a list of folders", FusionConfig, adapters=[good, 3])
    refused("there is no adapter folder '.*nowhere'", FusionConfig, adapters=[good, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    refused("'.*empty' is not an adapter: it has no adapter_config.json", FusionConfig, adapters=[tmp_path / "empty"])
    lora = get_peft_model(fresh("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    refused("'.*lora' holds a LORA adapter: only series and parallel", FusionConfig, adapters=[tmp_path / "lora"])
    fused(sources, "llama").save_pretrained(tmp_path / "fusion")
    refused("'.*fusion' holds a FUSION adapter", FusionConfig, adapters=[good, tmp_path / "fusion"])
    head = get_peft_model(
        tiny_model("llama", tie_word_embeddings=False), config_of("series", "llama", modules_to_save=["lm_head"])
    )
    head.save_pretrained(tmp_path / "head")
    refused(r"'.*head' trained whole modules beside it \(lm_head\)", FusionConfig, adapters=[tmp_path / "head"])
    shutil.copytree(good, tmp_path / "bare")
    (tmp_path / "bare" / "adapter_model.safetensors").unlink()
    refused("'.*bare' holds no weights", FusionConfig, adapters=[tmp_path / "bare"])


def test_a_folder_of_a_run_is_that_of_its_adapter(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources("llama")["series"].folder, tmp_path / "run" / "adapter")
    model = get_peft_model(fresh("llama"), FusionConfig(adapters=str(tmp_path / "run"))).eval()
    torch.testing.assert_close(model(IDS).logits, sources("llama")["series"](IDS).logits, **CLOSE)


UP = r"model\.layers\.0\.mlp\.up_proj"
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # the base that the adapter was trained on, the adapter, the message on the usual base
    "another width": ({"hidden_size": 64}, {}, r"adapter '.*' does not fit the model: .* has shape \(6, 64\) instead"),
    "fewer layers": ({"num_hidden_layers": 1}, {}, r"does not fit the model: it has no .*layers\.1\."),
    "more layers": ({"num_hidden_layers": 3}, {}, r"does not fit the model: it has 2 tensors too many, first .*\.2\."),
    "a layer too many": ({"num_hidden_layers": 3}, {"layers": [2]}, "layer 2 does not exist"),
    "into an input": ({}, {"insertion": {"up_proj": "before"}}, f"changes the input of {UP}"),
    "inside another": (
        {},
        {"insertion": {"up_proj": "after"}},
        f"target {UP} lies inside target",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_adapters_that_do_not_fit(sources: Sources, misfit: str, tmp_path: Path) -> None:
    base, options, message = MISFITS[misfit]
    other = get_peft_model(tiny_model("llama", **base), BottleneckConfig(**{"bottleneck_size": 6, **options}))
    other.save_pretrained(tmp_path)
    chosen = FusionConfig(adapters=[sources("llama")["series"].folder, tmp_path])
    target = fresh("llama")
    before = snapshot(target)
    refused(message, get_peft_model, target, chosen)
    assert_unchanged(target, before)
    model = fused(sources, "llama")
    before = snapshot(model)
    message += "|the inside of .* belongs to another adapter"
    refused(message, model.add_adapter, "second", FusionConfig(adapters=[tmp_path, sources("llama")["series"].folder]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("damage", ["missing own", "missing fused", "extra", "shape"])
def test_checkpoints_that_do_not_fit(sources: Sources, damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    fused(sources, "llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    own, inner = (min(k for k in tensors if f".fusion_{what}." in k) for what in ("value", "adapters"))
    if damage == "extra":
        tensors[own.replace("value", "valve")] = torch.zeros(1)
    elif damage == "shape":
        tensors[inner] = tensors[inner][..., :1].contiguous()
    else:
        del tensors[own if damage == "missing own" else inner]
    save_file(tensors, file)
    base = fresh("llama")
    before = snapshot(base)
    refused("the checkpoint", PeftModel.from_pretrained, base, tmp_path)
    assert_unchanged(base, before)


def test_beside_a_bottleneck_adapter(sources: Sources) -> None:
    from peft import inject_adapter_in_model

    base = adapted("llama", "series").base_model.model
    before = snapshot(base)
    refused(
        r"target model\.layers\.0\.mlp already has an adapter of another method \(BottleneckLayer\)",
        inject_adapter_in_model,
        config(sources, "llama", "series"),
        base,
        adapter_name="fusion",
    )
    assert snapshot(base)["classes"] == before["classes"]


def test_weights_that_never_came_are_not_numbers(sources: Sources) -> None:
    """A saved configuration alone has no weights for its adapters: nothing may be computed with a random start."""
    saved = FusionConfig(adapters=config(sources, "llama").adapters)
    model = get_peft_model(fresh("llama"), saved)
    assert model(IDS).logits.isnan().any()
    assert sum(isinstance(m, Wrapper) for m in model.modules()) == 2 * LAYERS
