"""LoRA beside quantised weights, and everything else that is on for such a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fast_path_helpers import OPTIONS, assert_same, examples, gradients, plain_loss
from peft import get_peft_model

from llm_adapters import methods
from llm_adapters.fast_paths import ON, FastPaths
from llm_adapters.training.collator import Collator

pytest.importorskip("bitsandbytes")
from quantized import quantised, save_wide


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("models") / "llama")


def adapted(folder: Path, kind: str, method: str, dtype: str = "float32", **options: Any) -> Any:
    base = quantised(folder, kind, dtype).model
    torch.manual_seed(0)
    model = get_peft_model(base, methods.adapter_config(method, base, **(OPTIONS[method] | options))).train()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def loss_of(fast: FastPaths) -> torch.Tensor:
    micro_batches = Collator(0, fast.packs).make_micro_batches(examples())
    return sum((fast.model(**micro.arguments())["loss"] for micro in micro_batches), torch.zeros(()))


@pytest.mark.parametrize(
    ("kind", "dtype", "room"),
    # What int8 rounds by is in float32 more than the trial takes for rounding: packs are off there.
    [("nf4", "float32", 1e-5), ("nf4", "bfloat16", 0.05), ("int8", "bfloat16", 0.05)],
)
@pytest.mark.parametrize("method", OPTIONS)
def test_loss_and_gradients_are_those_without_fast_paths(
    method: str, kind: str, dtype: str, room: float, folder: Path
) -> None:
    model = adapted(folder, kind, method, dtype)
    expected = plain_loss(model, examples())
    directions = gradients(model, expected)
    with FastPaths(model) as fast:
        assert fast.packs, fast.report
        assert fast.fused_cross_entropy
        assert fast.report["SwiGLU"].startswith(ON)
        if method == "lora":
            assert fast.report["LoRA beside quantised weights"] == f"{ON}, 10 modules"
        loss = loss_of(fast)
        found = gradients(model, loss)
    torch.testing.assert_close(loss, expected, rtol=room, atol=0)
    for name, direction in directions.items():
        loose = 10 if "_scale" in name else 1  # one sum over all tokens, whose terms cancel
        assert (found[name] - direction).norm() <= loose * room * direction.norm() + 1e-6, name


def test_with_dropout_it_learns_what_it_did(folder: Path) -> None:
    """The same masks give the same gradients; other masks do not."""
    model = adapted(folder, "nf4", "lora", lora_dropout=0.3)
    found = []
    with FastPaths(model) as fast:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(gradients(model, loss_of(fast)))
    assert_same(found[1], found[0], 1e-6)
    with pytest.raises(AssertionError):
        assert_same(found[2], found[0], 1e-3)


def test_a_wrong_scale_turns_it_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_adapters.fast_paths import quantized

    right = quantized.add_lora
    monkeypatch.setattr(quantized, "add_lora", lambda out, x, a, b, scale, p: right(out, x, a, b, 1.02 * scale, p))
    with FastPaths(adapted(folder, "nf4", "lora")) as fast:
        assert "differ" in fast.report["LoRA beside quantised weights"]


def test_generation_uses_it_too(folder: Path) -> None:
    model = adapted(folder, "nf4", "lora").eval()
    from quantized import ids

    with torch.no_grad():
        expected = model(ids()).logits
        with FastPaths(model, inference=True) as fast:
            assert fast.report["LoRA beside quantised weights"].startswith(ON), fast.report
            torch.testing.assert_close(model(ids()).logits, expected, atol=1e-4, rtol=1e-4)
