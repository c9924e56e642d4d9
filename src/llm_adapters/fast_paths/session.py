"""`FastPaths`: turn on what makes a model faster and changes nothing, tell what is on, and turn it off again."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from llm_adapters.errors import RequestError
from llm_adapters.fast_paths import attention, lora, routing, trial
from llm_adapters.fast_paths.forward import causal_forward, hidden_states
from llm_adapters.fast_paths.patches import Patches
from llm_adapters.fast_paths.rules import FAST_PATHS, INFERENCE, TRAINING, Context, FastPath
from llm_adapters.ops import backends
from llm_adapters.ops.cpu import allocator, prepacked
from llm_adapters.ops.packing import Pack

ON = "on"
PACKING, SHARED_PREFIX, FUSED_CROSS_ENTROPY = "packing", "shared prefix", "fused linear cross-entropy"
_ROUTED = {"LORA", "BOTTLENECK"}  # PEFT's names of the methods that can be another for each row


@dataclass(frozen=True)
class Probe:
    """A short sequence through the model's own forward, as it is and in a higher precision."""

    own: trial.Trace
    reference: trial.Trace

    def last_logits(self, count: int = 8) -> "Probe":
        """Keep the logits of the last `count` tokens, and nothing else."""
        own, reference = (
            trial.Trace({"logits": t.points["logits"][-count:].clone()}) for t in (self.own, self.reference)
        )
        return Probe(own, reference)


