"""Prototypes of the C functions, declared once, and the checks of what is passed to them."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llm_adapters.ops.cpu import build


class _Kind(NamedTuple):
    """One kind of argument: its C type, and for a tensor its precision (None: that of the library)."""

    c_type: Any
    is_tensor: bool = False
    dtype: torch.dtype | None = None
    optional: bool = False


_TENSOR = _Kind(ctypes.c_void_p, True)  # of the library's precision, as all tensors that are not named otherwise
_MAYBE = _TENSOR._replace(optional=True)
_F32 = _Kind(ctypes.c_void_p, True, torch.float32)
_F32_MAYBE = _F32._replace(optional=True)
_I64 = _Kind(ctypes.c_void_p, True, torch.int64)
_I64_MAYBE = _I64._replace(optional=True)
_I32 = _Kind(ctypes.c_void_p, True, torch.int32)
_BYTES = _Kind(ctypes.c_void_p, True, torch.uint8)
_INT, _SEED, _FLOAT = _Kind(ctypes.c_int64), _Kind(ctypes.c_uint64), _Kind(ctypes.c_float)
_THRESHOLD = _Kind(ctypes.c_uint32)

PROTOTYPES: dict[str, tuple[_Kind, ...]] = {
    "rms_norm": (_TENSOR,) * 3 + (_F32, _INT, _INT, _FLOAT),
    "rms_norm_backward": (_TENSOR,) * 3 + (_F32, _TENSOR, _INT, _INT),
    "swiglu": (_TENSOR,) * 3 + (_INT,),
    "swiglu_backward": (_TENSOR,) * 5 + (_MAYBE, _INT),
    "dropout": (_TENSOR, _TENSOR, _INT, _SEED, _THRESHOLD, _FLOAT),
    "dropout_add": (_TENSOR, _TENSOR, _INT, _SEED, _THRESHOLD),
    "rotary": (_TENSOR,) * 4 + (_INT,) * 4,
    "masked_softmax": (_TENSOR, _I64, _F32_MAYBE) + (_INT,) * 7 + (_FLOAT,),
    "softmax_backward": (_TENSOR, _TENSOR, _INT, _INT),
    "cross_entropy": (_TENSOR, _I64, _F32, _INT, _INT),
    "pack_lora": (_F32, _TENSOR) + (_INT,) * 6 + (_FLOAT,),
    "lora_add": (_TENSOR, _I64_MAYBE) + (_TENSOR,) * 3 + (_INT,) * 4,
    "store_kv": (_TENSOR, _TENSOR, _I64, _I64) + (_INT,) * 4,
    "paged_attention": (
        *((_TENSOR,) * 3 + (_MAYBE,) * 2 + (_I64,) * 4),
        *(_TENSOR, _F32_MAYBE, *(_INT,) * 9, _FLOAT, _FLOAT),
    ),
    # Those of processors that multiply pairs of bfloat16:
    "row_tile": (),
    "linear": (_TENSOR, _TENSOR, _MAYBE, _TENSOR) + (_MAYBE,) * 3 + (_INT,) * 5 + (_SEED, _THRESHOLD, _INT),
    "grad_weight": (_TENSOR,) * 3 + (_F32,) + (_INT,) * 3 + (_SEED, _THRESHOLD, _INT, _FLOAT),
    "varlen_attention_workspace": (_INT,) * 4,
    "varlen_attention": (
        *(_TENSOR,) * 3,
        *(_I32, _TENSOR, _F32, _F32_MAYBE),
        *(_BYTES, *(_INT,) * 8, _FLOAT, _FLOAT),
    ),
    "varlen_attention_backward": (
        *(_TENSOR,) * 4,
        *(_I32, _F32),
        *(_TENSOR,) * 5,
        _F32_MAYBE,
        *(_BYTES, *(_INT,) * 8, _FLOAT, _FLOAT),
    ),
}
_RESULTS = {"row_tile": ctypes.c_int64, "varlen_attention_workspace": ctypes.c_int64}


class Library:
    """The compiled functions for one precision.

    Args:
        library: the loaded library.
        dtype: the precision.

    Attributes:
        row_tile: how many rows products take at a time; 0 where there are none for this precision and processor.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._functions: dict[str, Any] = {}
        self._arguments = {
            name: [(kind.is_tensor, kind.dtype or dtype, kind.optional) for kind in kinds]
            for name, kinds in PROTOTYPES.items()
        }
        for name, kinds in PROTOTYPES.items():
            if hasattr(library, name):
                function = getattr(library, name)
                function.argtypes = [kind.c_type for kind in kinds]
                function.restype = _RESULTS.get(name)
                self._functions[name] = function
        self.row_tile = int(self.call("row_tile")) if "row_tile" in self._functions else 0

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the C function: tensors by address, numbers converted to the type of the prototype.

        Raises:
            TypeError: a tensor is not of the precision that the prototype says.
            ValueError: a tensor is not contiguous, or not on the CPU.
        """
        addresses: list[Any] = []
        for (is_tensor, dtype, optional), value in zip(self._arguments[name], arguments, strict=True):
            if not is_tensor:  # a number, perhaps in a tensor as dropout's seed is; ctypes converts it
                addresses.append(value.item() if isinstance(value, torch.Tensor) else value)
            elif optional and value is None:
                addresses.append(None)
            elif isinstance(value, torch.Tensor) and value.dtype == dtype and value.is_cpu and value.is_contiguous():
                addresses.append(value.data_ptr())
            else:
                raise self._refusal(name, value, dtype)
        return self._functions[name](*addresses)

    @staticmethod
    def _refusal(name: str, value: Any, dtype: torch.dtype) -> Exception:
        if not isinstance(value, torch.Tensor):
            return TypeError(f"{name} was given {value!r}, where a tensor is needed")
        if value.dtype != dtype:
            return TypeError(f"{name} was given a tensor of {value.dtype}, where {dtype} is needed")
        if not value.is_cpu:
            return ValueError(f"{name} was given a tensor on {value.device}, and computes on the CPU only")
        return ValueError(f"{name} was given a tensor of shape {tuple(value.shape)} that is not contiguous")


@functools.cache
def library(dtype: torch.dtype) -> Library | str:
    """The functions for this precision; else the reason why there are none."""
    loaded = build.load(dtype)
    return loaded if isinstance(loaded, str) else Library(loaded, dtype)


def library_for(x: torch.Tensor) -> Library:
    """The functions for the precision of `x`.

    Raises:
        TypeError: there are none.
    """
    found = library(x.dtype)
    if isinstance(found, str):
        raise TypeError(f"there are no compiled functions for tensors of {x.dtype}: {found}")
    return found


def check_shape(what: str, tensor: torch.Tensor | None, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape: C would read or write beyond its end."""
    if tensor is not None and tensor.shape != tuple(shape):
        raise ValueError(f"{what} has the shape {tuple(tensor.shape)}, where {tuple(shape)} is needed")
