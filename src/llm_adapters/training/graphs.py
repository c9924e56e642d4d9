"""CUDA graphs of micro-batches: what is launched for one size is captured once and replayed for all others of it.

The host launches a forward and backward pass in thousands of calls, which for small models and small steps takes longer
than the device takes to compute them. A replay is one call. It computes the same functions on the same tensors, so that
every micro-batch is rounded to one of few sizes (`StaticSizes`) and copied into tensors that stay where they are; what
is captured, and what is computed without a graph, is the same to the bit.
"""

import contextlib
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from llm_adapters.bottleneck.wrapper import Tap
from llm_adapters.compat.transformers import recomputes_activations
from llm_adapters.fast_paths import ON, FastPaths, trial
from llm_adapters.ops.packing import Pack
from llm_adapters.ops.static_pack import StaticPack, StaticSizes
from llm_adapters.training.collator import MicroBatch

LIMIT = 16  # graphs of a run; further sizes are computed without one

Compute = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


class Capture(Protocol):
    """How functions without arguments or results, which only change tensors, are captured."""

    def compute(self, function: Callable[[], None]) -> None:
        """Compute `function` as it will be captured, so that what it makes only once is made."""

    def obstacle(self, function: Callable[[], None]) -> str | None:
        """Compute `function`; says what in it cannot be captured, or would be the same in every replay, or None."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture `function`, without changing anything, and return what replays it."""


class CudaCapture:
    """Capture by CUDA graphs that share their memory, as only one is replayed at a time.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def compute(self, function: Callable[[], None]) -> None:
        """See `Capture`. On the stream of the captures, for which cuBLAS then has its workspace."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                function()
        finally:  # what is done again, where memory was used up, comes after what was begun
            current.wait_stream(self._stream)

    def obstacle(self, function: Callable[[], None]) -> str | None:
        """See `Capture`; a capture that fails leaves torch's memory in disorder, so that it is better not tried."""
        before, drawn = torch.cuda.get_sync_debug_mode(), (random.getstate(), torch.get_rng_state())
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.compute(function)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waited = [one for one in found if "synchroniz" in str(one.message)]
        if waited:
            return f"the host waits for the device ({waited[0].filename}:{waited[0].lineno})"
        # Whole modules are dropped so (PEFT's `module_dropout`, layers of OPT).
        if random.getstate() != drawn[0] or not torch.equal(torch.get_rng_state(), drawn[1]):
            return "the host draws random numbers"
        return None

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        finally:  # torch leaves the stream of a capture that failed in its place
            torch.cuda.set_stream(current)
        return graph.replay


class _Slot:
    """The tensors of one size of micro-batch, and what replays the passes over them."""

    def __init__(self, sizes: StaticSizes, device: torch.device) -> None:
        labels, targets = (torch.zeros(sizes.labels, dtype=torch.int64, device=device) for _ in range(2))
        self.pack = StaticPack(sizes, device)
        self.micro = MicroBatch({"input_ids": self.pack.input_ids}, labels, targets, self.pack, tokens=0, examples=0)
        self.count = torch.ones((), device=device)
        self.loss = torch.zeros((), device=device)
        self.replay: Callable[[], None] | None = None

    def fill(self, micro: MicroBatch, count: torch.Tensor | int) -> None:
        assert micro.pack is not None
        own = self.micro.label_positions, self.micro.targets
        self.pack.fill(micro.pack)
        self.pack.fill_labels(own, micro.label_positions, micro.targets, micro.pack.end)
        if isinstance(count, torch.Tensor):
            self.count.copy_(count.view(()))
        else:
            self.count.fill_(count)


