"""The wrapper: one module of the base model with adapters around it, whatever the adapters compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm_adapters.bottleneck.config import INSERT_AFTER
from llm_adapters.errors import RequestError


@dataclass(frozen=True)
class Placement:
    """One adapter at one module.

    Attributes:
        insertion: ``before``, ``after`` or ``parallel``; empty where there is nothing but a prefix.
        input_from: full name of the module whose input a parallel adapter reads; empty for the layer's own input.
        in_features: number of features that the adapter reads.
        out_features: number of features that it writes.
        prefix: (num_key_value_heads, head_dim) of the attention block that gets a prefix; None for none.
    """

    insertion: str
    in_features: int
    out_features: int
    input_from: str = ""
    prefix: tuple[int, int] | None = None


class Tap:
    """A forward pre-hook that hands a module's input on to the layer that adds the parallel delta.

    Needed where a sub-layer starts at one module and ends at another (OPT's ``fc1`` and ``fc2``). A class and not a
    closure, so that a model with adapters can be copied and pickled.
    """

    def __init__(self, layer: "Wrapper") -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the input until the layer has run."""
        self.layer.tapped = args[0]


class Wrapper(nn.Module, BaseTunerLayer):
    """Wraps a module (a linear layer, or a whole attention or MLP block) and adds the active adapters' deltas.

    Arguments, type of the result and attributes are the module's own. A method is a subclass: containers of weights by
    adapter name, `update_layer`, `delta`, and where the delta goes (`change_input`, `change_output`).
    """

    other_param_names: tuple[str, ...] = ("placements",)
    cast_input_dtype_enabled = True
    merge_refused = ""  # why this method's adapters cannot be merged, and what to do instead

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.placements: dict[str, Any] = {}  # by adapter name; of a `Placement`, `input_from` is read here
        self.merged_adapters: list[str] = []
        self.tapped: torch.Tensor | None = None
        self.routing: tuple[str, ...] | None = None  # an adapter's name per sequence, during one call only
        self._disable_adapters = False

    def __getattr__(self, name: str) -> Any:
        """Let code that reaches into a wrapped block (``layer.mlp.down_proj``) find what it looks for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def __getstate__(self) -> dict[str, Any]:
        """State to copy or pickle, without the input that a failed forward may have left behind."""
        return {**super().__getstate__(), "tapped": None}

    def update_layer(self, adapter_name: str, placement: Any, config: Any) -> None:
        """Add the adapter `adapter_name`, which `config` describes, to this module as `placement` says."""
        raise NotImplementedError

    def delta(self, adapter_name: str, *sources: torch.Tensor) -> torch.Tensor:
        """Addition of the adapter to the stream, (..., features), from the tensors it reads, each (..., features)."""
        raise NotImplementedError

    def change_call(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The module's arguments after the adapters `names`, apart from its input."""
        return args, kwargs

    def change_input(self, names: Sequence[str], hidden: torch.Tensor) -> torch.Tensor:
        """The module's input after the adapters `names`."""
        return hidden

    def change_output(
        self, names: Sequence[str], out: torch.Tensor, hidden: torch.Tensor, tapped: torch.Tensor | None
    ) -> torch.Tensor:
        """The module's output `out` after the adapters `names`.

        Args:
            names: the adapters to apply.
            out: (..., features), the module's output.
            hidden: the module's input.
            tapped: the input of the module where the sub-layer starts, if that is another one.
        """
        raise NotImplementedError

    def discard(self, adapter_name: str) -> None:
        """Take the adapter out, whether it is complete or not, and leave the others as they are."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with the active adapters; arguments and type of the result are the module's own."""
        tapped, self.tapped = self.tapped, None
        chosen = self.active_adapters if self.routing is None else sorted(set(self.routing))
        names = [name for name in chosen if name in self.placements]
        if self._disable_adapters or not names:
            return self.base_layer(*args, **kwargs)

        key = _input_key(args, kwargs)
        hidden = args[0] if key is None else kwargs[key]
        changed = self.change_input(names, hidden)
        if key is None:
            args, kwargs = self.change_call(names, (changed, *args[1:]), kwargs)
        else:
            args, kwargs = self.change_call(names, args, {**kwargs, key: changed})
        result = self.base_layer(*args, **kwargs)
        # Blocks of some families return a tuple or a list, whose first item is the hidden state.
        if not isinstance(result, tuple | list):
            return self.change_output(names, result, hidden, tapped)
        out = self.change_output(names, result[0], hidden, tapped)
        return [out, *result[1:]] if isinstance(result, list) else (out, *result[1:])

    def add(self, name: str, stream: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        """``stream + delta(sources)``, for the sequences that are routed to `name` where there is a routing."""
        shape = stream.shape[:-1]
        for source in sources:
            if source.dim() > len(shape) + 1:
                shape = source.shape[:-1]
        if any(tensor.shape[:-1] != shape for tensor in (stream, *sources)):
            # A block may return (batch * time, features).
            viewed = [tensor.view(*shape, -1) for tensor in (stream, *sources)]
            return self.add(name, *viewed).view_as(stream)
        if self.routing is None:
            return stream + self.delta(name, *sources).to(stream.dtype)
        rows = self.routed(name, stream).nonzero().flatten()
        delta = self.delta(name, *(source.index_select(0, rows) for source in sources))
        return stream.index_add(0, rows, delta.to(stream.dtype))

    def routed(self, name: str, stream: torch.Tensor) -> torch.Tensor:
        """Mask of the rows of `stream` that are routed to the adapter `name`: (rows,), true or false."""
        assert self.routing is not None
        # Beams, and modules that see (batch * time, features), multiply the rows: a sequence's rows stay together.
        repeats, rest = divmod(stream.shape[0], len(self.routing))
        if rest:
            raise RuntimeError(f"{stream.shape[0]} rows do not divide among {len(self.routing)} adapter names")
        return torch.tensor([n == name for n in self.routing for _ in range(repeats)], device=stream.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a non-linear adapter has no equal among the base weights."""
        raise RequestError(self.merge_refused)

    def unmerge(self) -> None:
        """Nothing to do, as nothing was ever merged."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:  # a block: any of its parameters tells the device, a floating one the precision
            parameters = list(base_layer.parameters())
            device = parameters[0].device if parameters else None
            dtype = next((p.dtype for p in parameters if p.dtype.is_floating_point), None)
        return device, dtype


def source(placement: Placement, out: torch.Tensor, hidden: torch.Tensor, tapped: torch.Tensor | None) -> torch.Tensor:
    """Tensor that an adapter on or beside a module reads (see `Wrapper.change_output`)."""
    if placement.insertion == INSERT_AFTER:
        return out
    if not placement.input_from:
        return hidden
    if tapped is None:
        raise RuntimeError(f"the input of {placement.input_from} was not seen before the adapter ran")
    return tapped


def install_tap(module: nn.Module, layer: Wrapper) -> None:
    """Make `module` hand its input to `layer`, once however many adapters ask."""
    if not any(hook.layer is layer for hook in _taps(module).values()):
        module.register_forward_pre_hook(Tap(layer))


def move_taps(module: nn.Module, target: nn.Module) -> None:
    """Move the taps of `module` to `target`, which replaces it in the model, with or without a wrapper."""
    for key, hook in _taps(module).items():
        del module._forward_pre_hooks[key]
        target.register_forward_pre_hook(hook)


def remove_unused(model: nn.Module) -> None:
    """Unwrap the modules that no adapter is left on, and take out the taps that no adapter reads."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Wrapper) and not layer.placements:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
            move_taps(layer, layer.base_layer)
    present = set(model.modules())
    for module in model.modules():
        for key, hook in _taps(module).items():
            if hook.layer not in present or not any(
                placement.input_from for placement in hook.layer.placements.values()
            ):
                del module._forward_pre_hooks[key]


def _taps(module: nn.Module) -> dict[int, Tap]:
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Tap)}


def _input_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The name of the argument that holds the hidden state; None where it is the first positional one."""
    if args:
        return None
    if "hidden_states" in kwargs:
        return "hidden_states"
    key = next((k for k, value in kwargs.items() if isinstance(value, torch.Tensor)), None)
    if key is None:
        raise RuntimeError("an adapted module was called without a tensor")
    return key
