"""The fast paths on a CUDA device. Run by the same command wherever there is one: `python -m pytest -m gpu`."""

import copy
from typing import Any

import pytest
import torch
from fast_path_helpers import OPTIONS, adapted, gradients, long_and_short, plain_loss
from torch import nn

from llm_adapters.fast_paths import ON, FastPaths
from llm_adapters.ops import backends
from llm_adapters.ops.packing import Pack
from llm_adapters.ops.padded_attention import Scores
from llm_adapters.ops.varlen_attention import varlen_attention
from llm_adapters.training.collator import Collator

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


def test_plain_loss_is_the_helpers() -> None:
    model = adapted("llama", "lora")
    chosen = long_and_short(0)
    expected = plain_loss(model, chosen)
    torch.testing.assert_close(plain(model.to("cuda"), chosen).cpu(), expected, rtol=1e-4, atol=0)
