"""The trial: is a fast path as near to float32 as the model's own way is?

A comparison of two ways in one precision cannot tell rounding from a fault: after 32 layers in bfloat16 two right ways
differ by several percent. So both are compared with the same computation in float32, and a fast path is right if its
RMS error is at most twice that of the model's own path. (A float32 model's own results are that float32; there a floor
for rounding decides.) Modules are compared one by one, packs and generation through whole decoder layers and the head.

What the trial computes is short: some decoder layers, at least two and one of each kind, with the others skipped; short
sequences, with sliding windows narrowed so that they are met; in float32 one layer at a time, so that there is never a
second model in memory. An adapter that starts as the identity gets other weights until the trial is over, since a fast
path that left it out would go unnoticed.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llm_adapters import architectures

TIMES = 2.0  # the RMS error of a fast path, in that of the model's own
ROW_TIMES = 8.0  # the same for a single row (token), of whose few numbers the RMS is itself noisy
# The error that counts as rounding in any case, relative to the result: bfloat16's and float16's of one number; of
# float32 that of sums in another order.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
BEHIND_ROUTERS = 64.0  # the RMS error, where a router may have chosen other experts for a token by rounding alone
LOWER = (torch.float16, torch.bfloat16)
WINDOW = 16  # tokens, to which sliding windows are narrowed
PREFIX = 3  # tokens that the probe's sequences begin with
LENGTHS = (80, 6, 17)  # of the probe's sequences; one is long enough for all kernels


def mismatch(found: torch.Tensor, own: torch.Tensor, reference: torch.Tensor, routed: bool = False) -> str | None:
    """Tell by how much a fast path is further from the truth than the model's own path may make it.

    Args:
        found: the fast path's result, (..., features).
        own: the result of the model's own path, likewise.
        reference: the same computed in float32.
        routed: the result is behind a router, which may have chosen other experts for a token by rounding alone.

    Returns:
        None where `found` is right, else a sentence for the report.
    """
    if found.shape != own.shape:
        return f"its results have the shape {tuple(found.shape)}, not {tuple(own.shape)}"
    truth = reference.double().reshape(-1, reference.shape[-1])
    error, own_error, size = (
        values.square().mean(-1)
        for values in (found.double().reshape(truth.shape) - truth, own.double().reshape(truth.shape) - truth, truth)
    )
    floor = FLOOR.get(own.dtype, FLOOR[torch.float32]) ** 2
    # A row of the model's own may be right by luck: what is usual counts too. The median, as the first token of trained
    # models is larger by far than the others, and its error with it.
    usual = torch.maximum(own_error, own_error.median())
    rows = (error / torch.maximum(usual, floor * size).clamp_min(1e-300)).nan_to_num(torch.inf)
    whole = error.mean() / torch.maximum(own_error.mean(), floor * size.mean()).clamp_min(1e-300)
    times, row_times = torch.stack((whole, rows.max())).sqrt().tolist()
    if times <= (BEHIND_ROUTERS if routed else TIMES) and (routed or row_times <= ROW_TIMES):
        return None
    if not math.isfinite(times):
        return "its results would not be numbers"
    if times <= TIMES:
        return f"its results would differ: at one token {row_times:.2g} times as far from float32 as the model's own"
    return f"its results would differ: {times:.2g} times as far from float32 as the model's own"


def probe_sequences(base: Any) -> list[list[int]]:
    """Make three sequences of different lengths that begin alike, one of them long enough for all kernels."""
    rows = base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, rows, (PREFIX,), generator=generator).tolist()
    return [start + torch.randint(0, rows, (n - PREFIX,), generator=generator).tolist() for n in LENGTHS]


# --- a model made short


_chosen: dict[int, tuple[nn.ModuleList, list[int]]] = {}  # of the models that are `shortened`, by id


def chosen_layers(base: nn.Module) -> tuple[nn.ModuleList, list[int]]:
    """The decoder's layers, and the indices of those that the trial computes: the first two, and one of each kind.

    Raises:
        RequestError: the model's decoder layers cannot be told.
    """
    if id(base) in _chosen:
        return _chosen[id(base)]
    layers = architectures.decoder_layers(base)[1]
    types = getattr(architectures.text_config(base), "layer_types", None) or [None] * len(layers)

    def kind(index: int) -> Any:
        parts = [(name, type(module)) for name, module in layers[index].named_modules()]
        shapes = [(name, p.shape, p.dtype) for name, p in layers[index].named_parameters()]
        return str((types[index], parts, shapes))

    first: dict[Any, int] = {}
    for index in range(len(layers)):
        first.setdefault(kind(index), index)
    return layers, sorted({*range(min(2, len(layers))), *first.values()})


@contextlib.contextmanager
def shortened(base: nn.Module) -> Iterator[None]:
    """Skip all decoder layers but the `chosen_layers`, and narrow sliding windows to `WINDOW` tokens."""
    layers, chosen = found = chosen_layers(base)
    form: list[Any] = [None]  # what a layer returns: a tensor, or a tuple that begins with one

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        form[0] = output

    def skip(hidden: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if hidden is None else hidden
        return (hidden, *[None] * (len(form[0]) - 1)) if isinstance(form[0], tuple) else hidden

    with contextlib.ExitStack() as stack:
        _chosen[id(base)] = found
        stack.callback(_chosen.pop, id(base))
        stack.callback(layers[chosen[0]].register_forward_hook(remember).remove)
        for index in sorted({*range(len(layers))} - {*chosen}):
            _replace(stack, layers[index], "forward", skip)
        configs = {id(c): c for c in (getattr(base, "config", None), architectures.text_config(base)) if c is not None}
        for owner in (*configs.values(), *base.modules()):
            window = vars(owner).get("sliding_window")
            if isinstance(window, int) and window > WINDOW:
                _replace(stack, owner, "sliding_window", WINDOW)
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    before = vars(owner).get(name, stack)
    setattr(owner, name, value)
    stack.callback(
        functools.partial(delattr, owner, name) if before is stack else functools.partial(setattr, owner, name, before)
    )


@contextlib.contextmanager
def in_float32(base: Any) -> Iterator[None]:
    """Compute `base` in float32: each decoder layer's weights are converted as it begins and given back as it ends, and
    those of what is outside the layers likewise."""
    layers, chosen = chosen_layers(base)
    computed = [layers[i] for i in chosen] if id(base) in _chosen else layers  # nothing is computed in those skipped
    inside = {id(module) for layer in layers for module in layer.modules()}
    owners = [m for m in base.modules() if id(m) not in inside and _own_tensors(m)]
    with contextlib.ExitStack() as stack:
        for module in (*computed, *owners):
            stack.enter_context(_converted_while_it_runs(module, deep=id(module) in inside))
        yield


@contextlib.contextmanager
def converted(module: nn.Module, deep: bool = True) -> Iterator[None]:
    """Convert the parameters and buffers of `module` that are less precise than float32 to it, until the end."""
    tensors = {id(t): t for part in (module.modules() if deep else [module]) for t in _own_tensors(part)}
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    try:
        for tensor, data in before:
            tensor.data = to_float32(data)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextlib.contextmanager
def _converted_while_it_runs(module: nn.Module, deep: bool) -> Iterator[None]:
    running = contextlib.ExitStack()

    def begin(module: nn.Module, args: Any) -> None:
        running.enter_context(converted(module, deep))

    with contextlib.ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(begin).remove)
        hooks.callback(module.register_forward_hook(lambda *_: running.close(), always_call=True).remove)
        hooks.callback(running.close)
        yield


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers less precise than float32 that `module` itself holds."""
    return [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.dtype in LOWER]


