"""The layer: one module of the base model with the bottleneck adapters around it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from llm_adapters.bottleneck import prefix
from llm_adapters.bottleneck.config import INSERT_AFTER, INSERT_BEFORE, INSERT_PARALLEL, BottleneckConfig
from llm_adapters.bottleneck.wrapper import Placement, Wrapper, source


class Bottlenecks(nn.Module):
    """Bottleneck networks by name, each ``s * f(dropout(h) W_down) W_up``."""

    def __init__(self, *args: nn.Module) -> None:
        super().__init__(*args)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_scale = nn.ParameterDict()
        self.options: dict[str, BottleneckConfig] = {}
        self.activations: dict[str, nn.Module] = {}

    def add_network(self, name: str, placement: Placement, config: BottleneckConfig) -> None:
        """Add a network with its initial weights, as wide as `placement` says."""
        self.bottleneck_down[name] = nn.Linear(placement.in_features, config.bottleneck_size, bias=config.use_bias)
        self.bottleneck_up[name] = nn.Linear(config.bottleneck_size, placement.out_features, bias=config.use_bias)
        if config.scaling == "learned":
            self.bottleneck_scale[name] = nn.Parameter(torch.ones(1))
        self.options[name] = config
        self.activations[name] = ACT2FN[config.non_linearity]
        self.reset_parameters(name)

    def reset_parameters(self, name: str) -> None:
        """Give the network its initial weights (`BottleneckConfig.init_weights`)."""
        down, up, start = self.bottleneck_down[name], self.bottleneck_up[name], self.options[name].init_weights
        if start == "paper":
            nn.init.normal_(down.weight, std=0.02)
            nn.init.normal_(up.weight, std=0.02)
        elif start == "identity":
            nn.init.zeros_(up.weight)  # W_down keeps torch's own start, which no gradient reaches until W_up moves
        for projection in (down, up):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def network(self, name: str, h: torch.Tensor) -> torch.Tensor:
        """The scaled delta ``s * f(dropout(h) W_down) W_up``.

        Args:
            name: the network's name.
            h: (..., in_features), in the network's own precision.

        Returns:
            (..., out_features), likewise.
        """
        config = self.options[name]
        h = nn.functional.dropout(h, config.bottleneck_dropout, self.training)
        out = self.bottleneck_up[name](self.activations[name](self.bottleneck_down[name](h)))
        scale = self.bottleneck_scale[name] if config.scaling == "learned" else config.scaling
        return out if isinstance(scale, float) and scale == 1.0 else out * scale


class BottleneckLayer(Bottlenecks, Wrapper):
    """Wraps a module and adds the active adapters' deltas.

    With h the module's input and W the module, the output is ``y = W(h + sum of the 'before' deltas)``, then each
    series adapter in the order of activation, ``y <- y + s * delta(y)``, then the sum of the parallel deltas,
    ``y <- y + s * delta(h)``. Each network is ``delta(h) = f(dropout(h) W_down) W_up``, computed in the adapter's own
    precision and cast to that of the stream it is added to.

    A prefix, (2, num_key_value_heads, prefix_length, head_dim), is further keys and values of an attention block, which
    every token sees, as if all were at the tokens' own start (Li and Liang 2021; He et al. 2022, eq. 5).
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_scale", "bottleneck_prefix")
    other_param_names = ("placements", "options", "activations")
    merge_refused = (
        "a bottleneck adapter cannot be merged: its non-linearity has no equal among the base model's weights. Keep it "
        "beside the base model (save_pretrained and PeftModel.from_pretrained), or train LoRA, which can be merged"
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottleneck_prefix = nn.ParameterDict()

    def update_layer(self, adapter_name: str, placement: Placement, config: BottleneckConfig) -> None:
        """Add the adapter `adapter_name` to this module.

        Args:
            adapter_name: PEFT's name of the adapter.
            placement: its insertion and sizes here.
            config: its hyper-parameters.
        """
        if placement.insertion:
            self.add_network(adapter_name, placement, config)
        if placement.prefix is not None:
            heads, head_dim = placement.prefix
            self.bottleneck_prefix[adapter_name] = nn.Parameter(torch.empty(2, heads, config.prefix_length, head_dim))
            nn.init.normal_(self.bottleneck_prefix[adapter_name], std=0.02)
        self.placements[adapter_name] = placement
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delta(self, adapter_name: str, *sources: torch.Tensor) -> torch.Tensor:
        """The scaled delta of one adapter, in the adapter's own precision.

        Args:
            adapter_name: PEFT's name of the adapter.
            sources: what it reads, one tensor (..., placement.in_features) of any precision.

        Returns:
            (..., placement.out_features).
        """
        (hidden,) = sources
        return self.network(
            adapter_name, self._cast_input_dtype(hidden, self.bottleneck_down[adapter_name].weight.dtype)
        )

    def change_call(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The module's arguments with the adapters' prefixes in its cache and mask."""
        names = [name for name in names if name in self.bottleneck_prefix]
        if not names:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        seen = [None if self.routing is None else self.routed(name, hidden) for name in names]
        prefixes = [self.bottleneck_prefix[name] for name in names]
        return prefix.prepend(self.base_layer, args, kwargs, list(zip(prefixes, seen, strict=True)))

    def change_input(self, names: Sequence[str], hidden: torch.Tensor) -> torch.Tensor:
        """The module's input after the ``before`` adapters, each of which reads the unchanged one."""
        changed = hidden
        for name in self._with(names, INSERT_BEFORE):
            changed = self.add(name, changed, hidden)
        return changed

    def change_output(
        self, names: Sequence[str], out: torch.Tensor, hidden: torch.Tensor, tapped: torch.Tensor | None
    ) -> torch.Tensor:
        """The module's output after the series adapters, one after the other, and the parallel ones."""
        for name in (*self._with(names, INSERT_AFTER), *self._with(names, INSERT_PARALLEL)):
            out = self.add(name, out, source(self.placements[name], out, hidden, tapped))
        return out

    def _with(self, names: Sequence[str], insertion: str) -> list[str]:
        return [name for name in names if self.placements[name].insertion == insertion]
