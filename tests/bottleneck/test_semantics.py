"""What a series or parallel adapter computes, against plain models with forward hooks.

The reference knows nothing of `llm_adapters.architectures`: the blocks of each family are named here, by hand.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from bottleneck_helpers import BLOCKS, LLAMA_LIKE, OUTPUT_INSIDE, RESIDUAL_INSIDE, Delta, delta_of
from peft import PeftModel, get_peft_model
from tiny import FAMILIES, HIDDEN, LAYERS, VOCAB, tiny_model
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from llm_adapters import BottleneckConfig

SIZE = 6
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

# family -> (where its decoder layers are, attention block, MLP block)


@cache
def plain(family: str) -> Any:
    return tiny_model(family)


def adapted(family: str, **options: Any) -> PeftModel:
    """A model with an adapter all of whose parameters are away from their start."""
    model = get_peft_model(copy.deepcopy(plain(family)), BottleneckConfig(**({"bottleneck_size": SIZE} | options)))
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def deltas_in_order(model: PeftModel, module: str, names: list[str], insertion: str) -> Delta:
    """Several active adapters: one series adapter after the other, or the sum of the parallel ones."""
    deltas = [delta_of(model, module, name=name) for name in names]

    def series(out: torch.Tensor) -> torch.Tensor:
        changed = out
        for delta in deltas:
            changed = changed + delta(changed)
        return changed - out

    return series if insertion == "series" else lambda h: sum(delta(h) for delta in deltas)


def hook_block(block: nn.Module, insertion: str, delta: Delta, residual_inside: bool) -> None:
    """A plain model's block with `delta` on (series) or beside (parallel) its sub-layer."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        h = next(iter(given.values()))
        out = output[0] if isinstance(output, tuple) else output
        residual = given["residual"] if residual_inside else torch.zeros(())
        sublayer = out - residual
        out = residual + sublayer + delta(sublayer if insertion == "series" else h)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    block.register_forward_hook(hook, with_kwargs=True)


def hook_pair(first: nn.Module, last: nn.Module, insertion: str, delta: Delta) -> None:
    """The same where the sub-layer runs from one linear to another and there is no block (OPT's MLP)."""
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last.register_forward_hook(lambda module, args, y: y + delta(y if insertion == "series" else seen.pop()))


def reference(
    family: str,
    insertion: str,
    placements: list[str],
    model: PeftModel,
    make: Callable[..., Delta] = delta_of,
    **formula: Any,
) -> torch.Tensor:
    """Logits of the plain model with hooks, with the weights of `model`'s adapters."""
    expected = copy.deepcopy(plain(family))
    stack, attention, mlp = BLOCKS.get(family, LLAMA_LIKE)
    for index, layer in enumerate(expected.get_submodule(stack)):
        for placement in placements:
            block = attention if placement == "attention" else mlp
            inside = (family, placement) in RESIDUAL_INSIDE
            start = f"{stack}.{index}."
            if isinstance(block, tuple):
                first, last = block
                delta = make(model, start + last, **formula)
                hook_pair(layer.get_submodule(first), layer.get_submodule(last), insertion, delta)
            else:
                output = block + OUTPUT_INSIDE[family, placement] if inside else block
                hook_block(layer.get_submodule(block), insertion, make(model, start + output, **formula), inside)
    return expected(IDS).logits


# Only to look the weights up: where the block adds the residual, our layer sits on its last linear.
PLACEMENTS = {"attention": ["attention"], "mlp": ["mlp"], "both": ["attention", "mlp"]}


