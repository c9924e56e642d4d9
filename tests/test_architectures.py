"""The rows say the truth about real models, and what has no row is found by structure or refused."""

import copy
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, HEADS, HIDDEN, LAYERS, VOCAB, WIDTH, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llm_adapters import BottleneckConfig, architectures
from llm_adapters.architectures import PLACEMENTS, architecture_of, decoder_layers, discover, sites
from llm_adapters.errors import RequestError

IDS = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def shared_model(family: str) -> Any:
    return tiny_model(family)


def fresh(family: str) -> Any:
    return copy.deepcopy(shared_model(family))


def zeroed(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple | list):
        return type(output)([torch.zeros_like(output[0]), *output[1:]])
    return torch.zeros_like(output)


@torch.no_grad()
def change_without_sublayers(model: nn.Module, placements: tuple[str, ...] = PLACEMENTS) -> float:
    """How far the decoder's layers move the hidden state when the output of every sub-layer is zero."""
    for site in sites(model, placements):
        linear = model.get_submodule(site.output)
        if isinstance(getattr(linear, "bias", None), nn.Parameter):
            linear.bias.zero_()
        linear.register_forward_hook(zeroed)
    _, stack = decoder_layers(model)
    ends: list[torch.Tensor] = []
    stack[0].register_forward_pre_hook(
        lambda m, args, kwargs: ends.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    stack[-1].register_forward_hook(lambda m, args, y: ends.append(y[0] if isinstance(y, tuple | list) else y))
    model(IDS)
    return (ends[1] - ends[0]).abs().max().item()


# --- rows


def test_every_row_has_a_tiny_model_and_the_other_way_round() -> None:
    assert set(architectures.FAMILIES) == set(FAMILIES)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"LLaMA, BLOOM, GPT-J and {len(FAMILIES) - 3} more families" in readme


@every_family
def test_what_a_row_calls_the_sublayers_is_all_that_a_layer_adds_to_the_residual(family: str) -> None:
    """Without the two outputs nothing is left but the residual; with either of them there is more."""
    assert change_without_sublayers(fresh(family)) < 1e-6
    for placement in PLACEMENTS:
        assert change_without_sublayers(fresh(family), (placement,)) > 1e-2


@every_family
@torch.no_grad()
def test_what_a_row_calls_the_input_is_what_the_sublayer_reads(family: str) -> None:
    """A sub-layer's output is a function of its input alone: the same input gives the same output, another another."""
    model = fresh(family)
    for site in sites(model, PLACEMENTS):
        start, end = model.get_submodule(site.input), model.get_submodule(site.output)
        outputs: list[torch.Tensor] = []
        given: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any, outputs: list[torch.Tensor] = outputs) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).clone())  # falcon adds to it in place

        def replace(module: nn.Module, args: Any, kwargs: Any, given: list[torch.Tensor] = given) -> Any:
            if not args:
                return (), {**kwargs, "hidden_states": given[0]}
            return (given[0].view_as(args[0]), *args[1:]), kwargs

        handles = [end.register_forward_hook(keep), start.register_forward_pre_hook(replace, with_kwargs=True)]
        for ids, hidden in ((IDS, 0.0), (IDS + 1, 0.0), (IDS, 1.0)):
            given[:] = [torch.linspace(-1, 1, IDS.numel() * HIDDEN).view(*IDS.shape, HIDDEN) + hidden]
            model(ids)
        for handle in handles:
            handle.remove()
        assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
        assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def sizes(module: nn.Module) -> tuple[int, int]:
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else (module.in_features, module.out_features)  # type: ignore[return-value]


