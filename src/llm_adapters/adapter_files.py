"""Files of an adapter's folder: PEFT's config and weights, and this project's note beside them."""

from pathlib import Path
from typing import Any

from llm_adapters.errors import RequestError
from llm_adapters.files import read_json, write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
IN_RUN = "adapter"  # name of the adapter's folder in a run folder
_NOTE = "llm_adapters.json"


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
    return read_note(folder).get("template")


def write_note(folder: Path, template: str, **more: Any) -> None:
    """Write beside the adapter's weights which prompt template it was trained with, and `more`."""
    write_json(folder / _NOTE, {"template": template, **more})