@contextlib.contextmanager
def away_from_identity(base: nn.Module) -> Iterator[None]:
    """Give trained weights that are all zero (an adapter at its start) others; afterwards they are zero again."""
    generator = torch.Generator().manual_seed(0)
    changed = []
    for parameter in base.parameters():
        if parameter.requires_grad and not parameter.detach().any():
            std = 0.1 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            values = torch.randn(parameter.shape, generator=generator) * std
            changed.append(parameter)
            parameter.data.copy_(values)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.data.zero_()


# --- records


@dataclass
class Call:
    """A module's arguments in one forward, what it returned, and what it returns in the higher precision."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: torch.Tensor
    reference: torch.Tensor

    def mismatch(self, module: nn.Module) -> str | None:
        """Compare what `module` returns now; see `mismatch`."""
        return mismatch(first_tensor(module(*self.args, **self.kwargs)), self.own, self.reference)


def record_calls(base: Any, modules: Sequence[nn.Module], run: Callable[[], Any]) -> dict[int, Call]:
    """Record the first call of each of the `modules` that `run` reaches, by the module's id.

    Each is computed twice more: as it is, and in the higher precision, from the same arguments.
    """
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(id(module), (args, kwargs))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        run()
    found = {}
    for module in modules:
        if id(module) in calls:
            args, kwargs = calls[id(module)]
            own = first_tensor(module(*args, **kwargs))
            with converted(module):
                reference = first_tensor(module(*to_float32(args), **to_float32(kwargs)))
            found[id(module)] = Call(args, kwargs, own, reference)
    return found


def first_tensor(output: Any) -> torch.Tensor:
    """Return a module's result, where that may be a tuple (or a `ModelOutput`) that begins with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def to_float32(value: Any) -> Any:
    """Convert the tensors in `value` that are less precise than float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in LOWER else value
    if isinstance(value, tuple | list):
        return type(value)(to_float32(part) for part in value)
    if isinstance(value, dict):
        return {key: to_float32(part) for key, part in value.items()}
    return value


@dataclass
class Trace:
    """One sequence through a model: the points at which two ways to the same result are compared.

    Attributes:
        points: by name, each (tokens, features).
    """

    points: dict[str, torch.Tensor] = field(default_factory=dict)

    def rows(self, *parts: slice) -> "Trace":
        """The rows of these parts of the sequence, one part after the other."""
        return Trace({name: torch.cat([value[part] for part in parts]) for name, value in self.points.items()})

    @classmethod
    def joined(cls, traces: Sequence["Trace"]) -> "Trace":
        """Lay several sequences end to end."""
        names = [name for name in traces[0].points if all(name in one.points for one in traces)]
        return cls({name: torch.cat([one.points[name] for one in traces]) for name in names})

    def record_attention(self, *tensors: torch.Tensor) -> None:
        """Add the queries, keys and values of one attention, each (1, heads, tokens, head_dim), and what it returns,
        (1, tokens, heads, head_dim)."""
        number = sum(name.startswith("query") for name in self.points)
        for name, tensor in zip(("query", "key", "value"), tensors, strict=False):
            self.points[f"{name} {number}"] = tensor[0].transpose(0, 1).flatten(1)
        self.points[f"attention {number}"] = tensors[3][0].flatten(1)

    @property
    def has_attention(self) -> bool:
        """True after `record_attention`."""
        return any(name.startswith("query") for name in self.points)

    def mismatch(self, own: "Trace", reference: "Trace", experts: bool = False) -> str | None:
        """Compare every point that the model's `own` way has too; see `mismatch`.

        Args:
            own: the model's own way.
            reference: the same in float32.
            experts: a router chooses experts in each layer: by rounding alone a token may get others.
        """
        for name in self.points:
            if name in own.points and name in reference.points:
                first = name.split()[-1] == "0" and not name.startswith("layer")  # before all routers
                points = self.points[name], own.points[name], reference.points[name]
                refused = mismatch(*points, routed=experts and not first)
                if refused:
                    return refused
        return None


def trace(base: Any, decoded: Callable[[], Any]) -> Trace:
    """Record what the `chosen_layers` return, and the last hidden states that `decoded` returns, (1, tokens, ...)."""
    layers, chosen = chosen_layers(base)
    found = Trace()

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found.points[name] = first_tensor(output)[0]

    with contextlib.ExitStack() as stack:
        for index in chosen:
            hook = functools.partial(keep, f"layer {index}")
            stack.callback(layers[index].register_forward_hook(hook).remove)
        found.points["hidden"] = decoded()[0]
    return found


def attention_outputs(base: Any, run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Record what the output projections of the `chosen_layers` are given in `run`, by the names of
    `Trace.record_attention`."""
    layers, chosen = chosen_layers(base)
    name, found = architectures.architecture_of(base).o, {}

    def keep(number: int, module: nn.Module, args: Any) -> None:
        found[f"attention {number}"] = args[0][0]

    with contextlib.ExitStack() as stack:
        for number, index in enumerate(chosen):
            projection = architectures.submodule(layers[index], name)
            assert projection is not None
            stack.callback(projection.register_forward_pre_hook(functools.partial(keep, number)).remove)
        run()
    return found


def has_experts(base: nn.Module) -> bool:
    """Tell whether a router chooses which modules compute a token."""
    return any(name.rpartition(".")[2] in ("experts", "router") for name, _ in base.named_modules())
