"""`accelerate`: turn on what makes a model faster and changes nothing, tell what is on, and turn it off again."""

import functools
import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from llm_adapters.errors import RequestError
from llm_adapters.fast_paths import attention, layers, lora, routing
from llm_adapters.ops import backends, rotary
from llm_adapters.ops import cross_entropy as head
from llm_adapters.ops import linear as products
from llm_adapters.ops.cpu import allocator as memory
from llm_adapters.ops.cpu import prepacked as weights
from llm_adapters.ops.kv_cache import Step
from llm_adapters.ops.packing import Pack

ON = "on"
_ROUTED = {"LORA", "BOTTLENECK"}  # PEFT's names of the methods that can be another for each row
# How far apart two ways to the same hidden state may be, relative to its size: rounding is, a leak between segments,
# a wrong position or a wrong norm is not.
_ROOM = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


class FastPaths:
    """A model's faster forwards, as a context: inside, they are on; afterwards the model is as it was.

    Every fast path is tried against the model's own forward before it is used, and one that differs stays off.

    Args:
        model: a transformers decoder, or a `PeftModel` around one.
        on: False leaves every fast path off (the label loss of the model's forward remains).
        inference: the weights stay as they are while it is on, and the model is in eval mode: for generation.
        merge: with `inference`, compute LoRA with merged copies of the weights, where that changes only rounding.
        adapters: with `inference`, compute these adapters of a `PeftModel` in one forward, each row with that which the
            step says (`pages.Step`), or `routing.NO_ADAPTER`; nothing is merged then.

    Attributes:
        report: for each fast path ``"on"``, or why it is off; for the manifest.

    Raises:
        RequestError: `adapters` without `inference`; or the model is sharded (FSDP2; once on, `fully_shard` may be
            used).
    """

    def __init__(
        self,
        model: nn.Module,
        on: bool = True,
        inference: bool = False,
        merge: bool = False,
        adapters: Sequence[str] | None = None,
    ) -> None:
        if adapters and not inference:
            raise RequestError("several adapters in one forward are for generation: give inference=True with them.")
        self.model, self.on, self.inference, self.merge = model, on, inference, inference and merge and not adapters
        self.route = routing.Route(adapters) if adapters else None
        self.base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.report: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []
        self._merged = self._packed = False

    # --- on and off

    def __enter__(self) -> "FastPaths":
        if any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters()):
            raise RequestError("the model is sharded already: turn fast_paths on before `fully_shard`.")
        was_training = self.model.training
        self.model.eval()
        try:
            self._probe_and_install()
        except BaseException:
            self.close()
            raise
        finally:
            self.model.train(was_training)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the model its own forwards back."""
        while self._undo:
            self._undo.pop()()
        memory.release_unused()

    @property
    def packs(self) -> bool:
        """Whether `hidden` and `loss` take packs."""
        return self.report.get("packing") == ON

    def _probe_and_install(self) -> None:
        self._set(self.base, "forward", functools.partial(_causal_forward, self, self.base.forward))
        if not self.on:
            self.report = dict.fromkeys(("packing", "shared prefix", "fused head"), "not asked for")
            return
        if self.base.device.type == "cpu":
            self.report["kept memory"] = ON if memory.keep_memory() else "the C library has no mallopt"
            self.report["kernels"] = backends.unsupported_reason(self.base.dtype) or ON
        if self.inference:
            reason = weights.unsupported_reason(self.base)
            self._packed, self.report["weights in blocks"] = reason is None, reason or ON
        sequences = probe_sequences(self.base)
        refused = _why_not(self.model, self.base, self.inference)
        if self.route is not None and (refused := refused or _why_not_routed(self.model, self.route.names)):
            self.report["packing"] = refused
            return
        with torch.no_grad():
            # Of several adapters each layer's forward needs to be told the rows: there the packs are the trial.
            plain = None if self.route is not None else self._plain(sequences[0])
            expected = [] if refused else self._expected(sequences)
            if self.merge and expected:
                self._merge(sequences, expected[0])
            self._install_layers(sequences[0], plain)
            if expected:
                refused = self._install_packing(sequences, expected)
            self.report["packing"] = self.report["shared prefix"] = refused or ON
            self.report["fused head"] = self._why_no_head(sequences[0]) or ON

    def _expected(self, sequences: list[list[int]]) -> list[list[torch.Tensor]]:
        """The model's own last hidden states of the `sequences`, for each of the adapters; else for the active ones."""
        if self.route is None:
            return [[self._plain(sequence) for sequence in sequences]]
        found = []
        for name in self.route.names:
            with routing.using(self.model, name):
                found.append([self._plain(sequence) for sequence in sequences])
        return found

    def _set(self, module: Any, name: str, value: Any) -> None:
        """Set an attribute of the instance until `close`, which leaves none behind where there was none."""
        there, before = name in vars(module), vars(module).get(name)
        setattr(module, name, value)
        if not there:
            self._undo.append(functools.partial(delattr, module, name))
        else:
            self._undo.append(functools.partial(setattr, module, name, before))

    def _freeze(self, module: nn.Module, merged: bool) -> bool:
        """Give a LoRA layer a forward with weights that stay as they are; whether that was possible."""
        if merged:
            forward = lora.merged_lora(module, self._packed)
        else:
            forward = lora.frozen_lora(module, self.route, self._packed)
        if forward is not None:
            self._set(module, "forward", forward)
        return forward is not None

    def _merge(self, sequences: list[list[int]], expected: list[torch.Tensor]) -> None:
        """Merge copies of the LoRA weights, and undo it where the results would not be the same."""
        adapted = [module for module in self.base.modules() if lora.lora_weight(module) is not None]
        mark = len(self._undo)
        count = sum(self._freeze(module, merged=True) for module in adapted)
        if not count:
            return
        pairs = zip(sequences, expected, strict=True)
        if refused := next(filter(None, (differs(self._plain(ids), whole) for ids, whole in pairs)), None):
            while len(self._undo) > mark:
                self._undo.pop()()
        self._merged = refused is None
        self.report["LoRA merged"] = refused or f"{ON}, {count} modules"

    def _install_layers(self, sequence: list[int], expected: torch.Tensor | None) -> None:
        """Faster forwards of single modules, unless the `sequence` has other hidden states than `expected` then."""
        mark = len(self._undo)
        kinds = self._set_layers()
        refused = None if expected is None else differs(self._plain(sequence), expected)
        if refused:
            while len(self._undo) > mark:
                self._undo.pop()()
        self.report |= dict.fromkeys(kinds, refused) if refused else kinds

    def _set_layers(self) -> dict[str, str]:
        """Give modules faster forwards; what there is of each kind."""
        from llm_adapters.bottleneck.layer import BottleneckLayer

        kinds = "fused LoRA", "bottleneck in the base's precision", "RMS norm", "gated MLP", "frozen linear layers"
        counts = dict.fromkeys(kinds, 0)
        output = self.base.get_output_embeddings()
        # A LoRA layer's forward has its own copy.
        inside = {id(part) for m in self.base.modules() if lora.lora_weight(m) is not None for part in m.modules()}
        gated: list[nn.Module] = []
        for module in self.base.modules():
            if lora.lora_weight(module) is not None:
                if not self.inference:
                    self._set(module, "forward", functools.partial(lora.lora_forward, module, module.forward))
                elif self._merged or not self._freeze(module, merged=False):
                    continue
                counts["fused LoRA"] += 1
            elif self._packed and type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
                if id(module) not in inside:
                    self._set(module, "forward", weights.PrepackedLinear(module.weight, module.bias))
            elif not self.inference and module is not output and id(module) not in inside and _takes(module):
                counts["frozen linear layers"] += 1
                self._set(module, "forward", functools.partial(_linear_forward, module, module.forward))
            elif isinstance(module, BottleneckLayer):
                delta = functools.partial(layers.frozen_delta, module, {}, self._packed) if self.inference else None
                self._set(module, "delta", delta or functools.partial(layers.bottleneck_delta, module))
                counts["bottleneck in the base's precision"] += 1
                if self.route is not None:
                    self._set(module, "routing", self.route.names)
                    self._set(module, "add", functools.partial(layers.routed_add, module, self.route))
            elif (parts := layers.rms_parts(module)) is not None:
                self._set(module, "forward", functools.partial(layers.rms_forward, module.forward, *parts))
                counts["RMS norm"] += 1
            elif layers.is_silu_mlp(module):
                gated.append(module)
                self._set(module, "forward", functools.partial(layers.silu_mlp_forward, module))
                counts["gated MLP"] += 1
        for module in gated if self._packed else ():  # now that their linear layers are
            if (forward := layers.frozen_silu_mlp(module)) is not None:
                self._set(module, "forward", forward)
        if file := _modelling_file(self.base):
            self._set(file, "apply_rotary_pos_emb", rotary.apply_rotary_pos_emb)
        report = {name: f"{ON}, {count} modules" if count else "no such module" for name, count in counts.items()}
        if not counts["frozen linear layers"]:
            report["frozen linear layers"] = self._why_no_products() or "no such module"
        return report | {"rotary positions": ON if file else "none, or of another kind"}

    def _why_no_products(self) -> str | None:
        if self.inference:
            return "for training"
        weight = next(self.base.parameters())
        if backends.for_tensor(weight) is None:
            return "there are no kernels"
        return None if products.is_fast(weight) else "the processor or the precision has none"

    def _install_packing(self, sequences: list[list[int]], expected: list[list[torch.Tensor]]) -> str | None:
        """Why packing stays off; None where it is on. `expected` as `_expected` gives it."""
        attention.register()
        before = self.base.config._attn_implementation
        self.base.set_attn_implementation(attention.NAME)
        refused = None
        try:
            pack = Pack.of(sequences, prefix=3, device=self.base.device)
            for adapter, wholes in enumerate(expected):
                self.all_by(adapter, pack.tokens)
                found = self.hidden(pack)[0]
                parts = found[3 : pack.end].split(list(pack.lengths))
                for part, whole in zip(parts, wholes, strict=True):
                    refused = refused or differs(torch.cat((found[:3], part)), whole)
        except attention.Unsupported as error:
            refused = str(error)
        except Exception as error:  # families differ in more ways than can be listed
            refused = f"its forward does not take packs ({type(error).__name__})"
        if refused:
            self.base.set_attn_implementation(before)
        else:
            self._undo.append(lambda: self.base.set_attn_implementation(before))
        return refused

    def _why_no_head(self, sequence: list[int]) -> str | None:
        """Why the head's product and the loss cannot be one; None where they can."""
        output = self.base.get_output_embeddings()
        if type(output) is not nn.Linear or any(p.requires_grad for p in output.parameters()):
            return "the output head is trained, or is no plain linear layer"
        if routing.prompt_learning(self.model):
            return "the method puts tokens before the sequence"
        self.all_by(0, len(sequence))
        ids = torch.tensor([sequence], device=self.base.device)
        hidden = self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = self.base(input_ids=ids, use_cache=False).logits
        return differs(output(hidden), logits) and "the family changes the logits after its output head"

    # --- forwards

    @property
    def adapter_count(self) -> int:
        """How many adapters a step may name."""
        return 1 if self.route is None else len(self.route.names)

    def all_by(self, adapter: int, rows: int) -> None:
        """Have the next forward, of so many rows, computed with one of the `adapters`, where there are several."""
        if self.route is not None:
            self.route.tell(torch.full((rows,), adapter))

    def _plain(self, sequence: list[int]) -> torch.Tensor:
        ids = torch.tensor([sequence], device=self.base.device)
        return self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]

    def hidden(self, pack: Pack, **kwargs: Any) -> torch.Tensor:
        """The decoder's last hidden states of a pack, (1, tokens, width)."""
        return self.base.base_model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=attention.no_mask(pack.input_ids.device),
            pack=pack,
            **({"use_cache": False} | kwargs),
        ).last_hidden_state

    def logits(self, step: Step, tokens: torch.Tensor) -> torch.Tensor:
        """The logits that follow a generation's `tokens`, (decoded,), and the prompts of its `step`, one row each."""
        ids, chosen = tokens, torch.arange(len(tokens), device=tokens.device)
        positions = torch.cat([tokens[:0], *(decoded.at.flatten() for decoded in step.decoded)])
        if (pack := step.pack) is not None:
            ids = torch.cat((ids, pack.input_ids[0, pack.prefix :]))
            positions = torch.cat((positions, pack.position_ids[0, pack.prefix :]))
            ends = torch.tensor(pack.lengths, device=tokens.device).cumsum(0) - 1
            chosen = torch.cat((chosen, len(tokens) + ends))
        if self.route is not None:
            self.route.tell(step.adapters())
        kwargs: dict[str, Any] = {"attention_mask": attention.no_mask(ids.device), "step": step, "use_cache": False}
        selects = "logits_to_keep" in inspect.signature(type(self.base).forward).parameters
        if selects:
            kwargs["logits_to_keep"] = chosen
        logits = self.base(input_ids=ids[None], position_ids=positions[None], **kwargs).logits[0]
        return logits if selects else logits[chosen]


