"""The method inside other people's training: Trainer, TRL, torch.compile, quantised bases; and properties."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import SIZE, adapted, config_of, fresh, ids, perturb, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny import HIDDEN, tiny_model, tiny_tokenizer

from llm_adapters import BottleneckConfig
from llm_adapters.bottleneck import BottleneckLayer, placements
from llm_adapters.compat.bitsandbytes import keep_layout

IDS = ids()


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **more,
    }


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_only_the_adapter_moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "bottleneck_" in name}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["series", "parallel"])
def test_two_steps_of_the_trainer(method: str, checkpointing: bool, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted("llama", method).train()
    before = parameters(model)
    rows = [{"input_ids": row, "labels": row} for row in ids(4)]
    options = {"gradient_checkpointing": checkpointing, "save_steps": 2}
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path, **options)), train_dataset=rows)
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2
    assert_only_the_adapter_moved(model, before)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path / "checkpoint-2")
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_two_steps_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    data = datasets.Dataset.from_list([{"prompt": f"How many is {n}?", "completion": f" {n}."} for n in range(4)])
    trainer = trl.SFTTrainer(
        model=fresh("llama"),
        args=trl.SFTConfig(**arguments(tmp_path, max_length=32)),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=config_of("both-learned", "llama"),
    )
    model = trainer.model
    assert isinstance(model, PeftModel)
    perturb(model)
    before = parameters(model)
    trainer.train()
    assert_only_the_adapter_moved(model, before)


@pytest.mark.proves("compiles")
@pytest.mark.parametrize("method", ["series", "parallel", "linears"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_compiled_is_the_same(family: str, method: str) -> None:
    model = adapted(family, method)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    again = compiled(IDS, labels=IDS).loss
    again.backward()
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=1e-6)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-5)


def test_a_layer_compiles_without_a_break() -> None:
    model = adapted("llama", "both-learned")
    layer = model.base_model.model.model.layers[0].mlp
    assert isinstance(layer, BottleneckLayer)
    hidden = torch.randn(2, 3, HIDDEN)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), layer(hidden), atol=1e-6, rtol=1e-6)


# --- quantised bases


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["series", "parallel", "linears"])
def test_bitsandbytes(bits: int, method: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    options: dict[str, Any] = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True}
    config = BitsAndBytesConfig(**options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    keep_layout(base)
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    assert isinstance(base.model.layers[0].mlp.up_proj, kind)
    with torch.no_grad():
        expected = base(IDS).logits
    model = get_peft_model(prepare_model_for_kbit_training(base), config_of(method, "llama"))
    with torch.no_grad():
        start = model.eval()(IDS).logits
    torch.testing.assert_close(start, expected.to(start.dtype), atol=1e-2, rtol=1e-2)
    perturb(model)
    model.train()(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("bottleneck_" in name and torch.isfinite(g).all() and g.any() for name, g in gradients.items())


@pytest.mark.parametrize("method", ["series", "parallel", "linears"])
def test_torchao(method: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    base = fresh("llama")
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = base(IDS).logits
    model = get_peft_model(base, config_of(method, "llama"))
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, expected)
    perturb(model)
    model(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("bottleneck_" in name and torch.isfinite(g).all() and g.any() for name, g in gradients.items())


# --- properties

modest = settings(max_examples=15, deadline=None, derandomize=True)


@modest
@given(order=st.permutations(["a", "b", "c"]), family=st.sampled_from(["llama", "bloom", "opt"]))
def test_parallel_adapters_may_come_in_any_order(order: list[str], family: str) -> None:
    results = []
    for names in (["a", "b", "c"], order):
        model: Any = None
        for name in names:
            config = config_of("parallel", family, bottleneck_size=ord(name) - 94)
            if model is None:
                model = get_peft_model(fresh(family), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        for name in "abc":  # the same weights whatever the order
            torch.manual_seed(ord(name))
            perturb(model, name)
        model.eval().base_model.set_adapter(list(names))
        with torch.no_grad():
            results.append(model(IDS).logits)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@modest
@given(
    size=st.integers(1, 70),
    insertion=st.sampled_from(["before", "after", "parallel"]),
    target=st.sampled_from([("up_proj", 32, 64), ("down_proj", 64, 32), ("q_proj", 32, 32), ("k_proj", 32, 16)]),
    bias=st.booleans(),
)
def test_widths_and_counts_follow_from_the_linear(
    size: int, insertion: str, target: tuple[str, int, int], bias: bool
) -> None:
    name, taken, given_ = target
    config = BottleneckConfig(
        target_modules=[name], insertion=insertion, bottleneck_size=size, use_bias=bias, layers=[0]
    )
    width = {"before": (taken, taken), "after": (given_, given_), "parallel": (taken, given_)}[insertion]
    planned = placements(plain("llama"), config)
    assert [(p.in_features, p.out_features) for p in planned.values()] == [width]
    model = get_peft_model(fresh("llama"), config)
    count = size * sum(width) + bias * (size + width[1])
    assert model.get_nb_trainable_parameters()[0] == count
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, plain("llama")(IDS).logits)


@modest
@given(
    names=st.lists(st.sampled_from(["one", "two", "__base__"]), min_size=1, max_size=6),
    family=st.sampled_from(["llama", "opt", "falcon"]),
)
def test_any_mixed_batch_is_each_alone(names: list[str], family: str) -> None:
    model = adapted(family, "series")
    model.add_adapter("one", config_of("series", family))
    model.add_adapter("two", config_of("parallel", family))
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))
        perturb(model, name)
    batch = ids(len(names), 5, seed=2)
    with torch.no_grad():
        mixed = model.eval()(batch, adapter_names=names).logits
        alone = torch.cat(
            [model(row[None], adapter_names=[name]).logits for row, name in zip(batch, names, strict=True)]
        )
        expected = {}
        for name in set(names):
            if name == "__base__":
                expected[name] = plain(family)(batch).logits
            else:
                model.set_adapter(name)
                expected[name] = model(batch).logits
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        mixed, torch.stack([expected[name][row] for row, name in enumerate(names)]), atol=1e-5, rtol=1e-5
    )


@modest
@given(scale=st.floats(-4, 4).filter(bool), hidden=st.integers(0, 3))
def test_scaling_scales_the_delta(scale: float, hidden: int) -> None:
    model = adapted("llama", "series")
    scaled = copy.deepcopy(model)
    layer, other = (m.base_model.model.model.layers[0].mlp for m in (model, scaled))
    other.options["default"] = BottleneckConfig(bottleneck_size=SIZE, scaling=scale)
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(hidden))
    with torch.no_grad():
        torch.testing.assert_close(other.delta("default", x), scale * layer.delta("default", x), atol=1e-6, rtol=1e-5)
