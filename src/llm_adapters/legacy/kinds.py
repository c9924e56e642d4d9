"""Contents of the checkpoints of the paper's code: checked, and turned into PEFT's format.

One class per kind. An object of it is a checkpoint that is right in itself; `check_fit` compares it with a model.
"""

import re
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llm_adapters.adapter_files import ADAPTER_CONFIG
from llm_adapters.errors import first_line, unknown
from llm_adapters.legacy.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn

# The families whose linear layers the paper's code tells into "before" and "after" (it decides by model_type and name).
FAMILIES = ("bloom", "chatglm", "gpt_neo", "gptj", "llama", "opt")
POSITIONS = {
    "gate_proj": "before",
    "up_proj": "before",
    "dense_h_to_4h": "before",
    "fc_in": "before",
    "c_fc": "before",
    "fc1": "before",
    "down_proj": "after",
    "dense_4h_to_h": "after",
    "fc_out": "after",
    "c_proj": "after",
    "fc2": "after",
}
_ROOT = "base_model.model."
_PROMPT = "prompt_embeddings"


class AtModules(Checkpoint):
    """Adapters at single modules. `modules` are their names in the base model, in the checkpoint's order."""

    parts: dict[str, str]  # the end of a key of the paper's code -> the end of PEFT's
    biases: ClassVar[tuple[str, ...]] = ()  # values of the setting `bias` that PEFT's method has too

    def __init__(self, folder: Path, settings: dict[str, Any], weights: "dict[str, torch.Tensor]") -> None:
        super().__init__(folder, settings, weights)
        if settings.get("modules_to_save"):
            raise self.error(
                f"holds whole modules of the base model (modules_to_save = {settings['modules_to_save']!r}), which the "
                "paper's scripts never save and which cannot be converted"
            )
        self.endings, self.pattern = self._targets()
        split = {key: self._split(key) for key in weights}
        self.modules = list(dict.fromkeys(names[0] for names in split.values() if names))
        self.bias_keys = [key for key in weights if split[key] is None and key.endswith(".bias")]
        if self.bias_keys and settings.get("bias") not in self.biases:
            raise self.error(
                f"holds biases of the base model (bias = {settings.get('bias')!r}), such as {self.bias_keys[0]}, "
                "which a converted adapter of this kind cannot hold"
            )
        if not self.modules:
            raise self.error(f"holds no adapter weights: no key ends in {' or '.join(self.parts)}")
        if settings.get("target_modules") is None:
            self.endings = sorted({module.rpartition(".")[2] for module in self.modules})
        missing = [self._key(m, part) for m in self._expected_modules() for part in self.parts]
        unexpected = [key for key, names in split.items() if names is None and key not in self.bias_keys]
        unexpected += [self._key(m, next(iter(self.parts))) for m in self.modules if not self._is_target(m)]
        self.check_keys([key for key in missing if key not in weights], unexpected)
        for module in self.modules:
            for part, shape in self.shapes(module, *self.features(module)).items():
                self.check_shape(self._key(module, part), shape)

    @abstractmethod
    def features(self, module: str) -> tuple[int, int]:
        """Number of features that `module` takes and gives, as far as the adapter's weights tell."""

    @abstractmethod
    def shapes(self, module: str, taken: int, given: int) -> dict[str, tuple[int, ...]]:
        """The shape of each part at `module`, which takes and gives so many features."""

    def check_fit(self, model: "nn.Module") -> None:
        """Compare keys and shapes with the model's linear layers."""
        from torch import nn

        from llm_adapters.compat.transformers import is_conv1d

        where = f" on {type(model).__name__}"
        found = {name: module for name, module in model.named_modules() if name and self._is_target(name)}
        self.check_keys(
            [self._key(m, part) for m in found if m not in self.modules for part in self.parts],
            [self._key(m, part) for m in self.modules if m not in found for part in self.parts],
            where,
        )
        for name, module in found.items():
            if isinstance(module, nn.Linear):
                taken, given = module.in_features, module.out_features
            elif is_conv1d(module):
                taken, given = module.weight.shape
            else:
                raise self.error(f"cannot be put{where}: {name} is a {type(module).__name__} and not a linear layer")
            for part, shape in self.shapes(name, taken, given).items():
                self.check_shape(self._key(name, part), shape, where)
        parameters = dict(model.named_parameters())
        self.check_keys([], [key for key in self.bias_keys if key.removeprefix(_ROOT) not in parameters], where)
        for key in self.bias_keys:
            self.check_shape(key, tuple(parameters[key.removeprefix(_ROOT)].shape), where)

    def targets(self) -> list[str]:
        """The shortest names that say in PEFT's way which modules the paper's code adapted: names or dotted endings.

        Its own matching is by the bare end of a name (``"proj"`` means every ``..._proj``), or by a pattern.
        """
        if self.pattern:
            return sorted(self.modules)
        found = ((m, ending) for m in self.modules for ending in self.endings if m.endswith(ending))
        return sorted({".".join(module.split(".")[-1 - ending.count(".") :]) for module, ending in found})

    def at_part(self, module: str, part: str) -> "torch.Tensor":
        """The weight of one part at `module`."""
        return self.weights[self._key(module, part)]

    def _targets(self) -> tuple[list[str], re.Pattern[str] | None]:
        """Selection of the modules: endings of their names, or a pattern."""
        targets = self.setting("target_modules", [], str, list)
        try:
            return ([], re.compile(targets)) if isinstance(targets, str) else ([str(t) for t in targets], None)
        except re.error as error:
            raise self.error(f"has target_modules = {targets!r}, which is no pattern ({first_line(error)})") from None

    def _is_target(self, module: str) -> bool:
        return bool(self.pattern.fullmatch(module)) if self.pattern else module.endswith(tuple(self.endings))

    def _expected_modules(self) -> list[str]:
        """The modules that have weights, and those that cannot lack them: what one layer has, all of them have."""
        expected = dict.fromkeys(self.modules)
        for ending in self.endings:
            if not any(module.endswith(ending) for module in self.modules):
                raise self.error(f"holds no weights for {ending!r}, one of its target modules")
        if self.pattern or any(part.isdigit() for ending in self.endings for part in ending.split(".")):
            return list(expected)  # single layers may have been chosen
        split = [match.groups() for m in self.modules if (match := re.fullmatch(r"(.+?)\.(\d{1,6})\.(.+)", m))]
        for stack in {before for before, _, _ in split}:
            layers = {int(index) for before, index, _ in split if before == stack}
            gap = min(set(range(len(layers) + 1)) - layers)
            layers |= {gap} if gap < max(layers) else set()
            names = dict.fromkeys(after for before, _, after in split if before == stack)
            expected |= dict.fromkeys(f"{stack}.{layer}.{name}" for layer in sorted(layers) for name in names)
        return list(expected)

    def _split(self, key: str) -> tuple[str, str] | None:
        """The module and the part that `key` names, None if it is another thing."""
        for part in self.parts:
            if key.startswith(_ROOT) and key.endswith("." + part):
                return key.removeprefix(_ROOT).removesuffix("." + part), part
        return None

    def _key(self, module: str, part: str) -> str:
        return f"{_ROOT}{module}.{part}"


