"""Fast paths change nothing: same loss, same gradients, and the model is as it was afterwards."""

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
from fast_path_helpers import (
    NAMED,
    OPTIONS,
    adapted,
    assert_same,
    examples,
    gradients,
    long_and_short,
    plain_loss,
    set_attention_dropout,
    without_dropout,
)
from tiny import FAMILIES, VOCAB, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm_adapters.fast_paths import ON, FastPaths
from llm_adapters.ops import backends
from llm_adapters.ops.cpu.prototypes import Library
from llm_adapters.ops.linear import is_fast
from llm_adapters.ops.padded_attention import BLOCK
from llm_adapters.training.collator import Collator

WINDOWS = {"mistral": {"sliding_window": 12}, "gemma2": {"sliding_window": 12}, "gpt_neo": {"window_size": 12}}
# What makes heads as large as kernels want them.
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SIZES: dict[str, dict[str, int]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA | {"query_pre_attn_scalar": 32},
    "bloom": {"hidden_size": 64, "n_head": 2},
    "gptj": {"n_embd": 64, "n_head": 2},
}


def fast_loss(fast: FastPaths, chosen: list, **limits: object) -> torch.Tensor:
    micro_batches = Collator(0, fast.packs, **limits).make_micro_batches(chosen)
    return sum((fast.model(**micro.arguments())["loss"] for micro in micro_batches), torch.zeros(()))


@pytest.mark.proves("packs")
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_model(family: str, method: str) -> None:
    model = adapted(family, method).train()
    chosen = examples()
    plain = plain_loss(model, chosen)
    expected = gradients(model, plain)
    if not any("experts" in name for name, _ in model.named_modules()):  # torch multiplies them in float32 at most
        exact = copy.deepcopy(model).double()  # float32's own gradients are up to 5e-6 from the truth
        expected = gradients(exact, plain_loss(exact, chosen))
    with FastPaths(model) as fast:
        assert fast.report["packing"] == fast.report["shared prefix"] == ON
        loss = fast_loss(fast, chosen)
        found = gradients(model, loss)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    assert_same(found, {name: gradient.float() for name, gradient in expected.items()})


