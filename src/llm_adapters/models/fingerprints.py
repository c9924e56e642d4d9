"""Fingerprints of what decides a number: a base model, an adapter, a tokenizer; and the versions of the software."""

import contextlib
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapters._version import __version__
from llm_adapters.adapter_files import ADAPTER_CONFIG, adapter_weights
from llm_adapters.errors import RequestError
from llm_adapters.files import file_digest, read_json, write_json
from llm_adapters.models.sources import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a config says of its writer and of how to load it, not of what the model computes.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"})
_ADAPTER_VOLATILE = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping"})


def versions(*more: str) -> dict[str, str]:
    """Versions of this package, of Python, and of the libraries that decide what is computed.

    Args:
        more: further distributions to name.
    """
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", *more)}
    return {"llm-adapters": __version__, "python": platform.python_version(), **libraries}


def base_fingerprint(folder: Path, memory: Path | None = None) -> str:
    """SHA-256 of what the model in `folder` computes with: each weight's name, type, shape and bytes, and the config.

    Args:
        folder: the model's.
        memory: as of `weights_fingerprint`.
    """
    return _with_config(weights_fingerprint(folder, memory), folder / "config.json", _VOLATILE)


def weights_fingerprint(folder: Path, memory: Path | None = None) -> str:
    """SHA-256 of the weights of the model in `folder`: each one's name, type, shape and bytes.

    The same whatever files the weights are spread over, whoever wrote them.

    Args:
        folder: the model's.
        memory: a JSON file in which the digest is kept by path, size and time of change, since many gigabytes take a
            while.
    """
    files = weight_files(folder)
    stats = [(str(file.resolve()), file.stat()) for file in files]
    key = hashlib.sha256("|".join(f"{path}:{at.st_size}:{at.st_mtime_ns}" for path, at in stats).encode()).hexdigest()
    known: dict[str, str] = {}
    if memory is not None:
        with contextlib.suppress(RequestError):
            known = read_json(memory)
    if key not in known:
        known[key] = _weights_digest(files)
        if memory is not None:
            with contextlib.suppress(OSError):  # a cache that cannot be written is done without
                write_json(memory, known)
    return known[key]


def adapter_fingerprint(folder: Path) -> str:
    """SHA-256 of the adapter's weights and config, but not of where its base model was."""
    return _with_config(_weights_digest([adapter_weights(folder)]), folder / ADAPTER_CONFIG, _ADAPTER_VOLATILE)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of what a tokenizer does with a text: its rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [rules, str(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _with_config(weights: str, file: Path, volatile: frozenset[str]) -> str:
    config = {key: value for key, value in read_json(file).items() if key not in volatile}
    return hashlib.sha256((weights + json.dumps(config, sort_keys=True)).encode()).hexdigest()


def _weights_digest(files: list[Path]) -> str:
    import torch
    from safetensors import safe_open

    total = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        holders: dict[str, Any] = {}
        for file in files:
            if file.suffix != ".safetensors":
                total.update(file_digest(file).encode())
                continue
            opened = stack.enter_context(safe_open(file, framework="pt"))
            holders |= dict.fromkeys(opened.keys(), opened)
        for name in sorted(holders):
            tensor = holders[name].get_tensor(name)
            total.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}:".encode())
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
