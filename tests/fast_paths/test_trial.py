"""The trial catches small faults on every family, and lets what is right pass on any."""

import contextlib
import sys
from typing import Any

import pytest
import torch
from fast_path_helpers import OPTIONS, adapted
from peft import get_peft_model
from tiny import FAMILIES, tiny_model
from torch import nn

from llm_adapters import methods
from llm_adapters.fast_paths import ON, FastPaths, lora, trial
from llm_adapters.fast_paths import attention as packed
from llm_adapters.ops.packing import Pack

NO_LORA = {"falcon"}  # its linear layers are a class of their own, whose LoRA is left to PEFT
ALIBI = ["bloom", "mpt"]  # which know of positions by linear biases only, and these by the places in the pack
WINDOWED = ["mistral", "gemma3_text", "starcoder2", "mixtral"]  # whose attention is given its window
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def takes_packs(family: str, dtype: torch.dtype) -> bool:
    """GPT-Neo does not scale its scores: in bfloat16, in which the reference for heads of 8 has them, either may be."""
    return (family, dtype) != ("gpt_neo", torch.bfloat16)


@pytest.fixture(autouse=True)
def functions() -> None:
    """The trial is the same with the C functions and without: once is enough."""


def report(family: str, dtype: torch.dtype, method: str = "lora", **overrides: Any) -> dict[str, str]:
    with FastPaths(adapted(family, method, dtype, overrides=overrides)) as fast:
        return fast.report


@DTYPES
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_stays_on(family: str, method: str, dtype: torch.dtype) -> None:
    found = report(family, dtype, method)
    if takes_packs(family, dtype):
        assert found["packing"] == ON
    else:
        assert found.pop("packing") == found.pop("shared prefix")
    assert not [reason for reason in found.values() if "differ" in reason or "failed" in reason]