def _causal_forward(
    fast_paths: FastPaths,
    own: Any,
    *args: Any,
    at: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    pack: Pack | None = None,
    **kwargs: Any,
) -> Any:
    """The causal model's forward; with `at` and `targets`, the sum of the losses there.

    It is a forward, and no function beside the model, so that wrappers (PEFT's, DDP's) see the call. `at` counts the
    places of the row of a `pack`, or of the flattened padded `input_ids`.
    """
    if at is None or targets is None:
        return own(*args, **kwargs)
    base = fast_paths.base
    if fast_paths.report["fused head"] == ON:
        if pack is not None:
            hidden = fast_paths.hidden(pack)
        else:
            inputs = {key: kwargs[key] for key in ("input_ids", "attention_mask")}
            hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
        output = base.get_output_embeddings()
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, at)
        return {"loss": head.fused_linear_cross_entropy(chosen, output.weight, output.bias, targets)}
    width = kwargs.pop("width")
    first = 0
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        first = int((at % width).min()) if len(at) else width - 1
        kwargs["logits_to_keep"] = width - first
    if pack is not None:
        kwargs |= {
            "position_ids": pack.position_ids,
            "attention_mask": attention.no_mask(pack.input_ids.device),
            "pack": pack,
        }
    logits = own(*args, **kwargs | {"use_cache": False}).logits[:, first - width :]
    chosen = logits.reshape(-1, logits.shape[-1]).index_select(0, at // width * (width - first) + at % width - first)
    loss = nn.functional.cross_entropy(chosen.float(), targets, reduction="sum")
    return {"loss": loss if len(at) else logits.sum() * 0}  # zero, and yet a gradient for every rank to share


def learned_prefix(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values of prefix tuning, a pair (key-value heads, tokens, width) per layer; of other models none."""
    if not _is_prefix_tuning(model):
        return []
    dtype = model.get_base_model().dtype
    return [(layer.keys[0].to(dtype), layer.values[0].to(dtype)) for layer in model.get_prompt(batch_size=1).layers]


def _is_prefix_tuning(model: Any) -> bool:
    config = routing.prompt_learning(model)
    return config is not None and config.peft_type.value == "PREFIX_TUNING"


def _why_not(model: Any, base: Any, inference: bool) -> str | None:
    """Why packs are not even tried. Generation keeps a learned prefix in its cache."""
    if routing.prompt_learning(model) and not (inference and _is_prefix_tuning(model)):
        return "the method puts tokens before the sequence"
    module = inspect.getmodule(type(base))
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return f"{base.config.model_type} has attention code of its own"
    return None


def _why_not_routed(model: Any, names: Sequence[str]) -> str | None:
    """Why the adapters `names` cannot be computed in one forward, as far as can be said without trying it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from llm_adapters.bottleneck.layer import BottleneckLayer

    methods = {str(config.peft_type.value) for config in model.peft_config.values()}
    if strange := sorted(methods - _ROUTED):
        return f"{', '.join(strange)} cannot be another for each row"
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return "an adapter has its own copy of a module"
        if isinstance(module, BottleneckLayer):
            if any(name in module.bottleneck_prefix for name in names):
                return "an adapter has a prefix"
        elif isinstance(module, BaseTunerLayer) and not lora.is_plain_lora(module, names):
            return "a LoRA is more than two matrices beside a frozen linear layer (DoRA, a bias, merged, quantised)"
    return None


def probe_sequences(base: Any) -> list[list[int]]:
    """Three sequences of different lengths that begin alike, one of them long enough for all kernels (`products`)."""
    rows = base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, rows, (3,), generator=generator).tolist()
    return [start + torch.randint(0, rows, (n,), generator=generator).tolist() for n in (77, 3, 14)]


def differs(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """None where `found` is `expected` but for rounding, else by how much it is not."""
    distance = float((found.float() - expected.float()).norm() / expected.float().norm())
    if distance <= _ROOM.get(expected.dtype, 1e-4):
        return None
    return f"its results would differ by {distance:.2g}"


def _modelling_file(model: nn.Module) -> Any:
    """The module of `model`'s family if its rotary function does what `rotate_halves` does, found by trying."""
    module = inspect.getmodule(type(model))
    own = getattr(module, "apply_rotary_pos_emb", None)
    if own is None or list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 3, 8, generator=generator)
    same = []
    for width in (8, 4):  # some families rotate a part of each head, and hand over the whole
        cos, sin = (torch.randn(1, 3, width // 2, generator=generator).repeat(1, 1, 2) for _ in range(2))
        try:
            pairs = list(zip(own(q, k, cos, sin), rotary.apply_rotary_pos_emb(q, k, cos, sin), strict=True))
        except Exception:  # a width that the family does not have, or a function that takes something else
            continue
        same += [torch.allclose(theirs, ours, atol=1e-6) for theirs, ours in pairs]
    return module if same and all(same) else None


def _is_trained(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _takes(layer: nn.Module) -> bool:
    """Whether `layer` is a frozen linear layer that `linear_forward` makes faster."""
    if type(layer) is not nn.Linear or _is_trained(layer) or "forward" in vars(layer):
        return False
    return products.is_fast(layer.weight)


def _linear_forward(layer: Any, own: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer whose weights are frozen; `own` is its forward, for whatever this one does not do."""
    if x.dtype != layer.weight.dtype or torch.is_autocast_enabled(x.device.type) or _is_trained(layer):
        return own(x)
    return products.frozen_linear(x, layer.weight, layer.bias)
