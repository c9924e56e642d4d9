"""Tests of `compat/own_attention.py`: after an upgrade, the name of a failing test says which family changed."""

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional

from llm_adapters.compat import own_attention

OVERRIDES: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 8},
    "falcon": {"multi_query": True},
    "gpt_neo": {"window_size": 4},  # the second layer's
    "gptj": {},
    "mpt": {"attn_config": {"clip_qkv": 0.5}},
}
IDS = torch.arange(3, 15)[None]


def by_formula(module: Any, query: Any, key: Any, value: Any, mask: Any, **scores: Any) -> torch.Tensor:
    """Attention over all tokens before, from what a row hands over."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    tokens = torch.arange(query.shape[2])
    distance = tokens - tokens[:, None]
    products = query @ key.transpose(2, 3) * scores["scaling"]
    if (slopes := scores.get("alibi_slopes")) is not None:
        products = products + slopes[:, None, None] * distance
    seen = (distance <= 0) & (-distance < (scores.get("sliding_window") or 100))
    probs = torch.softmax(products.masked_fill(~seen, -torch.inf), -1)
    return (functional.dropout(probs, scores.get("dropout", 0.0)) @ value).transpose(1, 2)


@pytest.mark.parametrize("family", own_attention.FAMILIES)
@torch.no_grad()
def test_what_a_family_hands_over_gives_its_own_logits(family: str) -> None:
    model = tiny_model(family, **OVERRIDES[family])
    assert own_attention.unsupported_reason(model) is None
    expected = model(IDS, use_cache=False).logits
    called = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        called.append(type(module).__name__)
        return by_formula(module, *args, **kwargs)

    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    for owner, name, value in own_attention.replacements(model, lambda given: given is mask, attend):
        setattr(owner, name, value)
    # The mask comes to every layer as the object that it is.
    positions = torch.arange(IDS.shape[1])[None]
    found = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert called == [own_attention.FAMILIES[family].module] * model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Every other call is the family's own.
    assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert torch.equal(model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits, expected)
    assert len(called) == model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("family", "dropout"), [("bloom", "attention_dropout"), ("gptj", "attn_pdrop"), ("gpt_neo", "attention_dropout")]
)
@torch.no_grad()
def test_dropout_is_handed_over_in_training_alone(family: str, dropout: str) -> None:
    model = tiny_model(family, **{dropout: 0.25})
    given = []

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.append(kwargs["dropout"])
        return by_formula(*args, **kwargs)

    for owner, name, value in own_attention.replacements(model, lambda mask: True, attend):
        setattr(owner, name, value)
    for mode in (True, False):
        model.train(mode)(IDS, attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool), use_cache=False)
    assert given == [0.25] * 2 + [0.0] * 2