@DTYPES
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ALIBI])
def test_positions_of_one_segment_off_by_one(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Pack.of

    def shifted(*args: Any, **kwargs: Any) -> Pack:
        pack = own(*args, **kwargs)
        start, length = pack.starts[-1], pack.lengths[-1]
        pack.position_ids[:, start : start + length] += 1
        return pack

    monkeypatch.setattr(Pack, "of", shifted)
    assert "differ" in report(family, dtype)["packing"]


def leaky(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scale: float,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention by its formula, but that the last segment sees the last token of the segment before it."""
    tokens = query.shape[1]
    segment = torch.full((tokens,), -1)
    for number, (start, length) in enumerate(zip(pack.starts, pack.lengths, strict=True)):
        segment[start : start + length] = number
    index = torch.arange(tokens)
    prefix = index < pack.prefix
    visible = (segment[:, None] == segment[None, :]) | prefix[None, :]
    visible &= index[:, None] >= index[None, :]
    last = pack.starts[-1]
    visible[last : last + pack.lengths[-1], last - 1] = True
    key, value = (part.repeat_interleave(len(query) // len(part), 0).float() for part in (key, value))
    scores = query.float() @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None] * pack.position_ids
    scores = scores.masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1).nan_to_num() @ value).transpose(0, 1).to(query.dtype)


@DTYPES
@pytest.mark.parametrize("family", ALIBI)
def test_a_linear_bias_off_by_more_than_rounding(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, factor = packed.packed_attention, 1.2 if dtype == torch.bfloat16 else 1.001  # BLOOM's own rounds its biases

    def steeper(*args: Any, alibi_slopes: torch.Tensor, **kwargs: Any) -> Any:
        return own(*args, alibi_slopes=alibi_slopes * factor, **kwargs)

    monkeypatch.setattr(packed, "packed_attention", steeper)
    assert "differ" in report(family, dtype)["packing"]


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_one_leaked_token(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **kwargs: Any):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        more = {name: kwargs[name] for name in ("alibi_slopes", "softcap") if name in kwargs}
        return leaky(query[0], key[0], value[0], kwargs["pack"], scale, **more)[None], None

    monkeypatch.setattr(packed, "packed_attention", attention)
    assert "differ" in report(family, dtype)["packing"]


@DTYPES
@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_one_too_wide(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is much longer than what the trial computes."""
    assert report(family, dtype, sliding_window=300)["packing"] == ON
    own, windows = packed.packed_attention, []

    def wider(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        windows.append(sliding_window)
        return own(*args, sliding_window=sliding_window and sliding_window + 1, **kwargs)

    monkeypatch.setattr(packed, "packed_attention", wider)
    assert "differ" in report(family, dtype, sliding_window=300)["packing"]
    assert trial.WINDOW in windows


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_off_by_more_than_rounding(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only that row is off: what is right beside it stays on."""
    right = report(family, dtype)
    factor = 1.01 if dtype == torch.bfloat16 else 1.0001
    monkeypatch.setattr("llm_adapters.fast_paths.rms_norm.forward", lambda own, weight, eps, x: own(x) * factor)
    found = report(family, dtype)
    if right["RMS norm"].startswith(ON):
        assert "differ" in found.pop("RMS norm")
        right.pop("RMS norm")
    assert found == right


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_scale_off_by_more_than_rounding(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    own, factor = packed.packed_attention, 1.03 if dtype == torch.bfloat16 else 1.001

    def scaled(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return own(module, query * factor, *args, **kwargs)

    monkeypatch.setattr(packed, "packed_attention", scaled)
    if takes_packs(family, dtype):
        assert "differ" in report(family, dtype)["packing"]
    if family in NO_LORA:
        return
    weights = lora.active_weights
    monkeypatch.setattr(lora, "active_weights", lambda *a: (w := weights(*a)) and (*w[:4], w[4] * 1.1, w[5]))
    assert "differ" in report(family, dtype)["LoRA"]


@DTYPES
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_adapter_at_its_start(
    family: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that does nothing yet is missed too, and does nothing afterwards."""
    if method == "lora" and family in NO_LORA:
        return
    base = tiny_model(family, dtype=dtype)
    model = get_peft_model(base, methods.adapter_config(method, base, **OPTIONS[method]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    row = "LoRA" if method == "lora" else "bottleneck"
    with FastPaths(model) as fast:
        assert fast.report[row].startswith(ON)
    monkeypatch.setattr("llm_adapters.fast_paths.lora.forward", lambda layer, own, x: layer.base_layer(x))
    monkeypatch.setattr(
        "llm_adapters.fast_paths.bottleneck.delta", lambda layer, name, hidden: torch.zeros_like(hidden)
    )
    with FastPaths(model) as fast:
        assert "differ" in fast.report[row]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_fast_path_that_raises_is_off_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("one over nothing")

    monkeypatch.setattr("llm_adapters.fast_paths.rms_norm.forward", broken)
    found = report("llama", torch.float32)
    assert found["RMS norm"] == "it failed (ZeroDivisionError: one over nothing)"
    assert found["packing"] == ON
    assert found["SwiGLU"].startswith(ON)


def test_a_model_that_cannot_be_tried_keeps_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(base: Any) -> Any:
        raise TypeError("no float32 here")

    model = adapted("llama", "lora").eval()
    ids = torch.tensor([trial.probe_sequences(model.get_base_model())[1]])
    expected = model(input_ids=ids).logits
    monkeypatch.setattr(trial, "in_float32", fails)
    with FastPaths(model) as fast:
        assert not fast.packs
        tried = {name: reason for name, reason in fast.report.items() if name not in ("memory arena", "C functions")}
        assert set(tried.values()) == {"the trial failed (TypeError: no float32 here)"}
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.slow
def test_a_deep_random_model_in_bfloat16_keeps_everything() -> None:
    """Differences of two right ways grow with the depth; the trial must not mind."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=32, **sizes)
    model = get_peft_model(model, methods.adapter_config("lora", model))
    with FastPaths(model) as fast:
        assert fast.packs
        assert fast.fused_cross_entropy
        assert not [reason for reason in fast.report.values() if "differ" in reason or "failed" in reason]


@pytest.mark.parametrize("first", [0, 1])
def test_two_sessions_in_one_process_leave_transformers_as_it_was(first: int) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    file = sys.modules[type(tiny_model("llama")).__module__]

    def shared_state() -> list[Any]:
        mappings = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
        return [dict(vars(file)), *map(dict, mappings)]

    before = shared_state()
    sessions = [FastPaths(adapted("llama", "lora")), FastPaths(adapted("llama", "series").eval(), inference=True)]
    for session in sessions:
        session.__enter__()
        assert session.report["rotary positions"] == ON
    sessions[first].close()
    assert shared_state() != before
    sessions[1 - first].close()
    assert shared_state() == before


def test_modes_are_as_they_were() -> None:
    """Also where modules are not all in the same."""
    model = adapted("llama", "lora").eval()
    model.base_model.model.model.layers[1].train()
    before = [module.training for module in model.modules()]
    with FastPaths(model):
        assert [module.training for module in model.modules()] == before
    assert [module.training for module in model.modules()] == before


def test_frozen_is_taken_with_a_warning() -> None:
    model = adapted("llama", "lora").eval()
    with pytest.warns(DeprecationWarning, match="inference"):
        fast = FastPaths(model, frozen=True)
    assert fast.inference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_is_computed_one_layer_at_a_time(dtype: torch.dtype) -> None:
    """The result is that of a float32 copy, at no time is more than one layer converted, and the weights come back."""
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([trial.probe_sequences(model)[0]])
    converted: list[int] = []
    layers = model.model.layers

    def count(*_: Any) -> None:
        converted.append(sum(layer.mlp.up_proj.weight.dtype == torch.float32 for layer in layers))

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(layer.mlp.register_forward_hook(count).remove)
        with trial.in_float32(model):
            found = model(input_ids=ids).logits
    assert set(converted) == ({1} if dtype == torch.bfloat16 else {4})
    assert all(torch.equal(p, before[name]) and p.dtype == dtype for name, p in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(found, model.float()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
