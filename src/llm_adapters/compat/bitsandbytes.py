"""Private interfaces of bitsandbytes."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

LAYOUT_SWITCH = "support_avx512bf16_for_cpu"  # of `Linear4bit`
CAST_LOGGER = "bitsandbytes.autograd._functions"


def keep_layout(model: "nn.Module") -> None:
    """Have 4-bit weights stay as they are laid out, on a CPU too.

    bitsandbytes lays them out anew in the first forward in eval mode on a CPU that multiplies bfloat16; from then on
    their input gets no gradient, nor what comes before it, also in training mode.
    """
    for module in model.modules():
        if hasattr(module, LAYOUT_SWITCH):
            setattr(module, LAYOUT_SWITCH, False)


def silence_casts() -> None:
    """Have the conversion of the inputs of 8-bit layers to float16 not be told in every call of every layer."""
    logging.getLogger(CAST_LOGGER).setLevel(logging.ERROR)
