"""The size of micro-batches: chosen from memory and model, and remembered with the step at which it changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from llm_adapters import methods
from llm_adapters.errors import RequestError
from llm_adapters.fast_paths import FastPaths
from llm_adapters.tasks.templates import Encoded
from llm_adapters.training import sizes
from llm_adapters.training.collator import Collator
from llm_adapters.training.sizes import SIZES, Halving, Sizes

GB = 2**30
PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "135m": (576, 1536, 30, 9, 3, 49152),
}


def shaped(name: str, method: str = "lora") -> Any:
    """A model of that shape in bfloat16, without weights, with an adapter."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                vocab_size=vocab,
                tie_word_embeddings=name != "7b",
            )
        ).to(torch.bfloat16)
    options: dict[str, Any] = {"r": 32, "target_modules": PAPER} if method == "lora" else {"bottleneck_size": 256}
    return get_peft_model(model, methods.adapter_config(method, model, **options), low_cpu_mem_usage=True)


@pytest.mark.parametrize(
    ("name", "method", "tokens", "measured"),  # peak GiB of a step of so many tokens on an H100
    [
        ("7b", "lora", 2592, 20.9),
        ("7b", "lora", 9760, 41.8),
        ("7b", "series", 2592, 21.5),
        ("7b", "parallel", 2592, 21.5),
        ("1b", "lora", 2848, 5.3),
        ("135m", "lora", 2848, 1.5),
    ],
)
def test_the_estimate_is_what_was_measured(name: str, method: str, tokens: int, measured: float) -> None:
    model = shaped(name, method)
    estimate = (sizes.fixed_bytes(model) + tokens * sizes.bytes_per_token(model)) / GB
    assert measured * 0.9 < estimate < measured * 1.1 + 1  # the reserve is for what a step may take besides


def kept(model: Any, examples: list[Encoded]) -> tuple[int, int]:
    """Bytes that autograd keeps of a pack's forward besides the weights, and the pack's tokens."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FastPaths(model) as fast:
        (micro,) = Collator(0, fast.packs, 100_000).make_micro_batches(examples)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**micro.arguments())["loss"]
    assert loss.requires_grad
    return sum(seen.values()), micro.inputs["input_ids"].numel()


@pytest.mark.parametrize("method", ["lora", "series", "parallel"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_token_takes_about_what_autograd_keeps_of_it(family: str, method: str) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4}
    base = tiny_model(family, **wide)
    options = {"r": 4} if method == "lora" else {"bottleneck_size": 4}
    model = get_peft_model(base, methods.adapter_config(method, base, **options)).train()
    examples = [Encoded([4 + (5 * i + j) % 250 for j in range(60)], [-100] * 30 + [9] * 30, 30) for i in range(24)]
    few, many = (kept(model, examples[:count]) for count in (4, 24))
    measured = (many[0] - few[0]) / (many[1] - few[1])
    assert 0.6 < sizes.bytes_per_token(model) / measured < 1.7


def test_checkpointing_takes_the_inputs_of_the_layers_and_one_layer() -> None:
    model = shaped("7b")
    whole, again = (sizes.bytes_per_token(model, checkpointing) for checkpointing in (False, True))
    assert again == 2 * 32 * 4096 + whole // 32


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("7b", 80, 10752),  # where the rate of an H100 stops growing
        ("7b", 40, 5376),  # what fits
        ("7b", 24, 1344),
        ("7b", 8, SIZES[0]),  # nothing fits: the least
        ("1b", 80, SIZES[-1]),
        ("135m", 80, SIZES[-1]),  # bound by the starting of kernels at any size that fits
        ("135m", 4, 5376),
    ],
)
def test_the_choice_on_an_accelerator(name: str, memory: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "total_memory", lambda device: memory * GB)
    assert sizes.choose(shaped(name), torch.device("cuda")) == expected


def test_checkpointing_and_a_quantised_base_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "total_memory", lambda device: 24 * GB)
    model = shaped("7b")
    assert sizes.choose(model, torch.device("cuda"), checkpointing=True) == 10752
    for module in model.modules():  # four bits of each weight, as packed by bitsandbytes
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            packed = torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert sizes.choose(model, torch.device("cuda")) == 2688 * 2


@pytest.mark.parametrize(("memory", "expected"), [(140, 10752), (80, 5376), (24, SIZES[1])])
def test_graphs_and_what_is_computed_without_one_fit_together(
    memory: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "total_memory", lambda device: memory * GB)
    assert sizes.choose(shaped("7b"), torch.device("cuda"), graphs=True) == expected


@pytest.mark.parametrize(("memory", "expected"), [(24, 2688), (256, 2688), (1.5, 336)])
def test_the_choice_on_a_cpu(memory: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "total_memory", lambda device: int(memory * GB))
    assert sizes.choose(shaped("135m"), torch.device("cpu")) == expected


def test_a_model_whose_layers_cannot_be_told_has_a_size_too() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 99
    assert sizes.choose(model, torch.device("cpu")) == 2688


def test_sizes_are_those_of_the_step(tmp_path: Path) -> None:
    record = Sizes(2688, tmp_path / "sizes.json")
    assert [record.at(step) for step in (1, 9)] == [2688, 2688]
    assert not record.path.exists()
    record.change(7, 1344)
    record.change(5, 2000)  # in a step before, by a run that was resumed from an earlier checkpoint
    record.change(7, 672)
    again = Sizes(2688, record.path)
    assert again.halvings == [Halving(5, 2000), Halving(7, 1344), Halving(7, 672)]
    assert [again.at(step) for step in (4, 5, 6, 7, 99)] == [2688, 2000, 2000, 672, 672]


@pytest.mark.parametrize("text", ["{}", '{"halvings": [{"step": 1}]}', '{"halvings": 3}', "[", '{"halvings": ["a"]}'])
def test_a_broken_record_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(text)
    with pytest.raises(RequestError, match=r"sizes\.json"):
        Sizes(2688, tmp_path / "sizes.json")
