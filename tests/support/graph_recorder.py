"""What a CUDA graph does, on a CPU: the operators of one run are recorded, and replayed into the very same memory.

Everything that the host knew while it recorded (sizes, numbers, which operators) stays as it was. Only what is read
from tensors can be another when it is replayed. As under CUDA, what makes the host wait cannot be recorded, recording
changes nothing, and random numbers come from the generator's state at the time of the replay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_HOST_READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.equal"}
_NO_VALUES = {"aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided"}
_SHAPE_ONLY = {"aten.resize_", "aten.detach", "aten._has_compatible_shallow_copy_type"}


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[torch.Tensor | None]]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of what was there and is changed
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).rpartition(".")[0]
        if name in _HOST_READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        # Aliases with the shape of now: a tensor's own shape may be changed later (resize_).
        kept_args, kept_kwargs = tree_map_only(torch.Tensor, _alias, (args, kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        out = func(*args, **kwargs)
        outs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        returns = func._schema.returns
        changes = any(r.alias_info is not None and r.alias_info.is_write for r in returns)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        known = {_storage(t) for t in _tensors(args, kwargs)}
        own = [_storage(t) not in known for t in outs]
        fresh = [t for t, is_own in zip(outs, own, strict=True) if is_own]
        self.made |= {_storage(t) for t in fresh}
        if name in _NO_VALUES:
            for tensor in fresh:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        if name not in _NO_VALUES | _SHAPE_ONLY and not (views and not changes and not fresh):
            kept = [_alias(t) if is_own else None for t, is_own in zip(outs, own, strict=True)]
            self.calls.append((func, kept_args, kept_kwargs, kept))
        return out

    def _keep(self, tensors: Any) -> None:
        for tensor in tensors if isinstance(tensors, tuple | list) else [tensors]:
            if _storage(tensor) not in self.made | self.before.keys():
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self.before[_storage(tensor)] = whole, whole.clone()


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(*trees: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, trees)
    return found


class GraphRecorder:
    """A `training.graphs.Capture` for the CPU.

    Attributes:
        replays: how often each recording was replayed.
    """

    def __init__(self) -> None:
        self.replays: list[int] = []

    def compute(self, function: Callable[[], None]) -> None:
        function()

    def obstacle(self, function: Callable[[], None]) -> str | None:
        function()
        return None

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        state, recording = torch.get_rng_state(), _Recording()
        try:
            with recording:
                function()
        finally:
            torch.set_rng_state(state)
            for tensor, before in recording.before.values():
                tensor.copy_(before)
        number = len(self.replays)
        self.replays.append(0)

        @torch.no_grad()
        def replay() -> None:
            self.replays[number] += 1
            for func, args, kwargs, outs in recording.calls:
                found = func(*args, **kwargs)
                values = [t for t in (found if isinstance(found, tuple | list) else [found]) if torch.is_tensor(t)]
                for out, value in zip(outs, values, strict=True):
                    if out is not None:
                        out.copy_(value)

        return replay
