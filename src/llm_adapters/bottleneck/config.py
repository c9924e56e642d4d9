"""The configuration of the bottleneck method: series and parallel adapters."""

import enum
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from llm_adapters.architectures import PLACEMENTS
from llm_adapters.errors import RequestError, unknown


class BottleneckType(str, enum.Enum):  # noqa: UP042  PEFT and transformers want a str with `.value`
    """The key under which PEFT's tables know the method (PEFT's own enum is closed to others)."""

    BOTTLENECK = "BOTTLENECK"


# Where the delta goes at one module: into its input, onto its output, or beside it.
INSERT_BEFORE, INSERT_AFTER, INSERT_PARALLEL = "before", "after", "parallel"
INSERTIONS = ("series", INSERT_PARALLEL, INSERT_BEFORE, INSERT_AFTER)
INITIALISATIONS = ("identity", "paper")


@dataclass
class AdapterConfig(PeftConfig):
    """Base of the configurations of this package's methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.from_folder = False  # read together with weights, which are still to come

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> PeftConfig:
        """Read the configuration from the folder of an adapter (see `PeftConfig.from_pretrained`)."""
        config = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config.from_folder = True
        return config


@dataclass
class BottleneckConfig(AdapterConfig):
    """A small network ``delta(h) = f(h W_down) W_up`` inserted into a frozen decoder.

    Series adapters (Houlsby et al. 2019; arXiv 2304.01933, eq. 2) act on a sub-layer's output before the residual is
    added, ``out <- out + s * delta(out)``. Parallel adapters (He et al. 2022; arXiv 2304.01933, eq. 4) run from the
    sub-layer's input to its output, ``out <- out + s * delta(in)``. The modules of the model at hand come from its
    architecture row. `target_modules` puts the same network on any linear layers instead, as the paper's code does.

    Args:
        insertion: ``"series"`` or ``"parallel"``; with `target_modules` also ``"before"`` (``W(x + s*delta(x))``) and
            ``"after"`` (``y + s*delta(y)``, the same as series); or a mapping from module name to one of these, which
            then also says which modules (``{"up_proj": "before", "down_proj": "after"}``).
        placement: the sub-layers that get an adapter: ``"attention"``, ``"mlp"`` or both.
        target_modules: names (full, or a dotted ending) of the modules to adapt instead of `placement`'s; a string is
            a regular expression that the full name must match.
        layers: indices of the decoder layers to adapt (negative ones count from the end); None for all.
        bottleneck_size: number of features of the bottleneck.
        non_linearity: name of a transformers activation ("tanh", "relu", "gelu_new", ...); "linear" for none.
        scaling: the factor s, or ``"learned"``: one trained number per adapter, starting at 1.
        bottleneck_dropout: probability of dropping an entry of the network's input while training.
        use_bias: whether the two projections have a bias.
        init_weights: ``"identity"`` or true (W_up starts at zero, so that the model starts unchanged), ``"paper"``
            (N(0, 0.02) on both, as the paper's code does), or false (torch's own random start on both, as in every
            PEFT method: the model does not start unchanged).
        prefix_length: number of learned keys and values that the attention blocks of the chosen `layers` get as well:
            with a scaled parallel adapter, the mix-and-match adapter of He et al. 2022. They start at N(0, 0.02).
        modules_to_save: further modules to train and save, as in every PEFT method.

    Raises:
        RequestError: a value that is not allowed; the message names it and what is allowed.
    """

    insertion: str | dict[str, str] = field(default="series")
    placement: str | list[str] | tuple[str, ...] = field(default=("mlp",))
    target_modules: list[str] | str | None = field(default=None)
    layers: list[int] | None = field(default=None)
    bottleneck_size: int = field(default=256)
    non_linearity: str = field(default="tanh")
    scaling: float | str = field(default=1.0)
    bottleneck_dropout: float = field(default=0.0)
    use_bias: bool = field(default=False)
    init_weights: bool | Literal["identity", "paper"] = field(default="identity")
    prefix_length: int = field(default=0)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BottleneckType.BOTTLENECK
        self._check_target()
        self._check_network()

    def _check_target(self) -> None:
        placement = names_in("placement", self.placement)
        if not placement:
            raise RequestError("placement is empty: choose attention, mlp or both")
        for name in placement:
            if name not in PLACEMENTS:
                raise unknown("placement", name, PLACEMENTS)
        self.placement = [p for p in PLACEMENTS if p in placement]
        if not isinstance(self.target_modules, str | None):
            self.target_modules = sorted(names_in("target_modules", self.target_modules))  # a set has no order to save
        if isinstance(self.insertion, dict):
            if not self.insertion:
                raise RequestError("insertion is an empty mapping: give module names, or 'series' or 'parallel'")
            if self.target_modules not in (None, sorted(self.insertion)):
                raise RequestError("an insertion mapping already says which modules: leave target_modules out")
            self.target_modules = sorted(names_in("insertion", self.insertion))
        for value in self.insertion.values() if isinstance(self.insertion, dict) else [self.insertion]:
            if value not in INSERTIONS:
                raise unknown("insertion", value, INSERTIONS)
        if self.target_modules is None and self.insertion in (INSERT_BEFORE, INSERT_AFTER):
            raise RequestError(
                f"insertion {self.insertion!r} is for a linear layer: name it with target_modules, "
                "or use 'series' or 'parallel' with placement"
            )
        if self.target_modules is not None and not self.target_modules:
            raise RequestError("target_modules is empty: name at least one module, or leave it out")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise RequestError(
                    f"target_modules is {self.target_modules!r}, which is no regular expression ({error}): "
                    "fix it, or give a list of names"
                ) from None
        self._check_layers()
        if self.modules_to_save is not None:
            self.modules_to_save = names_in("modules_to_save", self.modules_to_save)

    def _check_layers(self) -> None:
        if self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
                raise RequestError(f"layers is {self.layers!r}: a list of whole numbers is allowed")
            self.layers = list(self.layers)
            if not self.layers:
                raise RequestError("layers is empty: name at least one layer, or leave it out for all")
            for index in self.layers:
                if isinstance(index, bool) or not isinstance(index, int):
                    raise RequestError(f"layers has {index!r}: only whole numbers are allowed")

    def _check_network(self) -> None:
        from transformers.activations import ACT2FN

        check_number("bottleneck_size", self.bottleneck_size, int, lambda n: n >= 1, "a whole number of at least 1")
        if self.non_linearity not in ACT2FN:
            raise unknown("non_linearity", self.non_linearity, ACT2FN)
        if any(True for _ in ACT2FN[self.non_linearity].parameters()):
            raise RequestError(
                f"non_linearity {self.non_linearity!r} has weights of its own, which an adapter cannot hold: "
                "choose another, such as tanh, relu or gelu_new"
            )
        if self.scaling != "learned":
            allowed = "a finite number other than 0, or 'learned',"
            check_number("scaling", self.scaling, int | float, lambda s: math.isfinite(s) and s != 0, allowed)
        rate, allowed = self.bottleneck_dropout, "a number of at least 0 and below 1"
        check_number("bottleneck_dropout", rate, int | float, lambda p: 0 <= p < 1, allowed)
        check_number("prefix_length", self.prefix_length, int, lambda n: n >= 0, "a whole number of at least 0")
        if not isinstance(self.use_bias, bool):
            raise RequestError(f"use_bias is {self.use_bias!r}: true or false is allowed")
        if self.init_weights is True:
            self.init_weights = "identity"
        if self.init_weights is not False and self.init_weights not in INITIALISATIONS:
            raise unknown("init_weights", self.init_weights, [*INITIALISATIONS, True, False])

    def insertion_at(self, target: str) -> str:
        """Insertion at the module named by `target`: ``before``, ``after`` or ``parallel``."""
        value = self.insertion[target] if isinstance(self.insertion, dict) else self.insertion
        return INSERT_AFTER if value == "series" else value


def check_number(name: str, value: Any, kind: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    """Refuse a value that is no number of the `kind`, or for which `holds` is false.

    Raises:
        RequestError: the value, and what is `allowed`.
    """
    if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
        raise RequestError(f"{name} is {value!r}: {allowed} is allowed")


def names_in(field_name: str, value: Any) -> list[str]:
    """List of the names in `value`, which may be one name alone.

    Args:
        field_name: the option's name, for the message.
        value: what was given for it.

    Raises:
        RequestError: it holds anything but names.
    """
    names: list[Any] = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise RequestError(f"{field_name} is {value!r}: a name, or a list of names, is allowed")
    return names
