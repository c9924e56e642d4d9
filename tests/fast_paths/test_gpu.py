"""The fast paths on a CUDA device. Run by the same command wherever there is one: `python -m pytest -m gpu`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_path_helpers import OPTIONS, adapted, examples, gradients, long_and_short, plain_loss
from graph_helpers import compute, steps
from tiny import save_tiny
from torch import nn

from llm_adapters.fast_paths import ON, FastPaths
from llm_adapters.ops import backends
from llm_adapters.ops.packing import Pack
from llm_adapters.ops.padded_attention import Scores
from llm_adapters.ops.varlen_attention import varlen_attention
from llm_adapters.training import train
from llm_adapters.training.collator import Collator, MicroBatch
from llm_adapters.training.graphs import MicroBatchGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in full float32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def loss_of(fast: FastPaths, chosen: list) -> torch.Tensor:
    micro_batches = Collator(0, fast.packs, device="cuda").make_micro_batches(chosen)
    return sum((fast.model(**micro.arguments())["loss"] for micro in micro_batches), torch.zeros((), device="cuda"))


def plain(model: Any, chosen: list) -> torch.Tensor:
    total = torch.zeros((), device="cuda")
    for example in chosen:
        logits = model(input_ids=torch.tensor([example.input_ids], device="cuda")).logits[0]
        labels = torch.tensor(example.labels, device="cuda")
        total = total + nn.functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum")
    return total


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "bloom", "gptj"])
def test_float32_is_plain_peft(family: str, method: str) -> None:
    model = adapted(family, method).train().to("cuda")
    chosen = long_and_short(7)
    expected = plain(model, chosen)
    directions = gradients(model, expected)
    with FastPaths(model) as fast:
        assert not [reason for reason in fast.report.values() if "differ" in reason or "failed" in reason]
        loss = loss_of(fast, chosen)
        found = gradients(model, loss)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, direction in directions.items():
        assert (found[name] - direction).norm() <= 1e-5 * direction.norm() + 1e-6, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_bfloat16_is_as_near_to_float32_as_the_plain_way(method: str, checkpointing: bool) -> None:
    model = adapted("llama", method, torch.bfloat16, overrides=SIZES).train().to("cuda")
    chosen = long_and_short(7)
    exact = copy.deepcopy(model).float()
    directions = gradients(exact, plain(exact, chosen))
    own = gradients(model, plain(model, chosen))
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with FastPaths(model) as fast:
        assert fast.packs, fast.report
        assert fast.report["RMS norm"].startswith(ON)
        found = gradients(model, loss_of(fast, chosen))
    for name, direction in directions.items():
        mine, theirs = ((g[name] - direction).norm() / direction.norm() for g in (found, own))
        tolerance = 0.1 if "_scale" in name else 0.01  # the terms of its sum cancel
        assert mine < 2 * theirs + tolerance, f"{name}: {mine:.2g}, and plainly {theirs:.2g}"


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_packs(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, prefix: int, window: int | None, alibi: bool
) -> None:
    """Torch's variable-length attention against the reference in float64, forward and gradients."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(9, (prefix,), generator=generator).tolist()
    sequences = [shared + torch.randint(9, (n,), generator=generator).tolist() for n in (40, 3, 90, 17)]
    pack = Pack.of(sequences, prefix, "cuda")
    shapes = [(4, pack.tokens, 64), (kv_heads, pack.tokens, 64), (kv_heads, pack.tokens, 64)]
    drawn = [torch.randn(shape, generator=generator).to("cuda", torch.bfloat16) for shape in shapes]
    direction = torch.randn((pack.tokens, 4, 64), generator=generator).to("cuda", torch.bfloat16)
    direction[pack.end :] = 0
    slopes = 0.71 ** torch.arange(1, 5, device="cuda").float() if alibi else None

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [part.detach().to(dtype).requires_grad_() for part in drawn]
        out = varlen_attention(*leaves, pack, 0.125, window, alibi_slopes=slopes)
        out.backward(direction.to(dtype))
        return [out[: pack.end].detach(), *(leaf.grad[:, : pack.end] for leaf in leaves)]

    assert backends.function("packed_attention", drawn[0], drawn[2], Scores(0.125, window, slopes))
    found = run(torch.bfloat16)
    monkeypatch.setattr(backends, "disabled", True)
    exact, own = run(torch.float64), run(torch.bfloat16)
    for one, other, truth in zip(found, own, exact, strict=True):
        error, reference = ((part.double() - truth).norm() for part in (one, other))
        assert error <= 1.5 * reference


