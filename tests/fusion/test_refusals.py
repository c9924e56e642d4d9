"""What a fusion refuses, in a sentence, with nothing changed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_helpers import (
    adapted,
    assert_unchanged,
    config_of,
    fresh,
    snapshot,
)
from fusion_helpers import CLOSE, IDS, Sources, config, fused
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from tiny import LAYERS, tiny_model

from llm_adapters import BottleneckConfig
from llm_adapters.bottleneck.wrapper import Wrapper
from llm_adapters.errors import RequestError
from llm_adapters.fusion import FusionConfig


def refused(match: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_cannot_be_fused(sources: Sources, tmp_path: Path) -> None:
    good = sources("llama")["series"].folder
    refused("adapters is empty: name at least one folder", FusionConfig)
    refused("adapters is empty", FusionConfig, adapters=[])
    refused("adapters is 3: a list of folders", FusionConfig, adapters=3)
    refused(r"adapters is \[.*, 3\]: a list of folders", FusionConfig, adapters=[good, 3])
    refused("there is no adapter folder '.*nowhere'", FusionConfig, adapters=[good, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    refused("'.*empty' is not an adapter: it has no adapter_config.json", FusionConfig, adapters=[tmp_path / "empty"])
    lora = get_peft_model(fresh("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    refused("'.*lora' holds a LORA adapter: only series and parallel", FusionConfig, adapters=[tmp_path / "lora"])
    fused(sources, "llama").save_pretrained(tmp_path / "fusion")
    refused("'.*fusion' holds a FUSION adapter", FusionConfig, adapters=[good, tmp_path / "fusion"])
    head = get_peft_model(
        tiny_model("llama", tie_word_embeddings=False), config_of("series", "llama", modules_to_save=["lm_head"])
    )
    head.save_pretrained(tmp_path / "head")
    refused(r"'.*head' trained whole modules beside it \(lm_head\)", FusionConfig, adapters=[tmp_path / "head"])
    shutil.copytree(good, tmp_path / "bare")
    (tmp_path / "bare" / "adapter_model.safetensors").unlink()
    refused("'.*bare' holds no weights", FusionConfig, adapters=[tmp_path / "bare"])


def test_a_folder_of_a_run_is_that_of_its_adapter(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources("llama")["series"].folder, tmp_path / "run" / "adapter")
    model = get_peft_model(fresh("llama"), FusionConfig(adapters=str(tmp_path / "run"))).eval()
    torch.testing.assert_close(model(IDS).logits, sources("llama")["series"](IDS).logits, **CLOSE)


UP = r"model\.layers\.0\.mlp\.up_proj"
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # the base that the adapter was trained on, the adapter, the message on the usual base
    "another width": ({"hidden_size": 64}, {}, r"adapter '.*' does not fit the model: .* has shape \(6, 64\) instead"),
    "fewer layers": ({"num_hidden_layers": 1}, {}, r"does not fit the model: it has no .*layers\.1\."),
    "more layers": ({"num_hidden_layers": 3}, {}, r"does not fit the model: it has 2 tensors too many, first .*\.2\."),
    "a layer too many": ({"num_hidden_layers": 3}, {"layers": [2]}, "layer 2 does not exist"),
    "into an input": ({}, {"insertion": {"up_proj": "before"}}, f"changes the input of {UP}"),
    "inside another": (
        {},
        {"insertion": {"up_proj": "after"}},
        f"target {UP} is inside target",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_adapters_that_do_not_fit(sources: Sources, misfit: str, tmp_path: Path) -> None:
    base, options, message = MISFITS[misfit]
    other = get_peft_model(tiny_model("llama", **base), BottleneckConfig(**{"bottleneck_size": 6, **options}))
    other.save_pretrained(tmp_path)
    chosen = FusionConfig(adapters=[sources("llama")["series"].folder, tmp_path])
    target = fresh("llama")
    before = snapshot(target)
    refused(message, get_peft_model, target, chosen)
    assert_unchanged(target, before)
    model = fused(sources, "llama")
    before = snapshot(model)
    message += "|the inside of .* belongs to another adapter"
    refused(message, model.add_adapter, "second", FusionConfig(adapters=[tmp_path, sources("llama")["series"].folder]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("damage", ["missing own", "missing fused", "extra", "shape"])
def test_checkpoints_that_do_not_fit(sources: Sources, damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    fused(sources, "llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    own, inner = (min(k for k in tensors if f".fusion_{what}." in k) for what in ("value", "adapters"))
    if damage == "extra":
        tensors[own.replace("value", "valve")] = torch.zeros(1)
    elif damage == "shape":
        tensors[inner] = tensors[inner][..., :1].contiguous()
    else:
        del tensors[own if damage == "missing own" else inner]
    save_file(tensors, file)
    base = fresh("llama")
    before = snapshot(base)
    refused("the checkpoint", PeftModel.from_pretrained, base, tmp_path)
    assert_unchanged(base, before)


def test_beside_a_bottleneck_adapter(sources: Sources) -> None:
    from peft import inject_adapter_in_model

    base = adapted("llama", "series").base_model.model
    before = snapshot(base)
    refused(
        r"target model\.layers\.0\.mlp already has an adapter of another method \(BottleneckLayer\)",
        inject_adapter_in_model,
        config(sources, "llama", "series"),
        base,
        adapter_name="fusion",
    )
    assert snapshot(base)["classes"] == before["classes"]


def test_weights_that_never_came_are_not_numbers(sources: Sources) -> None:
    """A saved configuration alone has no weights for its adapters: nothing may be computed with a random start."""
    saved = FusionConfig(adapters=config(sources, "llama").adapters)
    model = get_peft_model(fresh("llama"), saved)
    assert model(IDS).logits.isnan().any()
    assert sum(isinstance(m, Wrapper) for m in model.modules()) == 2 * LAYERS
