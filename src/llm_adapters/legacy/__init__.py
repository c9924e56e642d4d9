"""Checkpoints written by the paper's own code (arXiv 2304.01933, a fork of PEFT 0.3), read into today's PEFT.

Three kinds exist. Its bottleneck adapters sit on single linear layers, before, after or beside them; they become a
`BottleneckConfig` with `target_modules`. Its LoRA on a fused projection trains only some slices of the output rows
(`enable_lora`); it becomes ordinary LoRA of a higher rank with the same product. Its prefixes are stored as they are
used, and stay what they are. Everything is checked before a model or a folder is touched.
"""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from llm_adapters.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_weights, write_note
from llm_adapters.errors import RequestError, WorkError, first_line, unknown
from llm_adapters.files import atomic_folder, check_folder, read_json, write_json
from llm_adapters.legacy.checkpoint import Checkpoint
from llm_adapters.legacy.kinds import KINDS

if TYPE_CHECKING:
    import os

    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn


def load_legacy_adapter(
    model: "nn.Module", folder: "str | os.PathLike[str]", adapter_name: str = "default"
) -> "PeftModel":
    """Put an adapter that the paper's code saved on `model`, for inference.

    Args:
        model: the base model, as transformers loads it. It becomes part of the result, as with PEFT.
        folder: holds ``adapter_config.json`` and ``adapter_model.bin``, which is read without running code in it.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The `PeftModel`, in eval mode, computing what the paper's code computes with this checkpoint.

    Raises:
        RequestError: the folder is no such checkpoint, or it does not fit `model`, which is then unchanged.
    """
    from peft import PeftModel, PeftModelForCausalLM, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise RequestError(
            "the model has an adapter already: give the base model, or convert the checkpoint and use load_adapter"
        )
    try:
        nn.ModuleDict({adapter_name: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise RequestError(
            f"adapter_name {adapter_name!r} cannot be used ({first_line(error)}): choose another"
        ) from None
    checkpoint = _read(Path(folder))
    checkpoint.check_fit(model)
    adapted = PeftModelForCausalLM(model, checkpoint.config(), adapter_name)
    set_peft_model_state_dict(adapted, checkpoint.converted(), adapter_name)
    return adapted.eval()


def convert(
    legacy_dir: "str | os.PathLike[str]", out_dir: "str | os.PathLike[str]", *, model: str | None = None
) -> Path:
    """Turn a checkpoint of the paper's code into one that ``PeftModel.from_pretrained`` loads.

    Args:
        legacy_dir: holds ``adapter_config.json`` and ``adapter_model.bin``, which is read without running code in it.
        out_dir: a folder that does not exist yet or is empty. It appears whole or not at all, and also holds
            ``llm_adapters.json``, which tells evaluation that the adapter was trained with the paper's prompt.
        model: the name or folder of the base model. If given, the checkpoint is compared with its modules (no
            weights are loaded), and the result names it as its base, instead of what the checkpoint says.

    Returns:
        `out_dir` as a path.

    Raises:
        RequestError: `legacy_dir` is no such checkpoint, it does not fit `model`, or `out_dir` is not empty.
        WorkError: the result could not be written.
    """
    target = Path(out_dir).expanduser()
    check_folder(target, "the output")
    if target.exists() and any(target.iterdir()):
        raise RequestError(f"{str(target)!r} is there already and not empty: choose another folder for the result.")
    checkpoint = _read(Path(legacy_dir))
    if model is not None:
        checkpoint.check_fit(_skeleton(model))
        checkpoint.settings["base_model_name_or_path"] = model
    _write(target, checkpoint.config(), checkpoint.converted(), {"converted_from": str(legacy_dir)})
    return target


def _read(folder: Path) -> Checkpoint:
    file = adapter_weights(folder)
    settings = read_json(folder / ADAPTER_CONFIG)
    if "auto_mapping" in settings:  # PEFT writes it since 0.4, into the configuration of every method
        raise RequestError(
            f"{str(folder)!r} was not written by the paper's code but by a newer PEFT: load it with "
            "PeftModel.from_pretrained, without converting it."
        )
    kind = str(settings.get("peft_type"))
    if kind not in KINDS:
        raise unknown("peft_type", kind, KINDS, hint=f" It is in {str(folder / ADAPTER_CONFIG)!r}.")
    return KINDS[kind](folder, settings, _tensors(file))


def _tensors(file: Path) -> "dict[str, torch.Tensor]":
    """Tensors in `file`, on the CPU, each tensor with memory of its own. No code in the file is run."""
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{str(file)!r} is damaged or holds more than tensors, and was refused: code in it is never run "
            f"({first_line(error)}). Get the checkpoint from someone you trust."
        ) from None
    except Exception as error:  # a damaged file makes torch and safetensors raise nearly anything
        raise RequestError(f"{str(file)!r} cannot be read ({first_line(error)}). Is the file whole?") from None
    if not isinstance(content, dict):
        raise RequestError(f"{str(file)!r} holds a {type(content).__name__} instead of named tensors.")
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for key, value in content.items():
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
        if not plain or not isinstance(key, str) or value.dtype not in kinds:
            raise RequestError(f"{str(file)!r} holds something else than a tensor of floating numbers under {key!r}.")
        if not value.isfinite().all():
            raise RequestError(f"{str(file)!r} is damaged: {key} holds values that are not finite.")
    return {key: value.detach().clone() for key, value in content.items()}


def _skeleton(name: str) -> "nn.Module":
    """The base model `name` without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from llm_adapters.models import model_config

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(name))


def _write(target: Path, config: "PeftConfig", weights: "dict[str, torch.Tensor]", note: dict[str, str]) -> None:
    from safetensors.torch import save

    settings = config.to_dict()
    try:
        with atomic_folder(target) as made:
            plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
            write_json(made / ADAPTER_CONFIG, plain)
            tensors = {key: tensor.contiguous() for key, tensor in weights.items()}
            (made / ADAPTER_WEIGHTS[0]).write_bytes(save(tensors, {"format": "pt"}))
            write_note(made, "paper", **note)
    except OSError as error:
        raise WorkError(
            f"the converted adapter could not be written to {str(target)!r} ({first_line(error)})."
        ) from error