@pytest.mark.proves("formula", method="{insertion}")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("insertion", ["series", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_matches_hooks_on_the_plain_model(family: str, insertion: str, placement: str) -> None:
    where = PLACEMENTS[placement]
    model = adapted(family, insertion=insertion, placement=where)
    logits = model(IDS).logits
    torch.testing.assert_close(logits, reference(family, insertion, where, model), **CLOSE)
    assert (logits - plain(family)(IDS).logits).abs().max() > 0.01  # the adapter does something
    adapters = [name for name, _ in model.named_parameters() if "bottleneck_down" in name]
    assert len(adapters) == LAYERS * len(where)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "size": ({"bottleneck_size": 3}, {}),
    "scaling": ({"scaling": 4.0}, {"scale": 4.0}),
    "integer scaling": ({"scaling": 2}, {"scale": 2.0}),
    "learned scaling": ({"scaling": "learned"}, {}),
    "bias": ({"use_bias": True}, {}),
    "bias and learned scaling": ({"use_bias": True, "scaling": "learned"}, {}),
    "linear": ({"non_linearity": "linear"}, {"activation": lambda h: h}),
    "relu": ({"non_linearity": "relu"}, {"activation": torch.relu}),
    "silu": ({"non_linearity": "silu"}, {"activation": functional.silu}),
    "gelu": ({"non_linearity": "gelu"}, {"activation": functional.gelu}),
    "gelu_new": (
        {"non_linearity": "gelu_new"},
        {"activation": lambda h: functional.gelu(h, approximate="tanh")},
    ),
    "dropout at inference": ({"bottleneck_dropout": 0.5}, {}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("insertion", ["series", "parallel"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_options(family: str, insertion: str, option: str) -> None:
    options, formula = OPTIONS[option]
    model = adapted(family, insertion=insertion, placement="mlp", **options)
    expected = reference(family, insertion, ["mlp"], model, **formula)
    torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
    without = reference(family, insertion, ["mlp"], adapted(family, insertion=insertion, **options), **formula)
    assert (expected - without).abs().max() > 0.01  # other weights are told apart


@pytest.mark.parametrize("name", [n for n in ACT2FN if not any(True for _ in ACT2FN[n].parameters())])
@torch.no_grad()
def test_every_activation_of_transformers(name: str) -> None:
    model = adapted("llama", non_linearity=name)
    expected = reference("llama", "series", ["mlp"], model, activation=ACT2FN[name])
    torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)


def test_dropout_while_training() -> None:
    model = adapted("llama", bottleneck_dropout=0.5, non_linearity="linear").train()
    assert (model(IDS).logits - model(IDS).logits).abs().max() > 0.01
    layer = model.base_model.model.model.layers[0].mlp
    for projection in (layer.bottleneck_down, layer.bottleneck_up):
        nn.init.ones_(projection["default"].weight)
    mean = layer.delta("default", torch.ones(4000, HIDDEN)).mean().item()
    assert mean == pytest.approx(HIDDEN * SIZE, rel=0.02)  # what is kept is scaled up to make good for what is dropped


@pytest.mark.parametrize("layers", [[0], [1], [-1], [0, -1]])
@pytest.mark.parametrize("family", ["llama", "bloom", "opt"])
@torch.no_grad()
def test_a_subset_of_layers(family: str, layers: list[int]) -> None:
    model = adapted(family, insertion="parallel", layers=layers)
    stack, _, _ = BLOCKS.get(family, LLAMA_LIKE)
    chosen = {i % LAYERS for i in layers}
    everywhere = adapted(family, insertion="parallel")
    for name, parameter in everywhere.named_parameters():
        if "bottleneck_" in name:  # an adapter of all layers, zero where `model` has none, is the same function
            there = any(f".{stack}.{i}." in name for i in chosen)
            parameter.data = model.get_parameter(name).data if there else torch.zeros_like(parameter)
    with_adapter = [name for name, _ in model.named_parameters() if "bottleneck_down" in name]
    assert len(with_adapter) == len(chosen)
    torch.testing.assert_close(model(IDS).logits, reference(family, "parallel", ["mlp"], everywhere), **CLOSE)


@pytest.mark.parametrize("insertion", ["series", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_several_active_at_once(family: str, insertion: str) -> None:
    model = adapted(family, insertion=insertion)
    model.add_adapter("second", BottleneckConfig(insertion=insertion, bottleneck_size=3))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            nn.init.normal_(parameter, std=0.3)
    results = []
    for names in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(names)
        results.append(model(IDS).logits)
        make = partial(deltas_in_order, names=names, insertion=insertion)
        expected = reference(family, insertion, ["mlp"], model, make)
        torch.testing.assert_close(results[-1], expected, **CLOSE)
    assert torch.allclose(*results, atol=1e-5) == (insertion == "parallel")  # only the series adapters' order matters


# One linear of each role, on plain linears, fused ones and Conv1D.
LINEARS = {
    "llama": ("model.layers.{}.", "self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"),
    "gptj": ("transformer.h.{}.", "attn.q_proj", "mlp.fc_out", "mlp.fc_in"),
    "bloom": ("transformer.h.{}.", "self_attention.query_key_value", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    "gpt2": ("transformer.h.{}.", "attn.c_attn", "mlp.c_proj", "mlp.c_fc"),
    "opt": ("model.decoder.layers.{}.", "self_attn.v_proj", "fc2", "fc1"),
    "mixtral": ("model.layers.{}.", "self_attn.q_proj", "self_attn.o_proj", "self_attn.v_proj"),
}


def hook_linear(linear: nn.Module, insertion: str, delta: Delta) -> None:
    if insertion == "before":
        linear.register_forward_pre_hook(lambda module, args: (args[0] + delta(args[0]),))
    elif insertion == "after":
        linear.register_forward_hook(lambda module, args, y: y + delta(y))
    else:
        linear.register_forward_hook(lambda module, args, y: y + delta(args[0]))


@pytest.mark.proves("formula", method="linears")
@pytest.mark.parametrize("mixed", [False, True], ids=["one insertion", "mapping"])
@pytest.mark.parametrize("insertion", ["before", "after", "parallel"])
@pytest.mark.parametrize("family", LINEARS)
@torch.no_grad()
def test_linears(family: str, insertion: str, mixed: bool) -> None:
    stack, *linears = LINEARS[family]
    kinds = ["before", "after", "parallel"]
    start = kinds.index(insertion)
    at = {name: kinds[(start + i) % 3] if mixed else insertion for i, name in enumerate(linears)}
    if mixed:
        model = adapted(family, insertion=dict(at))
    else:
        model = adapted(family, insertion=insertion, target_modules=linears)
    expected = copy.deepcopy(plain(family))
    for index in range(LAYERS):
        for name, kind in at.items():
            module = stack.format(index) + name
            hook_linear(expected.get_submodule(module), kind, delta_of(model, module))
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, **CLOSE)
    assert (model(IDS).logits - plain(family)(IDS).logits).abs().max() > 0.01


@torch.no_grad()
def test_target_modules_as_regular_expression_full_name_and_longest_ending() -> None:
    model = adapted("llama", target_modules=r".*layers\.1\.mlp\.(up|down)_proj", insertion="after")
    assert {n for n, _ in model.named_parameters() if "bottleneck_down" in n} == {
        f"base_model.model.model.layers.1.mlp.{p}_proj.bottleneck_down.default.weight" for p in ("up", "down")
    }
    model = adapted("llama", target_modules=["model.layers.0.mlp"])
    assert [n for n, _ in model.named_parameters() if "bottleneck_down" in n] == [
        "base_model.model.model.layers.0.mlp.bottleneck_down.default.weight"
    ]
    by_ending = adapted("llama", insertion={"q_proj": "before", "layers.1.self_attn.q_proj": "after"})
    layers = by_ending.base_model.model.model.layers
    assert layers[0].self_attn.q_proj.placements["default"].insertion == "before"
    assert layers[1].self_attn.q_proj.placements["default"].insertion == "after"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("insertion", ["series", "parallel"])
@torch.no_grad()
def test_starts_as_the_identity_exactly(family: str, insertion: str) -> None:
    model = get_peft_model(
        copy.deepcopy(plain(family)),
        BottleneckConfig(insertion=insertion, placement=["attention", "mlp"], use_bias=True, scaling="learned"),
    )
    assert torch.equal(model.eval()(IDS).logits, plain(family)(IDS).logits)


def test_paper_initialisation() -> None:
    # The paper's code draws both projections from N(0, 0.02); biases start at zero.
    config = BottleneckConfig(placement=["attention", "mlp"], init_weights="paper", bottleneck_size=256, use_bias=True)
    model = get_peft_model(copy.deepcopy(plain("llama")), config)
    weights = {n: p for n, p in model.named_parameters() if "bottleneck_" in n}
    for name, parameter in weights.items():
        if name.endswith("bias"):
            assert not parameter.any()
        else:  # 8192 draws: the mean's standard error is 2.2e-4, the deviation's 1.6e-4
            assert parameter.mean().item() == pytest.approx(0, abs=1e-3)
            assert parameter.std().item() == pytest.approx(0.02, abs=8e-4)
    assert len(weights) == 2 * LAYERS * 4


def test_learned_scaling_starts_at_one_and_is_trained() -> None:
    model = get_peft_model(copy.deepcopy(plain("llama")), BottleneckConfig(scaling="learned", init_weights="paper"))
    scales = [p for n, p in model.named_parameters() if "bottleneck_scale" in n]
    assert len(scales) == LAYERS
    assert all(p.item() == 1.0 and p.requires_grad for p in scales)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().item() > 0 for p in scales)