class FastPaths:
    """A model's faster forwards, as a context: inside, they are on; afterwards the model is as it was.

    Every fast path is tried before it is used (`trial`); one that is further from float32 than the model's own way may
    be, or that fails, stays off alone.

    Args:
        model: a transformers decoder, or a `PeftModel` around one.
        on: False leaves every fast path off (the label loss of the model's forward remains).
        inference: the weights do not change while it is on, and the model is in eval mode.
        merge: with `inference`, compute LoRA with merged copies of the weights, where that changes only rounding.
        adapters: with `inference`, compute these adapters of a `PeftModel` in one forward, each row with the one that
            the batch names, or `routing.NO_ADAPTER`; nothing is merged then.
        frozen: the old name of `inference`.

    Attributes:
        packs: whether packs are taken (`hidden_states`, the loss).
        fused_cross_entropy: whether the output head and the loss are one operator.
        report: for each fast path ``"on"``, or why it is off; for the manifest.

    Raises:
        RequestError: `adapters` without `inference`; or the model is sharded (FSDP2; once it is on, `fully_shard` may
            be used).

    Note:
        On Linux the C library is told once, for the whole process, to keep freed memory (`allocator.keep_memory`); that
        is not undone.
    """

    def __init__(
        self,
        model: nn.Module,
        on: bool = True,
        inference: bool = False,
        merge: bool = False,
        adapters: Sequence[str] | None = None,
        *,
        frozen: bool | None = None,
    ) -> None:
        if frozen is not None:
            warnings.warn("FastPaths(frozen=) is called inference= now", DeprecationWarning, stacklevel=2)
            inference = inference or frozen
        if adapters and not inference:
            raise RequestError("several adapters in one forward are for generation: give inference=True with them.")
        self.model, self.on, self.inference = model, on, inference
        self.merge = inference and merge and not adapters
        self.route = routing.Route(adapters) if adapters else None
        self.base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.packs = self.fused_cross_entropy = False
        self.probe: list[list[Probe]] = []
        self.report: dict[str, str] = {}
        self._patches = Patches()

    # --- on and off

    def __enter__(self) -> "FastPaths":
        if any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters()):
            raise RequestError("the model is sharded already: turn the fast paths on before `fully_shard`.")
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            self._patches.set(self.base, "forward", functools.partial(causal_forward, self, self.base.forward))
            self._install()
        except BaseException:
            self.close()
            raise
        finally:
            for module in training:
                module.training = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the model its own forwards back."""
        self._patches.undo()
        allocator.release_unused()

    def _install(self) -> None:
        if not self.on:
            self.report = dict.fromkeys((PACKING, SHARED_PREFIX, FUSED_CROSS_ENTROPY), "not asked for")
            return
        if self.base.device.type == "cpu":
            self.report["memory arena"] = ON if allocator.keep_memory() else "the C library has no mallopt"
            self.report["C functions"] = backends.unsupported_reason(self.base.dtype) or ON
        context = Context(self.base, self.inference, self.merge, self.route)
        if self.inference:
            context.unpackable = prepacked.unsupported_reason(self.base)
        reason = _unpacked_reason(self.model, self.base, self.inference)
        if self.route is not None and (reason := reason or _unrouted_reason(self.model, self.route.names)):
            self.report[PACKING] = reason
            return
        try:
            with torch.no_grad(), trial.shortened(self.base), contextlib.ExitStack() as stack:
                if not self.inference:
                    stack.enter_context(trial.away_from_identity(self.base))
                self._try_all(context, reason)
        except Exception as error:  # the decoder's layers cannot be told, or the model does not run in float32
            self._patches.undo(down_to=1)
            self.packs = self.fused_cross_entropy = False
            reason = f"the trial failed ({_told(error)})"
            mode = INFERENCE if self.inference else TRAINING
            names = (
                *(row.name for row in FAST_PATHS if mode in row.modes),
                PACKING,
                SHARED_PREFIX,
                FUSED_CROSS_ENTROPY,
            )
            self.report |= dict.fromkeys(names, reason)
        # Generation tries its engine against the last logits; the rest is not needed any more.
        kept = self.probe if self.inference else []
        self.probe = [[probe.last_logits() for probe in probes] for probes in kept]

    # --- the trial

    def _try_all(self, context: Context, unpacked: str | None) -> None:
        """Try every fast path, and install what is right; `unpacked` says why packs are not even tried."""
        mode = INFERENCE if self.inference else TRAINING
        rows = [row for row in FAST_PATHS if mode in row.modes]
        matched: dict[str, list[tuple[nn.Module, Any]]] = {row.name: [] for row in rows}
        for module in self.base.modules():
            for row in rows:
                if (found := row.match(module, context)) is not None:
                    matched[row.name].append((module, found))
        layer_of = {id(m): layer for layer in trial.chosen_layers(self.base)[0] for m in layer.modules()}
        units = {
            row.name: [layer_of.get(id(m), m) if row.whole_layer else m for m, _ in matched[row.name]] for row in rows
        }
        modules = {id(m): m for unit in units.values() for m in unit if m is not self.base}
        sequences = trial.probe_sequences(self.base)
        # 1. What the model itself computes, in its own precision and in a higher one.
        calls = []
        for _ in self._adapters():
            calls.append(trial.record_calls(self.base, list(modules.values()), lambda: self._logits(sequences[0])))
            self.probe.append([self._probed(sequence) for sequence in sequences])
        if unpacked is None:
            unpacked = self._record_attention(sequences)
        # 2. The rows, one by one.
        for row in rows:
            compare = functools.partial(self._mismatch, units[row.name], calls, sequences)
            self.report[row.name] = self._try_row(row, matched[row.name], context, compare)
        # 3. Packs, and the head with the loss.
        unpacked = unpacked or self._try_packing(sequences)
        self.packs = unpacked is None
        self.report[PACKING] = self.report[SHARED_PREFIX] = unpacked or ON
        unfused = self._unfused_reason(sequences[0])
        self.fused_cross_entropy = unfused is None
        self.report[FUSED_CROSS_ENTROPY] = unfused or ON

    def _adapters(self) -> Iterator[int]:
        """Activate each adapter of the route in turn; without one, leave what is active."""
        for number, name in enumerate(self.route.names if self.route is not None else [None]):
            with routing.using(self.model, name) if name is not None else contextlib.nullcontext():
                yield number

    def _ids(self, sequence: list[int]) -> torch.Tensor:
        return torch.tensor([sequence], device=self.base.device)

    def _logits(self, sequence: list[int]) -> torch.Tensor:
        return self.base(input_ids=self._ids(sequence), use_cache=False).logits

    def _decoded(self, sequence: list[int]) -> torch.Tensor:
        return self.base.base_model(input_ids=self._ids(sequence), use_cache=False).last_hidden_state

    def _traced(self, sequence: list[int]) -> trial.Trace:
        traced = trial.trace(self.base, lambda: self._decoded(sequence))
        traced.points["logits"] = self._logits(sequence)[0]
        return traced

    def _probed(self, sequence: list[int]) -> Probe:
        own = self._traced(sequence)
        with trial.in_float32(self.base):
            return Probe(own, self._traced(sequence))

    def _record_attention(self, sequences: list[list[int]]) -> str | None:
        """Add queries, keys and values to the probes, where a wrong position is seen; returns why not."""
        try:
            with self._attention_replaced():
                for number in self._adapters():
                    for sequence, probe in zip(sequences, self.probe[number], strict=True):
                        self._record(sequence, probe.own)
                        with trial.in_float32(self.base):
                            self._record(sequence, probe.reference)
        except attention.Unsupported as error:
            return str(error)
        except Exception as error:  # families differ in more ways than can be listed
            return f"its forward does not take packs ({type(error).__name__})"
        return (
            None if self.probe[0][0].own.has_attention else "its layers do not hand on what the attention needs to know"
        )

    def _record(self, sequence: list[int], trace: trial.Trace) -> None:
        with attention.recording(trace.record_attention):
            self._decoded(sequence)
        if trace.has_attention:
            return
        # The family's own code tells nothing of its queries, keys and values, but what they give.
        ids = self._ids(sequence)
        with attention.recording(trace.record_attention):
            hidden_states(
                self.base, Pack(ids, torch.arange(len(sequence), device=ids.device)[None], 0, (len(sequence),))
            )
        trace.points |= trial.attention_outputs(self.base, lambda: self._decoded(sequence))

    @contextlib.contextmanager
    def _attention_replaced(self) -> Iterator[None]:
        """Have the model's attention computed by `attention`, inside."""
        patches = Patches()
        try:
            attention.replace(self.base, patches)
            yield
        finally:
            patches.undo()

    def _try_row(
        self,
        row: FastPath,
        matched: list[tuple[nn.Module, Any]],
        context: Context,
        compare: Callable[[], str | None],
    ) -> str:
        """Install a row unless it is wrong; returns what the report says of it."""
        if reason := row.unsupported_reason(context):
            return reason
        mark, installed = len(self._patches), []
        try:
            installed = [m for m, found in matched if row.install(m, found, context, self._patches)]
            refused = compare() if installed else None
        except Exception as error:
            refused = f"it failed ({_told(error)})"
        if refused:
            self._patches.undo(down_to=mark)
            return refused
        if not installed:
            return "no such module"
        context.on.add(row.name)
        return ON if installed == [self.base] else f"{ON}, {len(installed)} modules"

    def _mismatch(
        self, modules: list[nn.Module], calls: list[dict[int, trial.Call]], sequences: list[list[int]]
    ) -> str | None:
        """Compare these modules with what was recorded of them (the model itself: with its probes)."""
        reached = not modules
        for number in range(self.adapter_count):
            self.use_adapter(number, len(sequences[0]))
            for module in modules:
                if module is self.base:
                    probe, reached = self.probe[number][0], True
                    found = trial.trace(self.base, lambda: self._decoded(sequences[0]))
                    refused = found.mismatch(probe.own, probe.reference, trial.has_experts(self.base))
                elif id(module) in calls[number]:
                    reached, refused = True, calls[number][id(module)].mismatch(module)
                else:
                    continue  # in a layer that is skipped, and like one that is not
                if refused:
                    return refused
        return None if reached else "the trial does not reach such a module"

    def _try_packing(self, sequences: list[list[int]]) -> str | None:
        """Turn packs with a shared prefix on; why they stay off, else None."""
        mark = len(self._patches)
        try:
            attention.replace(self.base, self._patches)
            pack = Pack.of(sequences, prefix=trial.PREFIX, device=self.base.device)
            refused = self._mismatch_of_pack(pack)
        except attention.Unsupported as error:
            refused = str(error)
        except Exception as error:  # families differ in more ways than can be listed
            refused = f"its forward does not take packs ({type(error).__name__})"
        if refused:
            self._patches.undo(down_to=mark)
        return refused

    def _mismatch_of_pack(self, pack: Pack) -> str | None:
        for number, probes in enumerate(self.probe):
            self.use_adapter(number, pack.tokens)
            recorded = trial.Trace()
            with attention.recording(recorded.record_attention):
                found = trial.trace(self.base, functools.partial(hidden_states, self.base, pack))
            found.points |= recorded.points
            spans = [slice(start, start + length) for start, length in zip(pack.starts, pack.lengths, strict=True)]
            parts = [part for span in spans for part in (slice(0, pack.prefix), span)]
            own, reference = (
                trial.Trace.joined(traces) for traces in ([p.own for p in probes], [p.reference for p in probes])
            )
            if refused := found.rows(*parts).mismatch(own, reference, trial.has_experts(self.base)):
                return refused
        return None

    def _unfused_reason(self, sequence: list[int]) -> str | None:
        """Say why the output head and the loss cannot be one; None where they can."""
        output = self.base.get_output_embeddings()
        if type(output) is not nn.Linear or any(p.requires_grad for p in output.parameters()):
            return "the output head is trained, or is no plain linear layer"
        if routing.prompt_learning(self.model):
            return "the method puts tokens before the sequence"
        probe = self.probe[0][0]
        logits = nn.functional.linear(probe.own.points["hidden"], output.weight, output.bias)
        differs = trial.mismatch(logits, probe.own.points["logits"], probe.reference.points["logits"])
        return "the family changes the logits after its output head" if differs else None

    # --- what others ask

    @property
    def adapter_count(self) -> int:
        """Number of adapters that a batch may name."""
        return 1 if self.route is None else len(self.route.names)

    def use_adapter(self, adapter: int, rows: int) -> None:
        """Have the next forward, of so many rows, computed with one of the `adapters`, where there are several."""
        if self.route is not None:
            self.route.set(torch.full((rows,), adapter))

    def hidden_states(self, pack: Pack) -> torch.Tensor:
        """Compute the decoder's last hidden states of a pack, (1, tokens, hidden size)."""
        return hidden_states(self.base, pack)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _unpacked_reason(model: Any, base: Any, inference: bool) -> str | None:
    """Say why packs are not even tried; None where they are. Generation keeps a learned prefix in its cache."""
    if routing.prompt_learning(model) and not (inference and routing.is_prefix_tuning(model)):
        return "the method puts tokens before the sequence"
    return attention.unsupported_reason(base)


def _unrouted_reason(model: Any, names: Sequence[str]) -> str | None:
    """Say why the adapters `names` cannot be computed in one forward, as far as can be said without trying it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from llm_adapters.bottleneck.layer import BottleneckLayer

    methods = {str(config.peft_type.value) for config in model.peft_config.values()}
    if unroutable := sorted(methods - _ROUTED):
        return f"{', '.join(unroutable)} cannot be another for each row"
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return "an adapter has its own copy of a module"
        if isinstance(module, BottleneckLayer):
            if any(name in module.bottleneck_prefix for name in names):
                return "an adapter has a prefix"
        elif isinstance(module, BaseTunerLayer) and not lora.is_plain_lora(module, names):
            return "a LoRA is more than two matrices beside a frozen linear layer (DoRA, a bias, merged, quantised)"
    return None