class Bottleneck(AtModules):
    """``W(x + s*A(x))``, ``y + s*A(y)`` or ``Wx + b + s*A(x)``, with ``A(x) = f(x W_down) W_up`` (no biases)."""

    def __init__(self, folder: Path, settings: dict[str, Any], weights: "dict[str, torch.Tensor]") -> None:
        self.parts = {"adapter_down.weight": "bottleneck_down.weight", "adapter_up.weight": "bottleneck_up.weight"}
        if settings.get("scaling") == "learned":
            self.parts["adapter_scaling"] = "bottleneck_scale"
        self.parallel = bool(settings.get("use_parallel_adapter"))
        super().__init__(folder, settings, weights)
        self.config()  # raises for a setting that is not allowed

    def insertion(self, module: str) -> str:
        """Kind of the adapter at `module`: it goes before, after or parallel to it."""
        name = module.rpartition(".")[2]
        if self.parallel:
            return "parallel"
        if name not in POSITIONS:
            raise self.error(f"has a series adapter on {name!r}; the paper's code knows {', '.join(POSITIONS)}")
        return POSITIONS[name]

    def features(self, module: str) -> tuple[int, int]:
        """From W_down's columns and W_up's rows."""
        down, up = self.at_part(module, "adapter_down.weight"), self.at_part(module, "adapter_up.weight")
        return _size(down, -1), _size(up, 0)

    def shapes(self, module: str, taken: int, given: int) -> dict[str, tuple[int, ...]]:
        """W_down (size, features read), W_up (features written, size), and one number where the scaling is learned."""
        size = self.number("bottleneck_size")
        read, written = {"before": (taken, taken), "after": (given, given)}.get(self.insertion(module), (taken, given))
        shapes = {"adapter_down.weight": (size, read), "adapter_up.weight": (written, size), "adapter_scaling": (1,)}
        return {part: shapes[part] for part in self.parts}

    def check_fit(self, model: "nn.Module") -> None:
        """Also the family: only for those in `FAMILIES` does the paper's code know where a series adapter goes."""
        family = getattr(getattr(model, "config", None), "model_type", None)
        if not self.parallel and family not in FAMILIES:
            raise unknown("family for a series adapter of the paper's code", family, FAMILIES)
        super().check_fit(model)

    def config(self) -> "PeftConfig":
        """A `BottleneckConfig` that says for each target where the adapter goes."""
        from llm_adapters.bottleneck import BottleneckConfig

        targets = self.targets()
        return BottleneckConfig(
            insertion={target: self.insertion(target) for target in targets},
            bottleneck_size=self.number("bottleneck_size"),
            non_linearity=self.setting("non_linearity", "tanh", str),
            scaling=self.setting("scaling", 1.0, float, int, str),
            bottleneck_dropout=self.fraction("adapter_dropout"),
            init_weights="identity" if self.settings.get("init_weights") == "mam_adapter" else "paper",
            **self.common(),
        )

    def converted(self) -> "dict[str, torch.Tensor]":
        """The same tensors under PEFT's names."""
        return {self._key(m, new): self.at_part(m, old) for m in self.modules for old, new in self.parts.items()}


