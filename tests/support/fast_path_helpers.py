"""Helpers of the tests of the fast paths: perturbed adapters on tiny models, examples, the loss without fast paths."""

from typing import Any

import torch
from peft import get_peft_model
from tiny import VOCAB, tiny_model
from torch import nn

from llm_adapters import methods
from llm_adapters.tasks.templates import IGNORED, Encoded

NAMED = ("llama", "bloom", "gptj", "gpt2", "qwen3")  # those that issue and docs name

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
    "series": {"bottleneck_size": 6, "scaling": 0.5},
    "parallel": {"bottleneck_size": 6, "scaling": "learned", "use_bias": True},
}


def without_dropout(family: str, **overrides: Any) -> Any:
    """A tiny model whose own dropouts are off, so that two forwards can be compared while training."""
    base = tiny_model(family, **overrides)
    for name in ("attention_dropout", "attn_pdrop", "hidden_dropout"):
        if getattr(base.config, name, None):
            setattr(base.config, name, 0.0)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return base


def set_attention_dropout(model: nn.Module, p: float) -> int:
    """Have the attention of a model drop; returns the number of places where it is set."""
    count = 0
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout", "attn_dropout_p"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                value.p = p
            elif isinstance(value, int | float):
                setattr(module, name, p)
            count += isinstance(value, nn.Dropout | int | float)
    return count


def adapted(
    family: str,
    method: str,
    dtype: torch.dtype = torch.float32,
    overrides: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A tiny model, its config with `overrides`, with a perturbed adapter."""
    base = without_dropout(family, **(overrides or {})).to(dtype)
    torch.manual_seed(0)
    model = get_peft_model(base, methods.adapter_config(method, base, **(OPTIONS.get(method, {}) | options)))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def examples(count: int = 5, shared: int = 6, seed: int = 0) -> list[Encoded]:
    """Examples of different lengths that begin with the same tokens; labels on their second half."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(number: int) -> list[int]:
        return torch.randint(3, VOCAB, (number,), generator=generator).tolist()

    start, made = tokens(shared), []
    for index in range(count):
        prompt = start + tokens(1 + 2 * index)
        answer = tokens(1 + (7 * index) % 10)
        made.append(Encoded(prompt + answer, [IGNORED] * len(prompt) + answer, len(prompt)))
    return made


def long_and_short(shared: int) -> list[Encoded]:
    """Examples that are too different in length for attention to pad them all to one."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, VOCAB, (shared,), generator=generator).tolist()
    rows = [start + torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (45, 4, 50, 33, 9, 38)]
    return [Encoded(row, [IGNORED] * (shared + 2) + row[shared + 2 :], shared + 2) for row in rows]


def plain_loss(model: Any, chosen: list[Encoded]) -> torch.Tensor:
    """The sum of the losses, one example at a time, by the model's own forward and full logits."""
    total = torch.zeros(())
    for example in chosen:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        labels = torch.tensor(example.labels)
        total = total + nn.functional.cross_entropy(
            logits[:-1].float(), labels[1:], ignore_index=IGNORED, reduction="sum"
        )
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adapter's gradients."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], room: float = 1e-5) -> None:
    """Equal relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    assert found
    for name, tensor in expected.items():
        distance = (found[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-6)
        # A learned scale's gradient is one sum over all tokens, whose terms cancel.
        assert distance < (10 * room if "_scale" in name else room), f"{name}: {distance:.2g}"