def test_nothing_waits_for_the_device() -> None:
    """A step's forward and backward pass, with its pack made on the host."""
    model = adapted("llama", "lora", torch.bfloat16, overrides=SIZES, lora_dropout=0.1).train().to("cuda")
    chosen = long_and_short(7)
    with FastPaths(model) as fast:
        loss_of(fast, chosen).backward()  # what is compiled or made once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_of(fast, chosen).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def steps_of_several_sizes() -> list[list[MicroBatch]]:
    """Six optimiser steps of two micro-batches each, of more than one size, each size more than twice."""
    collator = Collator(0, device="cuda")
    chosen = [(4, 9), (20, 7), (5, 9), (21, 7), (6, 9), (22, 7)]
    return [
        [
            micro
            for count, shared in (chosen[i], chosen[i - 1])
            for micro in collator.make_micro_batches(examples(count, shared, seed=i))
        ]
        for i in range(6)
    ]


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_graphs_compute_what_is_computed_without(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses to the bit, with dropout; gradients up to the order in which the device adds, which two runs without
    graphs show."""
    dropout = "lora_dropout" if method == "lora" else "bottleneck_dropout"
    model = adapted(family, method, torch.bfloat16, overrides=SIZES, **{dropout: 0.2}).train().to("cuda")
    batches = steps_of_several_sizes()
    with FastPaths(model) as fast:
        graphs, without, again = (MicroBatchGraphs(model, fast) for _ in range(3))
        found = steps(model, graphs, batches)
        monkeypatch.setattr("llm_adapters.training.graphs.LIMIT", 0)
        computed, repeated = (steps(model, way, batches) for way in (without, again))
        plain = steps(model, None, batches)
    assert graphs.report.startswith(ON), graphs.report
    assert graphs.captured > 1
    assert without.captured == 0
    for (losses, own), (expected, directions), (_, other) in zip(found, computed, repeated, strict=True):
        assert losses == expected
        for name, direction in directions.items():
            noise = (other[name] - direction).norm()
            assert (own[name] - direction).norm() <= 4 * noise + 1e-5 * direction.norm(), name
    # Without rounding and with other seeds of dropout: the same task.
    assert sum(sum(losses) for losses, _ in plain) == pytest.approx(sum(sum(losses) for losses, _ in found), rel=0.2)


def test_replays_wait_for_nothing() -> None:
    model = adapted("llama", "lora", torch.bfloat16, overrides=SIZES, lora_dropout=0.1).train().to("cuda")
    batches = steps_of_several_sizes()
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast)
        steps(model, graphs, batches)
        captured = graphs.captured
        count = torch.tensor(7, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graphs.begin_step()
            for micro in batches[2] + batches[3]:
                assert graphs.run(micro, count, lambda *arguments: compute(model, *arguments)) is not None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert graphs.captured == captured > 1


def test_graphs_that_are_given_up_give_their_memory_back() -> None:
    model = adapted("llama", "series", torch.bfloat16, overrides=SIZES).train().to("cuda")
    batches = steps_of_several_sizes()
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast)
        found = steps(model, graphs, batches)
        before = torch.cuda.memory_reserved()
        assert graphs.release()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before
        again = steps(model, graphs, batches)
    assert [losses for losses, _ in again] == [losses for losses, _ in found]


def test_what_waits_for_the_device_is_not_captured() -> None:
    model = adapted("llama", "series", torch.bfloat16, overrides=SIZES).train().to("cuda")
    layer = model.get_base_model().model.layers[0].mlp
    own = layer.forward
    batches = steps_of_several_sizes()
    with FastPaths(model) as fast:
        expected = steps(model, None, batches)
        layer.forward = lambda x: own(x) * (1.0 if bool(x.abs().max() < 1e9) else 0.0)
        graphs = MicroBatchGraphs(model, fast)
        found = steps(model, graphs, batches)
    assert "waits for the device" in graphs.report
    assert graphs.captured == 0
    for (losses, _), (others, _) in zip(found, expected, strict=True):
        assert losses == pytest.approx(others, rel=2e-2)


def test_a_run_with_graphs_learns_what_one_without_does(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "model": {
            "name": str(save_tiny(tmp_path / "model", "llama", **SIZES)),
            "dtype": "bfloat16",
            "device": "cuda",
        },
        "adapter": {"method": "lora", "options": {"r": 4, "lora_dropout": 0.0}},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 64, "max_length": 256},
        "training": {"epochs": 4, "batch_size": 8, "log_every": 1, "learning_rate": 1e-3},
    }
    runs = [
        train(recipe | {"training": recipe["training"] | {"cuda_graphs": on}}, tmp_path / str(on), progress=False)
        for on in (True, False)
    ]
    told = [run.manifest["fast_paths"]["CUDA graphs"] for run in runs]
    assert "captured in" in told[0], told[0]
    assert told[1] == "not asked for"
    losses = [[line["loss"] for line in run.log if "loss" in line] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_plain_loss_is_the_helpers() -> None:
    model = adapted("llama", "lora")
    chosen = long_and_short(0)
    expected = plain_loss(model, chosen)
    torch.testing.assert_close(plain(model.to("cuda"), chosen).cpu(), expected, rtol=1e-4, atol=0)
