"""Rotary positions that depend on the longest row: an answer, and a gradient, does not depend on its neighbours."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from generation_helpers import run, trained
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from llm_adapters.errors import RequestError
from llm_adapters.generation.generator import Generator
from llm_adapters.models.rope import independent_length
from llm_adapters.training import train

LIMIT, NEW = 96, 6
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [6.0] * 4,
    "original_max_position_embeddings": LIMIT,
}
LENGTHS = (4, 9, 85, 92, 92, 97, 120, 120)  # of 92 tokens, the limit is passed by the answer
PROMPTS = [[1, *range(3, 3 + length)] for length in LENGTHS]


def long_model(family: str = "llama", **more: Any) -> Any:
    return tiny_model(family, rope_parameters=LONGROPE, original_max_position_embeddings=LIMIT, **more)


def alone(model: Any, prompt: list[int], num_beams: int = 1) -> list[int]:
    """Tokens that transformers generates from a copy of the model that has seen no other prompt."""
    fresh = copy.deepcopy(model)
    fresh.generation_config = GenerationConfig()
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "num_beams": num_beams, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    found = fresh.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return found[: found.index(2)] if 2 in found else found


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("family", "num_beams"), [("llama", 1), ("llama", 2), ("qwen3", 1)])
def test_an_answer_does_not_depend_on_its_neighbours(family: str, num_beams: int, own: bool) -> None:
    model = long_model(family)
    expected = [alone(model, prompt, num_beams) for prompt in PROMPTS]
    for size in (1, 3, len(PROMPTS)):
        found = run(model, PROMPTS, batch_size=size, num_beams=num_beams, max_new_tokens=NEW, own=own)
        assert [list(found[index].tokens) for index in range(len(PROMPTS))] == expected, size


def test_the_report_says_so_only_where_it_matters() -> None:
    with Generator(long_model(), tiny_tokenizer(), max_new_tokens=NEW) as generator:
        list(generator.generate(PROMPTS[:3]))
        assert "lengths" not in generator.report
        list(generator.generate(PROMPTS))
        assert "more than 96 tokens are computed with others of the same length" in generator.report["lengths"]
        assert generator.report["engine"] == "own"


def test_several_adapters_answer_short_prompts_in_one_batch_and_long_ones_apart() -> None:
    model = trained(long_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, adapters=["default", "__base__"]) as generator:
        assert len(list(generator.generate(PROMPTS[:2], adapter_names=["default", "__base__"]))) == 2
        with pytest.raises(RequestError, match="1 prompts are too long for several adapters in one batch"):
            list(generator.generate(PROMPTS[1:4], adapter_names=["default", "__base__", "default"]))


def test_which_models_depend_on_lengths() -> None:
    assert independent_length(long_model()) == LIMIT
    assert independent_length(tiny_model("llama")) is None
    assert independent_length(tiny_model("gpt2")) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert independent_length(tiny_model("llama", rope_parameters=dynamic)) == 512


def test_an_example_is_trained_on_as_if_it_were_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_tiny(tmp_path / "base", rope_parameters=LONGROPE)
    rows = [{"question": "Why?" * n, "answer": "So."} for n in (1, 2, 40, 60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = []
    for name, options in (("together", {}), ("alone", {"micro_batch_size": 1})):
        recipe = {
            "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
            "adapter": {"method": "series", "options": {"bottleneck_size": 4, "init_weights": "paper"}},
            "data": {"train": str(tmp_path / "train.jsonl"), "template": "plain"},
            "training": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01, **options},
        }
        with caplog.at_level(logging.WARNING):
            ended = train(recipe, tmp_path / name, progress=False)
        weights.append({key: value for key, value in ended.model.state_dict().items() if "bottleneck_" in key})
        assert "each example alone" in ended.manifest["fast_paths"]["micro-batches"]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
    assert "over 96 tokens" in caplog.text