@pytest.mark.parametrize("method", ["series", "parallel"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "falcon", "mpt"])
def test_adapters_of_the_attention_take_part(family: str, method: str) -> None:
    """They are around or inside the module whose middle is replaced."""
    model = adapted(family, method, placement=("attention", "mlp")).train()
    plain = plain_loss(model, examples())
    expected = gradients(model, plain)
    with FastPaths(model) as fast:
        assert fast.packs
        loss = fast_loss(fast, examples())
        found = gradients(model, loss)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    assert_same(found, expected)


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize(
    "limits", [*({"micro_batch_size": n} for n in (1, 4, 16)), *({"micro_batch_tokens": n} for n in (30, 1))]
)
def test_the_division_into_micro_batches_changes_nothing(family: str, limits: dict) -> None:
    model = adapted(family, "lora").train()
    chosen = examples(16)
    expected = plain_loss(model, chosen)
    with FastPaths(model) as fast:
        torch.testing.assert_close(fast_loss(fast, chosen, **limits), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", NAMED)
def test_packed_is_padded_and_a_shared_prefix_is_one_of_each(family: str) -> None:
    model = adapted(family, "lora").train()
    alike, different = examples(6, shared=9), examples(6, shared=0)
    with FastPaths(model) as fast:
        for chosen in (alike, different):
            padded = sum(
                fast.model(**m.arguments())["loss"] for m in Collator(0, packed=False).make_micro_batches(chosen)
            )
            torch.testing.assert_close(fast_loss(fast, chosen), padded, rtol=1e-5, atol=0)
        if fast.packs:
            (micro,) = Collator(0).make_micro_batches(alike)
            assert micro.pack is not None
            assert micro.pack.prefix >= 9
            assert micro.pack.end == micro.tokens - 5 * micro.pack.prefix


@pytest.mark.parametrize("block", [BLOCK, 5])
@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "bloom", "gptj", "gpt_neo", "gemma2", "mpt"])
def test_long_and_short_segments_of_one_pack(
    family: str, shared: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention computes them in several bands, the long ones and the prefix in blocks of rows, and the gradients of
    the shared prefix come from all of these.
    """
    monkeypatch.setattr("llm_adapters.ops.padded_attention.BLOCK", block)
    model = adapted(family, "lora", overrides=WINDOWS.get(family)).train()
    chosen = long_and_short(shared)
    plain = plain_loss(model, chosen)
    exact = copy.deepcopy(model).double()  # unscaled scores (GPT-Neo) lose digits in float32
    expected = {name: g.float() for name, g in gradients(exact, plain_loss(exact, chosen)).items()}
    with FastPaths(model) as fast:
        (micro,) = Collator(0).make_micro_batches(chosen)
        assert micro.pack is not None
        assert micro.pack.prefix == shared
        assert len(micro.pack.buckets) > 1
        for dropout in (0.0, 1e-12):  # with any of it, attention has another backward pass
            assert set_attention_dropout(model, dropout)
            loss = fast_loss(fast, chosen)
            torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
            assert_same(gradients(model, loss), expected, 2e-5 if family == "gpt_neo" else 1e-5)


def test_a_hook_on_the_last_layer_of_a_gated_mlp_is_called() -> None:
    model = adapted("llama", "lora").train()
    seen: list[int] = []
    with FastPaths(model) as fast:
        mlp = next(m for name, m in model.named_modules() if name.endswith(".mlp"))
        assert mlp.down_proj.lora_A  # or the fused way would not be taken without the hook either
        handle = mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
        fast_loss(fast, examples())
        handle.remove()
    assert seen == [1]


def test_no_token_sees_another_segment() -> None:
    """Changing one example of a pack leaves the hidden states of the others bit for bit as they were."""
    model = adapted("llama", "lora").eval()
    one, other = examples(4), examples(4)
    other[2] = examples(4, seed=9)[2]
    other[2].input_ids[:6] = one[2].input_ids[:6]
    with FastPaths(model) as fast, torch.no_grad():
        packs = [Collator(0).make_micro_batches(chosen)[0].pack for chosen in (one, other)]
        hidden = [fast.hidden_states(pack)[0] for pack in packs]
    start = packs[0].starts
    places = [i for i, length in enumerate(packs[0].lengths) if length != len(one[2].input_ids) - packs[0].prefix]
    assert len(places) == 3
    for place in places:
        span = slice(start[place], start[place] + packs[0].lengths[place])
        assert torch.equal(hidden[0][span], hidden[1][span])
    assert not torch.equal(hidden[0], hidden[1])


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "mistral", "gpt_neo"])
def test_sliding_windows_are_kept(family: str) -> None:
    model = without_dropout(family, **{"window_size" if family == "gpt_neo" else "sliding_window": 5})
    chosen = examples(5)
    with FastPaths(model) as fast:
        assert fast.packs
        torch.testing.assert_close(fast_loss(fast, chosen), plain_loss(model, chosen), rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "series"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "stablelm"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, method: str, reentrant: bool) -> None:
    model = adapted(family, method).train()
    expected = gradients(model, plain_loss(model, examples()))
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with FastPaths(model) as fast:
        assert fast.packs
        assert_same(gradients(model, fast_loss(fast, examples())), expected)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_methods_before_the_sequence_take_padded_rows(method: str) -> None:
    model = adapted("llama", method).train()
    chosen = examples()
    # PEFT's logits of a prompt adapter begin with the virtual tokens'.
    plain = torch.zeros(())
    for example in chosen:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        plain = plain + nn.functional.cross_entropy(
            logits[:-1], torch.tensor(example.labels)[1:], ignore_index=-100, reduction="sum"
        )
    expected = gradients(model, plain)
    with FastPaths(model) as fast:
        assert "before the sequence" in fast.report["packing"]
        assert_same(gradients(model, fast_loss(fast, chosen)), expected)


@pytest.mark.parametrize("method", OPTIONS)
def test_in_bfloat16_it_stays_near_float32(method: str) -> None:
    """And adapters keep float32 weights and gradients."""
    exact = plain_loss(adapted("llama", method).train(), examples())
    model = adapted("llama", method, torch.bfloat16).train()
    rounding = (plain_loss(model, examples()) - exact).abs()  # of the plain way: the yardstick
    with FastPaths(model) as fast:
        assert fast.packs
        loss = fast_loss(fast, examples())
        found = gradients(model, loss)
    assert (loss - exact).abs() < 2 * rounding + 0.01 * exact
    assert {g.dtype for g in found.values()} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("method", OPTIONS)
def test_gradients_in_bfloat16_at_sizes_that_kernels_take(
    method: str, family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as near to those of a float32 copy as the plain way's; the products and attention are the kernels'."""
    called, call = set(), Library.call
    monkeypatch.setattr(Library, "call", lambda *args: (called.add(args[1]), call(*args))[1])
    model = adapted(family, method, torch.bfloat16, overrides=SIZES[family]).train()
    chosen = long_and_short(7)
    exact = copy.deepcopy(model).float()
    expected = gradients(exact, plain_loss(exact, chosen))
    plain = gradients(model, plain_loss(model, chosen))
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with FastPaths(model) as fast:
        assert fast.packs, fast.report
        called.clear()
        found = gradients(model, fast_loss(fast, chosen))
    if is_fast(torch.zeros(1, dtype=torch.bfloat16)):
        assert {"linear", "varlen_attention", "varlen_attention_backward"} <= called
    assert found.keys() == expected.keys()
    for name, exact_gradient in expected.items():
        mine, theirs = ((g[name] - exact_gradient).norm() / exact_gradient.norm() for g in (found, plain))
        room = 0.1 if "_scale" in name else 0.01  # the terms of its sum cancel
        assert mine < 2 * theirs + room, f"{name}: {mine:.2g}, and plainly {theirs:.2g}"


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt_neo", "mpt"])
def test_attention_dropout_is_noise_around_the_same_loss(family: str) -> None:
    """With next to none of it, the same loss and gradients; with much of it, the mean comes near."""
    model = adapted(family, "lora").train()
    chosen = examples()
    plain = plain_loss(model, chosen)
    expected = gradients(model, plain)
    assert set_attention_dropout(model, 1e-12)
    with FastPaths(model) as fast:
        loss = fast_loss(fast, chosen)
        assert_same(gradients(model, loss), expected)
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        set_attention_dropout(model, 0.2)
        with torch.no_grad():
            noisy = torch.stack([fast_loss(fast, chosen) for _ in range(50)])
    assert noisy.std() > 0
    assert abs(noisy.mean() - plain) < 0.1 * plain


def test_off_means_off_and_still_the_same_loss() -> None:
    model = adapted("llama", "lora").train()
    expected = plain_loss(model, examples())
    with FastPaths(model, on=False) as fast:
        assert not fast.packs
        assert set(fast.report.values()) == {"not asked for"}
        torch.testing.assert_close(fast_loss(fast, examples()), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_it_was(method: str, fails: bool) -> None:
    model = adapted("llama", method).eval()
    ids = torch.tensor([examples()[3].input_ids])
    expected = model(input_ids=ids).logits
    before = model.get_base_model().config._attn_implementation
    with pytest.raises(KeyError) if fails else nullcontext(), FastPaths(model):
        if fails:
            raise KeyError
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.get_base_model().config._attn_implementation == before
    assert not [m for m in model.modules() if "forward" in vars(m) or "delta" in vars(m)]


def test_two_adapters_disabled_ones_and_merged_ones_take_their_own_way() -> None:
    model = adapted("llama", "lora").eval()
    model.add_adapter("other", model.peft_config["default"])
    ids = torch.tensor([examples()[3].input_ids])

    def unchanged() -> None:
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            with FastPaths(model):
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)

    model.base_model.set_adapter(["default", "other"])
    unchanged()
    with model.disable_adapter():
        unchanged()
    model.set_adapter("default")
    model.merge_adapter()
    unchanged()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gptj"])
def test_rotary_positions_are_the_families_own(family: str) -> None:
    """Written over where they rotate halves, and the modelling file has its own function back afterwards."""
    model = adapted(family, "lora").eval()
    module = sys.modules[type(model.get_base_model()).__module__]
    own = module.apply_rotary_pos_emb
    ids = torch.tensor([examples()[4].input_ids])
    expected = model(input_ids=ids).logits
    with FastPaths(model) as fast:
        assert (module.apply_rotary_pos_emb is own) == (family == "gptj")
        assert (fast.report["rotary positions"] == ON) == (family != "gptj")
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert module.apply_rotary_pos_emb is own


def test_module_forwards_that_differ_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "lora").train()
    plain = plain_loss(model, examples())
    monkeypatch.setattr("llm_adapters.fast_paths.rms_norm.forward", lambda own, weight, eps, x: own(x) * 1.1)
    with FastPaths(model) as fast:
        assert "would differ" in fast.report["RMS norm"]
        assert fast.report["LoRA"].startswith(ON)
        assert not any("forward" in vars(m) for m in model.modules() if "Norm" in type(m).__name__)
        torch.testing.assert_close(fast_loss(fast, examples()), plain, rtol=1e-5, atol=0)


