"""Learned keys and values in the attention (`prefix_length`), alone and with an adapter (mix-and-match).

The reference is what prefix tuning is in the literature: a plain model whose own cache already holds the prefix.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import VARIED, adapted, assert_unchanged, config_of, fresh, ids, perturb, plain, snapshot
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import FAMILIES, LAYERS, tiny_model
from transformers import DynamicCache

from llm_adapters import BottleneckConfig
from llm_adapters.errors import RequestError
from llm_adapters.fusion import FusionConfig

IDS = ids()
LENGTH = 5
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
every_family = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mpt"])  # it refuses
varied_families = pytest.mark.parametrize("family", VARIED)


def mam(family: str, **more: Any) -> PeftModel:
    """A model with a prefix and a parallel adapter, all away from their start."""
    model = adapted(family, "parallel", prefix_length=LENGTH, **more)
    for name, parameter in model.named_parameters():
        if "bottleneck_prefix" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def without_prefix(family: str, model: PeftModel) -> PeftModel:
    """The same adapter alone; with a prefix in the cache it must come to the same."""
    alone = adapted(family, "parallel")
    alone.load_state_dict({n: t for n, t in model.state_dict().items() if "bottleneck_" in n}, strict=False)
    return alone


def cache_with_prefix(model: PeftModel, batch: int) -> DynamicCache:
    prefixes = [p for n, p in model.named_parameters() if "bottleneck_prefix" in n]
    assert len(prefixes) == LAYERS
    cache = DynamicCache()
    for layer, prefix in enumerate(prefixes):
        keys, values = prefix.unsqueeze(1).expand(2, batch, *prefix.shape[1:])
        cache.update(keys, values, layer)
    return cache


def cache_argument() -> str:
    import inspect

    return "cache" if "cache" in inspect.signature(plain("llama").forward).parameters else "past_key_values"


@pytest.mark.proves("formula", method="mam")
@every_family
@torch.no_grad()
def test_is_a_plain_model_whose_cache_holds_the_prefix(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mam(family)
    logits = model(IDS).logits
    given: dict[str, Any] = {cache_argument(): cache_with_prefix(model, len(IDS))}
    given["attention_mask"] = torch.ones(len(IDS), LENGTH + IDS.shape[1], dtype=torch.long)
    if family != "bloom":
        given["position_ids"] = torch.arange(IDS.shape[1]).expand(IDS.shape)  # the tokens' own
    alone = without_prefix(family, model)
    if family == "bloom":  # which adds a number per position to the scores: that of the first token for the prefix
        transformer = alone.base_model.model.transformer
        original = transformer.build_alibi_tensor

        def alibi(mask: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            tokens = original(mask[:, LENGTH:], *args, **kwargs)
            return torch.cat([torch.zeros(*tokens.shape[:-1], LENGTH), tokens], -1)

        monkeypatch.setattr(transformer, "build_alibi_tensor", alibi)
    expected = alone(input_ids=IDS, **given).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (logits - without_prefix(family, model)(IDS).logits).abs().max() > 0.01


def test_an_attention_with_a_prefix_is_the_mean_of_two() -> None:
    """He et al. 2022, eq. 7: (1 - λ) Attn(x, C) + λ Attn(x, P), λ the share of the softmax that the prefix gets."""
    model = mam("gpt2", layers=[0])
    model.set_attn_implementation("eager")
    block = model.base_model.model.transformer.h[0].attn
    hidden = torch.randn(1, 3, 32)
    mask = torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        out, _ = block(hidden, attention_mask=mask)
        query, key, value = (
            part.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for part in block.c_attn(hidden).chunk(3, -1)
        )
        prefix_keys, prefix_values = block.bottleneck_prefix["default"]
        scale = query.shape[-1] ** -0.5
        own, before = query @ key.mT * scale + mask, query @ prefix_keys.mT * scale
        share = torch.sigmoid(before.logsumexp(-1) - own.logsumexp(-1)).unsqueeze(-1)
        mixed = (1 - share) * own.softmax(-1) @ value + share * before.softmax(-1) @ prefix_values
        expected = block.c_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert ((share > 0.01) & (share < 0.99)).any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@varied_families
@torch.no_grad()
def test_padding_changes_nothing(family: str, implementation: str, side: str) -> None:
    if implementation == "sdpa" and not plain(family)._supports_sdpa:
        pytest.skip(f"{family} has no sdpa attention")
    model = mam(family)
    model.set_attn_implementation(implementation)
    short = ids(1, 4, seed=3)
    padding = torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding], 1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1] = torch.cat([padding, torch.ones_like(short)] if side == "left" else [torch.ones_like(short), padding], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    where = {} if family == "bloom" else {"position_ids": positions}
    both = model(input_ids=torch.cat([IDS[:1], row]), attention_mask=mask, **where).logits
    torch.testing.assert_close(both[:1], model(IDS[:1]).logits, **CLOSE)
    got = both[1:, 3:] if side == "left" else both[1:, :4]
    torch.testing.assert_close(got, model(short).logits, **CLOSE)


@pytest.mark.proves("generates", method="mam")
@every_family
@torch.no_grad()
def test_generation_is_the_loop_without_a_cache(family: str) -> None:
    model = mam(family)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = IDS
    for _ in range(6):
        own = torch.cat([own, model(own).logits[:, -1:].argmax(-1)], 1)
    mask = torch.ones_like(IDS)
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=mask, **options), own)
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=mask, use_cache=False, **options), own)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], 1)
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options)[:, 3:], own)


@torch.no_grad()
def test_the_prefix_is_seen_beyond_a_sliding_window() -> None:
    base = tiny_model("mistral", sliding_window=4)
    model = get_peft_model(base, config_of("parallel", "mistral", prefix_length=LENGTH)).eval()
    for name, parameter in model.named_parameters():
        if "bottleneck_prefix" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    long = ids(2, 12, seed=5)
    before = model(long).logits
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = long
    for _ in range(6):
        own = torch.cat([own, model(own).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(input_ids=long, attention_mask=torch.ones_like(long), **options), own)
    with model.disable_adapter():
        assert (model(long).logits[:, -1] - before[:, -1]).abs().max() > 0.01


@pytest.mark.proves("disabled is the base", "unloads", method="mam")
@every_family
@torch.no_grad()
def test_disabled_is_the_base_and_unload_gives_it_back(family: str) -> None:
    base = fresh(family)
    before = snapshot(base)
    expected = plain(family)(IDS).logits
    model = get_peft_model(base, config_of("parallel", family, prefix_length=LENGTH)).eval()
    perturb(model)
    changed = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, changed)
    model.unload()
    before["trained"] = set()
    assert_unchanged(base, before)
    assert torch.equal(base(IDS).logits, expected)


@pytest.mark.proves("saves and loads", method="mam")
@every_family
@torch.no_grad()
def test_saves_and_loads_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = mam(family)
    model.save_pretrained(tmp_path)
    cheap = FAMILIES.index(family) % 2 == 0
    loaded = PeftModel.from_pretrained(fresh(family), tmp_path, adapter_name="other", low_cpu_mem_usage=cheap)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.proves("stable keys", method="mam", family="llama")
def test_keys_of_checkpoints() -> None:
    tensors = get_peft_model_state_dict(mam("llama", layers=[0]))
    start = "base_model.model.model.layers.0."
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == {
        f"{start}self_attn.bottleneck_prefix": [2, 2, LENGTH, 8],  # keys and values, heads, length, width
        f"{start}mlp.bottleneck_down.weight": [6, 32],
        f"{start}mlp.bottleneck_up.weight": [32, 6],
    }


@pytest.mark.proves("trains nothing else", method="mam")
@every_family
def test_trains_prefix_and_adapter_and_nothing_else(family: str) -> None:
    model = mam(family).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(IDS, labels=IDS).loss.backward()
    ours = {name for name in before if "bottleneck_" in name}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == ours
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert sum("bottleneck_prefix" in name for name in ours) == LAYERS
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == ours


@pytest.mark.proves("gradient checkpointing", method="mam")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@varied_families
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    gradients = []
    model = mam(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.proves("half precision", method="mam")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@varied_families
def test_half_precision_bases_keep_the_prefix_in_fp32(family: str, dtype: torch.dtype) -> None:
    model = get_peft_model(fresh(family).to(dtype), config_of("parallel", family, prefix_length=LENGTH)).eval()
    full = mam(family)
    model.load_state_dict({n: t for n, t in full.state_dict().items() if "bottleneck_" in n}, strict=False)
    full.load_state_dict(model.state_dict())
    assert {p.dtype for n, p in model.named_parameters() if "bottleneck_" in n} == {torch.float32}
    logits = model(IDS).logits
    assert logits.dtype == dtype
    with torch.no_grad():
        expected = full(IDS).logits
    assert (logits.float() - expected).abs().max() / expected.abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02)
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters() if p.requires_grad)


FOUR = {"mam": {"prefix_length": LENGTH}, "longer": {"prefix_length": 9, "layers": [1]}, "series": {}}
NAMES = ["series", "mam", "__base__", "longer", "mam"]
MIXED = ids(5, 6, seed=4)


@pytest.mark.proves("mixed batch", "mixed batch generates", "several adapters", method="mam")
@every_family
@torch.no_grad()
def test_a_mixed_batch_is_each_alone(family: str) -> None:
    model: Any = None
    for name, more in FOUR.items():
        config = config_of("series" if name == "series" else "parallel", family, **more)
        if model is None:
            model = get_peft_model(fresh(family), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        perturb(model, name)
    model.eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(MIXED)
    mixed = model(input_ids=MIXED, adapter_names=NAMES).logits
    generated = model.generate(input_ids=MIXED, attention_mask=mask, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        one = plain(family) if name == "__base__" else model
        if name != "__base__":
            model.set_adapter(name)
        alone = MIXED[row : row + 1]
        torch.testing.assert_close(mixed[row : row + 1], one(alone).logits, **CLOSE)
        expected = one.generate(input_ids=alone, attention_mask=mask[:1], **options)
        assert torch.equal(generated[row : row + 1], expected), name
    model.set_adapter("mam")
    before = model(MIXED).logits
    model.delete_adapter("longer")
    assert torch.equal(model(MIXED).logits, before)


@pytest.mark.proves("copies and pickles", method="mam", family="llama")
@torch.no_grad()
def test_copies(tmp_path: Path) -> None:
    model = mam("llama")
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    expected = model(IDS).logits
    perturb(model)
    assert torch.equal(twin(IDS).logits, expected)
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(IDS).logits, expected)


@pytest.mark.proves("compiles", method="mam", family="llama")
def test_compiled_is_the_same() -> None:
    model = mam("llama")
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    again = torch.compile(model, backend="eager")(IDS, labels=IDS).loss
    again.backward()
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=1e-6)
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    model = mam("llama")
    model.base_model.model.config._attn_implementation = "flash_attention_2"
    layer = model.base_model.model.model.layers[0].self_attn
    with pytest.raises(RequestError, match="eager and sdpa, and the model runs flash_attention_2: call"):
        layer(hidden_states=torch.zeros(1, 1, 32), position_embeddings=None, attention_mask=None)
    model.base_model.model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"has a prefix \(prefix_length 5\), which cannot be fused"):
        FusionConfig(adapters=[tmp_path])
    base = fresh("bloom")
    before = snapshot(base)
    with pytest.raises(RequestError, match=r"self_attention\.dense is inside target .*self_attention:"):
        get_peft_model(base, BottleneckConfig(prefix_length=3, placement="attention"))
    assert_unchanged(base, before)
    for family, options in {"mpt": {}, "falcon": {"alibi": True}}.items():
        base = tiny_model(family, **options)
        before = snapshot(base)
        with pytest.raises(RequestError, match="measures distances over the padding"):
            get_peft_model(base, BottleneckConfig(prefix_length=3))
        assert_unchanged(base, before)