class MicroBatchGraphs:
    """The graphs of a run, made as its micro-batches come: the first one of a size is computed, the second captured.

    Args:
        model: the model that is trained, with its fast paths on.
        fast_paths: its session.
        capture: how to capture; None for the way of the model's device.
        on: False computes everything without.

    Attributes:
        rounds: whether micro-batches are rounded to the sizes of graphs; a function of the run's settings alone.
        captured: number of graphs.
        seconds: that capturing took.
    """

    def __init__(
        self, model: nn.Module, fast_paths: FastPaths, capture: Capture | None = None, on: bool = True
    ) -> None:
        self.rounds, self.captured, self.seconds = on, 0, 0.0
        self._model, self._fast_paths, self._capture = model, fast_paths, capture
        self._reason = None if on else "not asked for"
        self._slots: dict[StaticSizes, _Slot] = {}
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._computed = 0  # micro-batches without a graph

    @property
    def report(self) -> str:
        """``"on"`` with what was captured, or why there are no graphs; for the manifest."""
        if self._reason is not None:
            return self._reason
        return f"{ON}, {self.captured} sizes captured in {self.seconds:.1f} s" if self.captured else f"{ON}, none used"

    def begin_step(self) -> None:
        """Set the gradients to zero where they are, as graphs add to them there."""
        if not self._gradients and self.rounds:
            self._begin()
        if not self.rounds:
            return
        torch._foreach_zero_([gradient for _, gradient in self._gradients])
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def _begin(self) -> None:
        """Decide if there will be graphs, with the model as it is when the first step begins."""
        device = self._fast_paths.base.device if self._capture is None else None
        self._reason = unsupported_reason(self._fast_paths, device) or _unrounded_reason(self._fast_paths)
        self.rounds = self._reason is None
        if self.rounds:
            self._capture = self._capture or CudaCapture(self._fast_paths.base.device)
            trained = [p for p in self._model.parameters() if p.requires_grad]
            self._gradients = [(p, torch.zeros_like(p, memory_format=torch.contiguous_format)) for p in trained]

    def run(self, micro: MicroBatch, count: torch.Tensor | int, compute: Compute) -> torch.Tensor | None:
        """Add the gradients of a micro-batch; None where it has to be computed without rounding.

        Args:
            micro: the micro-batch.
            count: the labels of the whole step.
            compute: the passes: from the model's arguments and `count` to the loss, the gradients added.

        Returns:
            The loss, a scalar that the next call overwrites.
        """
        if not self.rounds or micro.pack is None:
            return None
        sizes = StaticSizes.of(micro.pack, len(micro.targets))
        seen = sizes in self._slots
        slot = self._slots[sizes] if seen else self._slots.setdefault(sizes, _Slot(sizes, self._fast_paths.base.device))
        slot.fill(micro, count)
        if slot.replay is None and seen and self._computed > 1 and self._reason is None and self.captured < LIMIT:
            self._capture_slot(slot, compute)
        if slot.replay is not None:
            slot.replay()
        else:
            self._compute(slot, compute)
        return slot.loss

    def release(self) -> bool:
        """Give up the graphs and their memory, for when that is short; False if there are none."""
        if all(slot.replay is None for slot in self._slots.values()):
            return False
        self._stop("the device's memory was needed for more than graphs")
        return True

    def _compute(self, slot: _Slot, compute: Compute) -> None:
        function = _passes(slot, compute)
        self._computed += 1
        if self._reason is not None or self._capture is None:
            function()
        elif self._computed == 2:  # what is made once has been made
            if reason := self._capture.obstacle(function):
                self._stop(reason)
        else:
            self._capture.compute(function)

    def _capture_slot(self, slot: _Slot, compute: Compute) -> None:
        assert self._capture is not None
        started = time.monotonic()
        try:
            slot.replay = self._capture.capture(_passes(slot, compute))
            self.captured += 1
        except Exception as error:  # families, methods and drivers differ in more ways than can be listed
            self._stop(f"capturing failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        self.seconds += time.monotonic() - started

    def _stop(self, reason: str) -> None:
        """Compute what is to come without graphs, rounded as before: a resumed run then computes the same."""
        self._reason, self._capture = self._reason or reason, None
        for slot in self._slots.values():
            slot.replay = None


def _passes(slot: _Slot, compute: Compute) -> Callable[[], None]:
    def passes() -> None:
        slot.loss.copy_(compute(slot.micro.arguments(), slot.count))

    return passes


def unsupported_reason(fast_paths: FastPaths, device: torch.device | None) -> str | None:
    """The reason why there are no graphs of this model's micro-batches, as far as it is known before trying.

    Args:
        fast_paths: the model's session.
        device: where it is; None to leave that question out.
    """
    base = fast_paths.base
    if device is not None and device.type != "cuda":
        return f"there are none on {device.type}"
    if device is not None and torch.version.hip:
        return "they are untested on ROCm"
    if not fast_paths.packs or not fast_paths.fused_cross_entropy:
        return "only packs are captured, with the output head and the loss in one operator"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes train together"
    if recomputes_activations(base):
        return "activations are computed again in the backward pass"
    if base.dtype == torch.float16:
        return "gradients of float16 are scaled"
    if getattr(base, "is_quantized", False):
        return "the base is quantised"
    if len({parameter.device for parameter in base.parameters()}) > 1:
        return "the model is on several devices"
    if trial.has_experts(base):
        return "a router chooses which modules compute a token"
    # A replay calls none, and one that is not ours may do more than hand on a tensor.
    if any(not isinstance(hook, Tap) for module in base.modules() for hook in _hooks(module)):
        return "a module has hooks"
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from getattr(module, kind).values()


def _unrounded_reason(fast_paths: FastPaths) -> str | None:
    """The reason why the model cannot compute a pack of round sizes, found by trying; None if it can."""
    device = fast_paths.base.device
    pack = Pack.of(trial.probe_sequences(fast_paths.base), trial.PREFIX, device)
    static = StaticPack(StaticSizes.of(pack, 1), device)
    static.fill(pack)
    try:
        with torch.no_grad(), _in_eval_mode(fast_paths.base):
            fast_paths.hidden_states(static)
    except Exception as error:
        return f"{' '.join(str(error).split())[:200]}"
    return None


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
