"""Tests of `compat/transformers.py`: after an upgrade, the name of a failing test says what changed."""

from datetime import datetime

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from llm_adapters.compat import transformers as compat

IDS = torch.arange(3, 15).reshape(2, 6)
OWN_ATTENTION = {"bloom", "gptj", "gpt_neo", "falcon", "mpt"}  # families whose modelling file has no look-up by name


def test_attn_implementation() -> None:
    model = tiny_model("llama")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert compat.attention_implementation(model) == name
        assert compat.attention_implementation(model.model.layers[0].self_attn) == name
    assert compat.attention_implementation(nn.Linear(2, 2)) == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_attention_functions(family: str) -> None:
    assert compat.attention_is_replaceable(tiny_model(family)) == (family not in OWN_ATTENTION)


@pytest.mark.parametrize("eager", [False, True])
@torch.no_grad()
def test_a_registered_attention_is_called_with_the_masks_of_the_own_one(eager: bool) -> None:
    calls = []

    def attention(module: nn.Module, *tensors: torch.Tensor, **kwargs: object) -> object:
        calls.append(len(tensors))
        own = compat.eager_attention if eager else compat.sdpa_attention
        return own(module, *tensors, **kwargs)

    model = tiny_model("gemma2" if eager else "llama")
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    expected = model(IDS, attention_mask=mask).logits
    for mapping, value in compat.attention_entries(attention, eager):
        mapping["llm_adapters_compat_test"] = value
    try:
        model.set_attn_implementation("llm_adapters_compat_test")
        assert torch.equal(model(IDS, attention_mask=mask).logits, expected)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("llm_adapters_compat_test")
    assert calls == [4] * model.config.num_hidden_layers  # query, key, value, mask


def test_apply_rotary_pos_emb() -> None:
    function = compat.rotary_function(tiny_model("llama"))
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    cos, sin = torch.zeros(1, 3, 8), torch.ones(1, 3, 8)
    turned = torch.cat((-q[..., 4:], q[..., :4]), -1)  # a quarter turn of the two halves
    torch.testing.assert_close(function(q, k, cos, sin)[0], turned)
    assert compat.rotary_function(tiny_model("gptj")) is None  # pairs of neighbours, other arguments
    assert compat.rotary_function(tiny_model("opt")) is None


def test_conv1d_is_stored_transposed() -> None:
    assert compat.is_conv1d(Conv1D(5, 3))
    assert Conv1D(5, 3).weight.shape == (3, 5)  # 3 in, 5 out
    assert not compat.is_conv1d(nn.Linear(3, 5))


def test_hf_peft_config_loaded() -> None:
    model = tiny_model("llama")
    assert model._hf_peft_config_loaded is False  # the class's
    model._hf_peft_config_loaded = True
    compat.forget_adapters(model)
    assert model._hf_peft_config_loaded is False


def test_a_chat_template_is_told_a_date() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d.%m.%y') }} of {{ messages[0].content }}"
    compat.pin_clock(tokenizer.chat_template, datetime(2001, 2, 3))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "03.02.01 of x"