class Lora(AtModules):
    """LoRA; with `enable_lora` each enabled slice of the output rows has its own rank-r product.

    All slices share one ``A`` of k*r rows. ``B`` is a grouped convolution: its g groups of rows each see 1/g of ``A``'s
    rows, which is a block-diagonal matrix. Laid out over all output rows, zero where no slice is enabled, it is the B
    of an ordinary LoRA of rank k*r, and with alpha k times as large the scaling stays alpha / r.
    """

    biases: ClassVar[tuple[str, ...]] = ("all", "lora_only")

    def __init__(self, folder: Path, settings: dict[str, Any], weights: "dict[str, torch.Tensor]") -> None:
        self.parts = {part: part for part in ("lora_A.weight", "lora_B.weight")}
        self.enabled: list[bool] | None = settings.get("enable_lora")
        super().__init__(folder, settings, weights)
        self.config()  # raises for a setting that is not allowed

    def features(self, module: str) -> tuple[int, int]:
        """From A's columns and B's rows."""
        a, b = (self.at_part(module, part) for part in self.parts)
        count, slices = self.slices()
        return _size(a, -1), _size(b, 0) // count * slices

    def shapes(self, module: str, taken: int, given: int) -> dict[str, tuple[int, ...]]:
        """A (r, taken) and B (given, r), or with slices A (k*r, taken) and B (enabled rows, k*r / g, 1)."""
        r = self.number("r")
        if self.enabled is None:
            return {"lora_A.weight": (r, taken), "lora_B.weight": (given, r)}
        count, slices = self.slices()
        if given % slices:
            raise self.error(f"has {slices} slices in enable_lora, which do not divide the {given} rows of {module}")
        # The paper's code always makes two groups; the original of this layer makes one for each enabled slice.
        inner = self.at_part(module, "lora_B.weight").shape[1:2]
        groups = count if inner == (r,) else 2
        return {"lora_A.weight": (count * r, taken), "lora_B.weight": (given // slices * count, count * r // groups, 1)}

    def config(self) -> "PeftConfig":
        """A `LoraConfig` of rank k*r and alpha k*alpha (k is 1 without slices)."""
        from peft import LoraConfig

        count, _ = self.slices()
        alpha = self.setting("lora_alpha", None, int, float)
        if alpha is None:
            raise self.error(f"has no lora_alpha in {ADAPTER_CONFIG}: give the number that it was trained with")
        return LoraConfig(
            r=self.number("r") * count,
            lora_alpha=alpha * count,
            target_modules=self.targets(),
            lora_dropout=self.fraction("lora_dropout"),
            bias=self.settings["bias"] if self.bias_keys else "none",
            fan_in_fan_out=bool(self.settings.get("fan_in_fan_out")),
            **self.common(),
        )

    def converted(self) -> "dict[str, torch.Tensor]":
        """A and B for each module, and the biases that were trained."""
        result: dict[str, torch.Tensor] = {}
        for module in self.modules:
            a, b = (self.at_part(module, part) for part in self.parts)
            result |= {self._key(module, "lora_A.weight"): a, self._key(module, "lora_B.weight"): self._spread(a, b)}
        for key in self.bias_keys:
            module = key.removeprefix(_ROOT).removesuffix(".bias")
            result[self._key(module, "base_layer.bias") if module in self.modules else key] = self.weights[key]
        return result

    def slices(self) -> tuple[int, int]:
        """Number of slices of the output rows that have a product of their own, and of all slices."""
        if self.enabled is None:
            return 1, 1
        booleans = isinstance(self.enabled, list) and all(isinstance(e, bool) for e in self.enabled)
        if not booleans or not any(self.enabled):
            raise self.error(f"has enable_lora = {self.enabled!r}, where booleans are expected, and one of them true")
        return sum(self.enabled), len(self.enabled)

    def _spread(self, a: "torch.Tensor", b: "torch.Tensor") -> "torch.Tensor":
        """The grouped ``B`` (rows, rank / g, 1) as a matrix (all output rows, rank)."""
        import torch

        if self.enabled is None:
            return b
        rank = a.shape[0]
        blocks = torch.block_diag(*b.squeeze(-1).chunk(rank // b.shape[1]))
        count, slices = self.slices()
        result = blocks.new_zeros(slices, b.shape[0] // count, rank)
        result[torch.tensor(self.enabled)] = blocks.view(count, -1, rank)
        return result.view(-1, rank)


class Prefix(Checkpoint):
    """Keys and values of virtual tokens (Li & Liang 2021), saved after their projection if they had one."""

    def __init__(self, folder: Path, settings: dict[str, Any], weights: "dict[str, torch.Tensor]") -> None:
        super().__init__(folder, settings, weights)
        self.check_keys([_PROMPT] if _PROMPT not in weights else [], [key for key in weights if key != _PROMPT])
        size = 2 * self.number("num_layers") * self.number("token_dim")
        self.check_shape(_PROMPT, (self.number("num_virtual_tokens"), size))

    def check_fit(self, model: "nn.Module") -> None:
        """Compare with the keys and values that the model's attention works with."""
        from llm_adapters.architectures import text_config

        settings = text_config(model)
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        size = 2 * settings.num_hidden_layers * heads * head_dim
        where = f" on {type(model).__name__}"
        self.check_shape(_PROMPT, (self.number("num_virtual_tokens"), size), where)
        for name, wanted in (("num_layers", settings.num_hidden_layers), ("num_attention_heads", heads)):
            if self.number(name) != wanted:
                raise self.error(f"cannot be put{where}: {name} is {self.number(name)}, and {wanted} is needed")

    def config(self) -> "PeftConfig":
        """A `PrefixTuningConfig` without projection, as the result of one is what was saved."""
        from peft import PrefixTuningConfig

        names = ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads")
        return PrefixTuningConfig(
            num_transformer_submodules=1,
            encoder_hidden_size=self.setting("encoder_hidden_size", None, int),
            **{name: self.number(name) for name in names},
            **self.common(),
        )

    def converted(self) -> "dict[str, torch.Tensor]":
        """The keys and values as they are."""
        return self.weights


KINDS: dict[str, type[Checkpoint]] = {"BOTTLENECK": Bottleneck, "LORA": Lora, "PREFIX_TUNING": Prefix}


def _size(tensor: "torch.Tensor", dimension: int) -> int:
    return tensor.shape[dimension] if tensor.dim() else 0
