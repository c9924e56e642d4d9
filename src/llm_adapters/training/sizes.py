"""The size of a run's micro-batches: chosen once from the device's memory and the model, halved where it was too much.

Larger micro-batches are faster as long as starting the kernels takes a good part of the time, and need memory for each
token. What is chosen is one of a few coarse sizes, and is written down, as is every halving with its step: a run that
is resumed computes each step in the sizes that it had the first time, also on another device.
"""

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapters import architectures
from llm_adapters.errors import RequestError
from llm_adapters.files import read_json, write_json
from llm_adapters.training.memory import total_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

SIZES = tuple(336 * 2**n for n in range(8))  # 336 to 43,008 tokens
CPU_TOKENS = 2688  # the rate of two cores does not grow beyond
LEAST_TOKENS = 2688  # below, an accelerator's products are too small for their rate, whatever the model
ENOUGH_FLOP = 2.5e14  # of a micro-batch: half a second of an H100, beside which starting its kernels is little
SHARE = 0.9  # of the device's memory that is planned for
RESERVE = 2**30  # bytes of what does not grow with the tokens: a chunk of logits, workspaces
TRAINED_BYTES = 16  # of a trained parameter: itself, its gradient and AdamW's two states, in float32


def choose(model: "nn.Module", device: "torch.device", checkpointing: bool = False, graphs: bool = False) -> int:
    """Choose the tokens of a micro-batch: the least of `SIZES` at which the rate does not grow any more, if it fits.

    Args:
        model: the model with its adapter, on `device`.
        device: where it is trained.
        checkpointing: activations are computed again in the backward pass.
        graphs: there will be CUDA graphs, whose memory is no other micro-batch's: both have to fit.
    """
    wanted = CPU_TOKENS if device.type == "cpu" else max(LEAST_TOKENS, ENOUGH_FLOP / flop_per_token(model))
    room = SHARE * total_memory(device) - fixed_bytes(model)
    fitting = [size for size in SIZES if size * bytes_per_token(model, checkpointing) * (1 + graphs) <= room]
    enough = next((size for size in SIZES if size >= wanted), SIZES[-1])
    return min(enough, fitting[-1] if fitting else SIZES[0])


def fixed_bytes(model: "nn.Module") -> int:
    """Memory that any size of micro-batch needs: weights, gradients, optimiser states, `RESERVE`."""
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(held.values()) + (TRAINED_BYTES - 4) * trained + RESERVE


def bytes_per_token(model: "nn.Module", checkpointing: bool = False) -> int:
    """Memory that a token takes until its backward pass, with the fast paths on.

    Of each decoder layer the results of its frozen linear layers and of its two norms are kept, in the precision of the
    model, give or take what the fast paths compute again and what a method keeps besides. With checkpointing it is the
    input of every layer, and all of one layer. For Llama-7B in bfloat16 that is 3.2 MB a token; 3.1 were measured (20.9
    and 41.8 GiB with packs of 2,592 and 9,760 tokens on an H100).
    """
    base = _base(model)
    settings = architectures.text_config(base)
    layers = [2 * settings.hidden_size + sum(out for _, out in _linears(layer)) for layer in _layers(base)]
    kept = len(layers) * settings.hidden_size + max(layers) if checkpointing else sum(layers)
    logits = 10 * settings.vocab_size if _all_logits(model) else 0
    return kept * base.dtype.itemsize + logits


def flop_per_token(model: "nn.Module") -> int:
    """Floating point operations that a token takes in the frozen decoder layers, forward and backward."""
    return 4 * sum(a * b for layer in _layers(_base(model)) for a, b in _linears(layer)) or 1


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers(base: "nn.Module") -> "list[nn.Module]":
    """The decoder's layers; where they cannot be told, the model as one."""
    try:
        return list(architectures.decoder_layers(base)[1])
    except RequestError:
        return [base]


def _linears(layer: "nn.Module") -> list[tuple[int, int]]:
    """Features that the frozen linear layers in `layer` take and give."""
    from torch import nn

    from llm_adapters.compat.transformers import is_conv1d

    found = []
    for module in layer.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Linear):
            found.append((module.in_features, module.out_features))
        elif is_conv1d(module):
            found.append((module.nx, module.nf))
    return found


def _all_logits(model: Any) -> bool:
    """Tell whether the logits of all tokens are computed at once, as with virtual tokens before the sequence."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


@dataclass(frozen=True)
class Halving:
    """From the optimiser step `step` (the first is 1) on, micro-batches have at most `tokens` tokens."""

    step: int
    tokens: int


class Sizes:
    """The tokens of a micro-batch at each step of a run.

    Args:
        start: at the first step.
        path: file that keeps what changes later; None to keep it in memory alone.

    Attributes:
        halvings: what has changed, by step.

    Raises:
        RequestError: the file is no such record.
    """

    def __init__(self, start: int, path: Path | None = None) -> None:
        self.start, self.path = start, path
        self.halvings: list[Halving] = []
        if path is not None and path.is_file():
            try:
                self.halvings = [Halving(int(h["step"]), int(h["tokens"])) for h in read_json(path)["halvings"]]
            except (KeyError, TypeError, ValueError) as error:
                raise RequestError(
                    f"{str(path)!r} is not the record of a run's micro-batches: delete it to begin with {start} tokens"
                ) from error

    def at(self, step: int) -> int:
        """Tokens of a micro-batch at the optimiser step `step`."""
        before = bisect.bisect_right(self.halvings, step, key=lambda halving: halving.step)
        return min((halving.tokens for halving in self.halvings[:before]), default=self.start)

    def change(self, step: int, tokens: int) -> None:
        """Have `tokens` from `step` on, and write that down."""
        self.halvings = sorted([*self.halvings, Halving(step, tokens)], key=lambda halving: halving.step)
        if self.path is not None:
            write_json(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The record, for the file and the manifest."""
        return {"start": self.start, "halvings": [vars(halving) for halving in self.halvings]}