def test_the_report_says_why_there_are_no_products() -> None:
    model = adapted("llama", "lora")
    with FastPaths(model) as fast:
        reason = fast.report["frozen linear"]
        assert reason == ("turned off" if backends.disabled else "the processor or the precision has none")


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("falcon", {"alibi": True}, "adds its linear biases"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact"),
        ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}, "attention code of its own"),
    ],
)
def test_what_takes_no_packs_says_so(family: str, overrides: dict, reason: str) -> None:
    sizes = {"vocab_size": VOCAB} | overrides
    base = (
        tiny_model(family, **overrides)
        if family in FAMILIES
        else AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    )
    with FastPaths(base.eval()) as fast:
        assert not fast.packs
        assert reason in fast.report["packing"]


@pytest.mark.parametrize(("family", "on"), [("falcon", True), ("llama", False)])
def test_a_pack_is_refused_where_packs_are_off(family: str, on: bool) -> None:
    """The family's own attention would let its segments see each other, and nothing would say so."""
    model = adapted(family, "lora", overrides={"alibi": True} if family == "falcon" else None).train()
    (micro,) = Collator(0, packed=True).make_micro_batches(examples())
    with FastPaths(model, on=on) as fast:
        assert not fast.packs
        with pytest.raises(ValueError, match=r"takes no packs .*packed=fast_paths\.packs"):
            model(**micro.arguments())
