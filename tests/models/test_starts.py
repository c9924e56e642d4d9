"""Starts that are drawn, or taken from the base's weights: loading gives what was trained, and the base is the base."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_tokenizer

from llm_adapters import methods
from llm_adapters.compat.peft import config_classes
from llm_adapters.errors import RequestError
from llm_adapters.generation.generator import Generator, generate
from llm_adapters.models import load, starts
from llm_adapters.training import train

IDS = torch.arange(3, 21).reshape(2, 9)
# What PEFT's defaults of a method are too large for, or do not say, on a tiny model.
_OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 10},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 8},
    "gralora": {"r": 4, "gralora_k": 2},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "vblora": {"vector_length": 8, "num_vectors": 8},
    "vera": {"save_projection": False},
    "waveft": {"n_frequency": 8},
}
# Of fusion there are tests of its own; the others want packages, inputs or models that are not here.
_OTHER = {
    "fusion", "adamss", "adaption_prompt", "cartridge", "multitask_prompt_tuning", "poly", "shadow", "trainable_tokens",
    "xlora", "prefix_tuning", "prompt_tuning", "p_tuning", "cpt", "bottleneck",
}  # fmt: skip
_OWN = ["series", "mam", "prefix", "prompt", "p-tuning"]
_METHODS = [*sorted({key.lower() for key in config_classes()} - _OTHER), *_OWN]
_STARTS = [True, False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"]
_CASES = [(name, _OPTIONS.get(name, {})) for name in _METHODS]
_CASES += [("lora", {"r": 4, "lora_dropout": 0.0, "init_lora_weights": start}) for start in _STARTS]
_CASES += [("lora", {"r": 4, "init_lora_weights": "olora", "use_rslora": True})]
_CASES += [("lora", {"r": 4, "init_lora_weights": "pissa_niter_2", "rank_pattern": {"q_proj": 2}})]


def inserted(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    base = tiny_model("llama")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, methods.adapter_config(name, base, **options))
    starts.keep_start(model)
    return model


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("name", "options"), _CASES, ids=str)
@torch.no_grad()
def test_what_is_loaded_is_what_was_trained(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = moved(inserted(name, options))
    expected = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starts.save(model, tmp_path)
        torch.manual_seed(77)  # another process draws other numbers
        loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    taken = starts.changes_base(model.active_peft_config)
    exact = {} if taken else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loaded(IDS).logits, expected, **exact)
    assert not starts.changes_base(loaded.active_peft_config)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(IDS).logits[:, -9:], tiny_model("llama")(IDS).logits, **exact)
    if taken:
        assert (expected - inserted(name, options).eval()(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "options"), _CASES, ids=str)
@torch.no_grad()
def test_a_start_that_is_not_known_to_change_the_base_does_not(name: str, options: dict[str, Any]) -> None:
    model = moved(inserted(name, options))
    with model.disable_adapter():
        same = torch.equal(model(IDS).logits, tiny_model("llama")(IDS).logits)
    assert same is not starts.changes_base(model.active_peft_config)


@pytest.mark.parametrize("start", ["olora", "pissa_niter_2"])
def test_saving_leaves_the_model_as_it_was(start: str, tmp_path: Path) -> None:
    model = inserted("lora", {"r": 4, "init_lora_weights": start}).train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    config = copy.deepcopy(model.peft_config)
    starts.save(model, tmp_path)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (value, trained) in before.items():
        assert torch.equal(after[name], value), name
        assert after[name].requires_grad is trained, name
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: entry.r for name, entry in model.peft_config.items()} == {name: c.r for name, c in config.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "eva"}, "'eva' looks at data before training"),
        ({"init_lora_weights": "corda"}, "'corda' looks at data"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' looks at gradients"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "with use_dora what is trained cannot be saved"),
        ({"init_lora_weights": "olora", "modules_to_save": ["lm_head"]}, "with modules_to_save"),
        ({"init_lora_weights": "olora", "use_rslora": True, "alpha_pattern": {"q_proj": 3}}, "with alpha_pattern"),
    ],
    ids=str,
)
def test_a_start_that_could_not_be_saved_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        starts.check_start(methods.adapter_config("lora", tiny_model("llama"), **options))


def test_the_base_is_not_asked_where_an_adapter_has_changed_it() -> None:
    model = moved(inserted("lora", {"r": 4, "init_lora_weights": "olora"}))
    words, prompts = tiny_tokenizer(), [[1, 40, 41], [1, 50]]
    own = dict(generate(model, words, prompts, ["default"] * 2, max_new_tokens=2))
    assert own == dict(generate(model, words, prompts, max_new_tokens=2))
    model.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for names in (["__base__"] * 2, ["default", "plain"], ["plain"] * 2):
        with pytest.raises(RequestError, match=r"'default' has changed the base model's weights .*'olora'"):
            list(generate(model, words, prompts, names, max_new_tokens=2))
    with model.disable_adapter(), pytest.raises(RequestError, match="so '__base__' would not"):
        Generator(model, words).__enter__()
    model.set_adapter("plain")
    with pytest.raises(RequestError, match="so 'plain' would not"):
        Generator(model, words).__enter__()


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_such_a_start_is_loaded_as_it_was_trained(tmp_path: Path) -> None:
    base, data = save_tiny(tmp_path / "base"), tmp_path / "train.jsonl"
    data.write_text('{"question": "What is 1 plus 1?", "answer": "2"}\n' * 6)
    recipe = {
        "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
        "adapter": {"method": "lora", "options": {"r": 4, "init_lora_weights": "pissa_niter_3"}},
        "data": {"train": str(data), "template": "plain"},
        "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 0.01},
    }
    run = train(recipe, tmp_path / "run", progress=False)
    loaded = load(run)
    assert loaded.model.active_peft_config.r == 8
    with torch.no_grad(), loaded.model.disable_adapter():
        assert torch.equal(loaded.model(IDS).logits, load(base).model(IDS).logits)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, run.model(IDS).logits)
