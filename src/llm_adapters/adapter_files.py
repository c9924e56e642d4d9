"""Files of an adapter's folder: PEFT's config and weights, and this project's note beside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapters.errors import RequestError, first_line
from llm_adapters.files import read_json, write_json

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
IN_RUN = "adapter"  # name of the adapter's folder in a run folder
_NOTE = "llm_adapters.json"
_FLOATS = ("float16", "bfloat16", "float32", "float64")  # what torch computes with, in every operator


def adapter_weights(folder: Path) -> Path:
    """File with the weights of the adapter in `folder`.

    Raises:
        RequestError: `folder` is not an adapter in PEFT's format.
    """
    if not folder.is_dir():
        raise RequestError(f"there is no adapter folder {str(folder)!r}. Check the path.")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise RequestError(f"{str(folder)!r} is not an adapter: it has no {ADAPTER_CONFIG}.")
    for name in ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise RequestError(f"the adapter {str(folder)!r} holds no weights: no {' and no '.join(ADAPTER_WEIGHTS)}.")


def read_weights(folder: Path) -> "dict[str, torch.Tensor]":
    """Weights of the adapter in `folder`, on the CPU, by the names in its file.

    Raises:
        RequestError: they cannot be read; one has a type that no weight has, or holds values that are not finite.
    """
    from peft.utils import load_peft_weights

    file = adapter_weights(folder)
    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(folder), device="cpu")
    except MemoryError:
        raise
    except Exception as error:  # the readers of safetensors and of pickles raise many kinds, all about this file
        raise RequestError(f"the adapter {str(folder)!r} cannot be read ({first_line(error)}).") from error
    for name, tensor in weights.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if (tensor.is_floating_point() or tensor.is_complex()) and dtype not in _FLOATS:
            raise RequestError(f"the adapter {str(file)!r} has {name} in {dtype}: {', '.join(_FLOATS)} are allowed.")
        if not tensor.isfinite().all():
            raise RequestError(f"the adapter {str(file)!r} is damaged: {name} holds values that are not finite.")
    return weights


def find_adapter(folder: Path) -> Path:
    """Folder of the adapter that `folder` is, or that the run in `folder` has trained.

    Raises:
        RequestError: there is no adapter in PEFT's format.
    """
    inside = folder / IN_RUN
    found = inside if not (folder / ADAPTER_CONFIG).is_file() and (inside / ADAPTER_CONFIG).is_file() else folder
    adapter_weights(found)
    return found


def read_note(folder: Path) -> dict[str, Any]:
    """What `write_note` has written beside the adapter in `folder`; empty where it has not."""
    return read_json(folder / _NOTE) if (folder / _NOTE).is_file() else {}


def read_template(folder: Path) -> str | None:
    """Prompt template that the adapter in `folder` was trained with; None where nothing says so."""
    template = read_note(folder).get("template")
    if not isinstance(template, str | None):
        raise RequestError(f"{str(folder / _NOTE)!r} has the template {template!r}: it must be a name.")
    return template


def read_base(folder: Path) -> str | None:
    """Name of the base model that the adapter in `folder` was made for; None where its config names none.

    Raises:
        RequestError: the config cannot be read, or names something else than a model.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise RequestError(
            f"{str(folder / ADAPTER_CONFIG)!r} has base_model_name_or_path {base!r}: it must be the name of a model."
        )
    return base or None


def read_base_weights(folder: Path) -> str | None:
    """Fingerprint of the weights that the adapter in `folder` was trained on; None where nothing says so."""
    digest = read_note(folder).get("base_weights")
    if not isinstance(digest, str | None):
        raise RequestError(f"{str(folder / _NOTE)!r} has base_weights {digest!r}: it must be a fingerprint.")
    return digest


def write_note(folder: Path, template: str, **more: Any) -> None:
    """Write beside the adapter's weights which prompt template it was trained with, and `more`."""
    write_json(folder / _NOTE, {"template": template, **more})