@every_family
def test_projections_have_the_sizes_of_their_roles(family: str) -> None:
    model = fresh(family)
    row = architecture_of(model)
    _, stack = decoder_layers(model)
    experts = family in ("mixtral", "qwen3_moe", "olmoe")
    inner = 4 * HIDDEN if family in ("bloom", "gptj", "gpt2", "falcon", "mpt") else WIDTH
    for layer in stack:
        attention = [sizes(layer.get_submodule(name)) for name in row.qkv]
        assert all(taken == HIDDEN for taken, _ in attention)
        assert sizes(layer.get_submodule(row.o)) == (HIDDEN, HIDDEN)
        # one projection holds queries, keys and values; falcon's has one head of keys and of values
        if len(row.qkv) == 1:
            assert attention[0][1] in (3 * HIDDEN, 2 * HIDDEN, HIDDEN + 2 * HIDDEN // HEADS)
        else:
            assert attention[0][1] == HIDDEN
            assert attention[1][1] == attention[2][1] in (HIDDEN, HIDDEN // 2)
        assert bool(row.up) == bool(row.down) == (not experts)
        if row.up:
            fused = not row.gate and row.up.endswith("gate_up_proj")
            assert sizes(layer.get_submodule(row.up)) == (HIDDEN, 2 * inner if fused else inner)
            assert sizes(layer.get_submodule(row.down)) == (inner, HIDDEN)
        if row.gate:
            assert sizes(layer.get_submodule(row.gate)) == (HIDDEN, inner)
        for name in (*row.qkv, row.o, row.up, row.down, row.gate):
            if name:
                assert isinstance(layer.get_submodule(name), Conv1D) == row.conv1d
                assert isinstance(layer.get_submodule(name), Conv1D | nn.Linear)
        # no other linear of the layer is left out, but for routers
        named = {name for name in (*row.qkv, row.o, row.up, row.down, row.gate) if name}
        linears = {name for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        assert linears - named == set()


@every_family
def test_lora_targets_are_those_of_the_paper(family: str) -> None:
    """Section 3 of the paper: q, k, v, up and down; one name where q, k and v are one projection."""
    row = architectures.FAMILIES[family]
    model = get_peft_model(fresh(family), LoraConfig(target_modules=row.lora_targets, r=2))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == LAYERS * len(row.lora_targets)


# --- finding the layers


@every_family
def test_layers_are_found_with_and_without_a_head_and_inside_peft(family: str) -> None:
    whole = fresh(family)
    headless = AutoModel.from_config(tiny_config(family))
    prefix, stack = decoder_layers(whole)
    bare, bare_stack = decoder_layers(headless)
    assert len(stack) == len(bare_stack) == LAYERS
    assert prefix == f"{whole.base_model_prefix}.{bare}"
    names = [(s.layer, s.placement) for s in sites(headless, PLACEMENTS)]
    assert names == [(i, p) for i in range(LAYERS) for p in PLACEMENTS]
    expected = [s.output for s in sites(whole, PLACEMENTS)]
    adapted = get_peft_model(whole, BottleneckConfig(placement=PLACEMENTS, bottleneck_size=2))
    inside, same = decoder_layers(adapted)
    assert same is stack
    assert inside == f"base_model.model.{prefix}"
    assert [s.output for s in sites(adapted, PLACEMENTS)] == [f"base_model.model.{name}" for name in expected]
    assert [s.output for s in sites(adapted.base_model.model, PLACEMENTS)] == expected


def test_sites_of_some_layers_in_order_whatever_order_is_given() -> None:
    model = tiny_model("opt", num_hidden_layers=4)
    found = sites(model, ("mlp", "attention"), [-1, 0, 3])
    start = "model.decoder.layers"
    assert [(s.layer, s.placement, s.output, s.input) for s in found] == [
        (i, *rest)
        for i in (0, 3)
        for rest in (
            ("attention", f"{start}.{i}.self_attn", f"{start}.{i}.self_attn"),
            ("mlp", f"{start}.{i}.fc2", f"{start}.{i}.fc1"),
        )
    ]
    for index in (4, -5):
        with pytest.raises(RequestError, match=f"layer {index} does not exist: the model has 4 layers, 0 to 3"):
            sites(model, ("mlp",), [index])


def test_experts_as_many_as_layers_are_no_layers() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    model.model.layers[0].mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert decoder_layers(model)[0] == "model.layers"


def test_two_lists_of_the_same_length_are_told_apart_by_what_they_hold() -> None:
    model = tiny_model("llama")
    model.vision = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    with pytest.raises(RequestError, match=r"candidates: model\.layers, vision\); name the modules .* target_modules"):
        decoder_layers(model)
    assert sites(model, ("mlp",))[0].output == "model.layers.0.mlp"
    model.twin = model.model.layers
    model.twin = nn.ModuleList(list(model.model.layers))
    with pytest.raises(RequestError, match=r"candidates: .*twin"):
        sites(model, ("mlp",))


def test_a_model_without_layers() -> None:
    with pytest.raises(
        RequestError, match=r"cannot tell the list of None decoder layers of Linear \(candidates: none\)"
    ):
        decoder_layers(nn.Linear(2, 2))


# --- families without a row

TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HIDDEN // HEADS,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
# family -> attention, MLP, configuration
UNKNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmo": ("self_attn", "mlp", TINY),
    "olmo3": ("self_attn", "mlp", TINY),
    "cohere2": ("self_attn", "mlp", TINY),
    "exaone4": ("self_attn", "mlp", TINY),
    "nemotron": ("self_attn", "mlp", TINY),
    "persimmon": ("self_attn", "mlp", TINY),
    "seed_oss": ("self_attn", "mlp", TINY),
    "lfm2": ("self_attn", "feed_forward", TINY | {"layer_types": ["full_attention"] * LAYERS}),
    "granitemoe": ("self_attn", "block_sparse_moe", TINY | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("self_attn", "mlp", TINY | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_bigcode": ("attn", "mlp", GPT),
    "llama4_text": (
        "self_attn",
        "feed_forward",
        TINY | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": WIDTH},
    ),
}


@cache
def shared_unknown(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **UNKNOWN[family][2]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def unknown_model(family: str) -> Any:
    return copy.deepcopy(shared_unknown(family))


@pytest.mark.parametrize("family", UNKNOWN)
def test_real_families_without_a_row_are_found(family: str, caplog: pytest.LogCaptureFixture) -> None:
    attention, mlp, _ = UNKNOWN[family]
    model = unknown_model(family)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "llm_adapters"):
        row = architecture_of(model)
    assert (row.attention.output, row.mlp.output, row.discovered) == (attention, mlp, True)
    assert [record.getMessage() for record in caplog.records] == [
        f"the family {family!r} has no row; found by structure in {decoder_layers(model)[0]}: "
        f"attention = {attention}, MLP = {mlp}"
    ]
    assert change_without_sublayers(model) < 1e-6


def test_lora_targets_of_a_family_without_a_row_are_those_with_the_usual_names() -> None:
    usual = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]
    assert architecture_of(unknown_model("olmo")) == architectures.FAMILIES["llama"]
    assert architecture_of(unknown_model("olmo")).lora_targets == usual
    assert architecture_of(unknown_model("granitemoe")).lora_targets == usual[:3]  # experts are no linears
    assert architecture_of(unknown_model("gpt_bigcode")).lora_targets == []  # named otherwise


@pytest.mark.parametrize("insertion", ["series", "parallel"])
@pytest.mark.parametrize("family", UNKNOWN)
@torch.no_grad()
def test_adapters_work_on_them(family: str, insertion: str) -> None:
    base = unknown_model(family)
    expected = base(IDS).logits
    config = BottleneckConfig(insertion=insertion, placement=PLACEMENTS, bottleneck_size=4)
    model = get_peft_model(base, config).eval()
    assert torch.equal(model(IDS).logits, expected)
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            nn.init.normal_(parameter, std=0.3)
    alone = model(IDS[:1]).logits
    assert not torch.allclose(alone, expected[:1], atol=1e-3)
    mixed = model(IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[:1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1:], expected[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "falcon", "mixtral", "gpt_neox"])
@torch.no_grad()
def test_a_renamed_family_gets_the_same_adapter_as_its_row(family: str) -> None:
    models = []
    for name in (family, "made_up"):
        base = fresh(family)
        base.config.model_type = name
        torch.manual_seed(0)
        config = BottleneckConfig(placement=PLACEMENTS, bottleneck_size=4, init_weights="paper")
        models.append(get_peft_model(base, config).eval())
    assert architecture_of(models[1]).discovered
    assert not architecture_of(models[0]).discovered
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj(hidden_states)


class AddingBlock(Attention):
    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return residual + self.proj(hidden_states)


class NormedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(4)
        self.inner = Attention()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.inner(self.layernorm(hidden_states))


def made_up(*layers: dict[str, nn.Module]) -> nn.Module:
    """A model of an unknown family with these children in its layers."""
    model = nn.Module()
    model.config = AutoConfig.for_model("llama", num_hidden_layers=len(layers))  # type: ignore[assignment]
    model.config.model_type = "made_up"
    model.layers = nn.ModuleList()
    for children in layers:
        layer = nn.Module()
        for name, child in children.items():
            layer.add_module(name, child)
        model.layers.append(layer)
    return model


def test_made_up_layers() -> None:
    layer = {"norm": nn.LayerNorm(4), "look": Attention(), "think": nn.Linear(4, 4), "drop": nn.Dropout()}
    found = discover(made_up(layer, layer))
    assert (found.attention.output, found.mlp.output) == ("look", "think")
    assert found.lora_targets == []


AMBIGUOUS: dict[str, tuple[list[dict[str, nn.Module]], str]] = {
    "two other blocks": (
        [{"attn": Attention(), "fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}],
        r"layers\.0 holds attn \(Attention\), fc1 \(Linear\), fc2 \(Linear\)\. Name the modules with target_modules "
        r"and insertion \(before, after or parallel\)",
    ),
    "two attentions": (
        [{"a": Attention(), "b": Attention(), "mlp": nn.Linear(4, 4)}],
        r"a \(Attention\), b \(Attention\)",
    ),
    "no attention": ([{"mixer": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)}], r"mixer \(Linear\), mlp \(Linear\)"),
    "attention alone": ([{"attn": Attention()}], r"layers\.0 holds attn \(Attention\)\."),
    "adds the residual": ([{"attn": Attention(), "mlp": AddingBlock()}], r"mlp \(AddingBlock\)"),
    "norms and adds": ([{"attn": NormedAttention(), "mlp": nn.Linear(4, 4)}], r"attn \(NormedAttention\)"),
    "other layers": (
        [{"attn": Attention(), "mlp": nn.Linear(4, 4)}, {"linear_attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)}],
        r"layers\.1 holds linear_attn \(Linear\), mlp \(Linear\)",
    ),
    "other names": (
        [{"attn": Attention(), "mlp": nn.Linear(4, 4)}, {"cross": Attention(), "mlp": nn.Linear(4, 4)}],
        r"layers\.1 holds cross \(Attention\)",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_layers_are_shown(case: str) -> None:
    layers, message = AMBIGUOUS[case]
    with pytest.raises(RequestError, match=message) as caught:
        discover(made_up(*layers))
    assert "the family 'made_up' has no row" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_error_advises_works() -> None:
    base = tiny_model("opt")
    base.config.model_type = "made_up"
    with pytest.raises(RequestError, match=r"self_attn \(OPTAttention\), fc1 \(Linear\), fc2 \(Linear\)"):
        get_peft_model(base, BottleneckConfig(bottleneck_size=2))
    model = get_peft_model(base, BottleneckConfig(bottleneck_size=2, target_modules=["fc2"], insertion="after"))
    assert sum("bottleneck_down" in name for name, _ in model.named_parameters()) == LAYERS


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_blocks_that_take_the_residual_are_no_guess(family: str) -> None:
    base = fresh(family)
    base.config.model_type = "made_up"
    with pytest.raises(RequestError, match="made_up"):
        architecture_of(base)


def test_needs_no_torch_to_import() -> None:
    import subprocess

    code = "import sys, llm_adapters.architectures; print('torch' in sys.modules)"
    root = Path(architectures.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "False\n"
