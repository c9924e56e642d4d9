"""Base models in fewer bits: how they load, which methods they take, and what is refused."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from quantized import ids, quantised, restored, save_wide

from llm_adapters import methods
from llm_adapters.compat.peft import config_classes
from llm_adapters.errors import RequestError
from llm_adapters.models import Quantization, load_base
from llm_adapters.models.quantization import METHODS, check_method, check_optimizer

with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quantization"
)
# By PEFT's name: the name of the method's row, where it has several the plain one, and its options.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "ADALORA": ("adalora", {"total_step": 10}),
    "BOTTLENECK": ("mam", {"bottleneck_size": 8, "prefix_length": 3}),
    "P_TUNING": ("p-tuning", {"encoder_hidden_size": 16}),
    "PREFIX_TUNING": ("prefix", {}),
    "PROMPT_TUNING": ("prompt", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("models") / "llama")


@with_bitsandbytes
@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.2), ("int8", 8.5)])
def test_the_weights_of_the_decoder_are_in_fewer_bits(kind: str, bits: float, folder: Path) -> None:
    loaded = quantised(folder, kind, "bfloat16")
    projection = loaded.model.model.layers[0].mlp.up_proj
    assert projection.weight.numel() * projection.weight.element_size() * 8 <= bits * 64 * 128
    assert loaded.model.lm_head.weight.dtype == loaded.model.model.norm.weight.dtype == torch.bfloat16
    assert loaded.dtype == torch.bfloat16
    assert not any(p.is_floating_point() for p in projection.parameters())
    exact = load_base(folder, dtype="float32", device="cpu").model(ids()).logits
    logits = loaded.model(ids()).logits.float()
    assert 0 < (logits - exact).norm() / exact.norm() < (0.5 if kind == "nf4" else 0.1)


@with_bitsandbytes
def test_double_quantisation_is_an_option_of_nf4(folder: Path) -> None:
    scales = []
    for double in (True, False):
        loaded = load_base(folder, dtype="float32", device="cpu", quantization=Quantization("nf4", double))
        scales.append(loaded.model.model.layers[0].mlp.up_proj.weight.quant_state.absmax.dtype)
    assert scales == [torch.uint8, torch.float32]
    assert str(Quantization("nf4")) == "nf4, double quantisation"
    assert str(Quantization("nf4", False)) == "nf4"
    assert str(Quantization("int8")) == "int8"


@with_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("peft_type", sorted(METHODS - {"FUSION"}))  # which needs trained adapters: see test_run
def test_a_method_is_the_same_as_on_the_weights_restored(peft_type: str, kind: str, folder: Path) -> None:
    results = []
    name, options = SMALL.get(peft_type, (peft_type.lower(), {}))
    for base in (quantised(folder, kind).model, restored(folder, kind)):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of methods that are rarely used so
            model = get_peft_model(base, methods.adapter_config(name, base, **options)).train()
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, found), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    assert any(gradient.any() for gradient in found.values())
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, parameter


@pytest.mark.parametrize("peft_type", ["LOHA", "HRA", "LN_TUNING", "PEANUT"])
def test_a_method_that_takes_packed_weights_for_weights_is_refused(peft_type: str) -> None:
    assert peft_type in config_classes()
    name = peft_type.lower()
    with pytest.raises(RequestError, match=f"the method {name} does not work on a quantised base") as error:
        check_method(name, peft_type)
    assert "lora" in str(error.value)


def test_every_method_that_is_listed_exists() -> None:
    assert not METHODS - config_classes().keys()


def test_another_kind_is_refused() -> None:
    with pytest.raises(RequestError, match=r"unknown quantization 'nf5': choose one of (nf4, int8|int8, nf4)"):
        Quantization("nf5")


def test_without_bitsandbytes_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="the quantization int8 needs bitsandbytes, which is not installed"):
        load_base(folder, quantization=Quantization("int8"))
    for name in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(RequestError, match=f"the optimizer {name} needs bitsandbytes"):
            check_optimizer(name)
    check_optimizer("adamw_torch_fused")
