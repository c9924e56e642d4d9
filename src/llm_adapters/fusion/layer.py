"""The layer: one module of the base model with the fused adapters and the attention over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llm_adapters.bottleneck.layer import Bottlenecks
from llm_adapters.bottleneck.wrapper import Placement, Wrapper, source
from llm_adapters.fusion.config import FusionConfig


@dataclass(frozen=True)
class FusionPlacement:
    """One fusion at one module.

    Attributes:
        adapters: by their position in `FusionConfig.adapters`, the fused adapters that are placed at this module.
    """

    adapters: Mapping[str, Placement]

    @property
    def input_from(self) -> str:
        """Full name of another module whose input one of the adapters reads; empty where none does."""
        return next((at.input_from for at in self.adapters.values() if at.input_from), "")

    @property
    def features(self) -> int:
        """Number of features of the module's output."""
        return next(iter(self.adapters.values())).out_features

    def networks(self, config: FusionConfig) -> Bottlenecks:
        """The networks of this module's adapters, with weights that are still to be filled in."""
        networks = Bottlenecks()
        for index, placement in self.adapters.items():
            networks.add_network(index, placement, config.bottlenecks[int(index)])
        return networks


class FusionLayer(Wrapper):
    """Wraps a module and adds an attention-weighted sum of what the fused adapters would add.

    With x the module's output before any adapter and z_n the delta of the n-th adapter, computed as the adapter alone
    would (series: of x; parallel: of the sub-layer's input), per position::

        s = softmax_n(x W_q · z_n W_k),   out = x + sum_n s_n z_n W_v

    These are the equations of Pfeiffer et al. 2021 (AdapterFusion, arXiv 2005.00247), section 3.2, without biases or a
    scale, as there. W_q and W_k start at N(0, 0.02) and W_v at the identity (section 4.1, which adds noise of norm 1e-6
    to it), so that the start is a weighted mean of the adapters. Several active fusions add up.
    """

    adapter_layer_names = ("fusion_query", "fusion_key", "fusion_value")
    other_param_names = ("placements", "fusion_adapters")  # PEFT trains the former, and moves and deletes both
    merge_refused = (
        "a fusion of adapters cannot be merged: the weights of its adapters depend on the input. Keep it beside the "
        "base model (save_pretrained and PeftModel.from_pretrained)"
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.fusion_query = nn.ModuleDict()
        self.fusion_key = nn.ModuleDict()
        self.fusion_value = nn.ModuleDict()
        self.fusion_adapters = nn.ModuleDict()

    def update_layer(self, adapter_name: str, placement: FusionPlacement, config: FusionConfig) -> None:
        """Add the fusion `adapter_name` to this module.

        Args:
            adapter_name: PEFT's name of the fusion.
            placement: the adapters that it has here.
            config: its configuration. The adapters' weights are not numbers until `fill` or a checkpoint brings them.
        """
        for attribute in self.adapter_layer_names:
            getattr(self, attribute)[adapter_name] = nn.Linear(placement.features, placement.features, bias=False)
        self.fusion_adapters[adapter_name] = placement.networks(config)
        self.placements[adapter_name] = placement
        nn.init.normal_(self.fusion_query[adapter_name].weight, std=0.02)
        nn.init.normal_(self.fusion_key[adapter_name].weight, std=0.02)
        nn.init.eye_(self.fusion_value[adapter_name].weight)
        for parameter in self.fusion_adapters[adapter_name].parameters():
            nn.init.constant_(parameter, torch.nan)
        self.fusion_adapters[adapter_name].requires_grad_(False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def fill(self, adapter_name: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Give the fused adapters their weights, in the precision in which they were saved.

        Args:
            adapter_name: PEFT's name of the fusion.
            weights: the state dict of `FusionPlacement.networks`.
        """
        networks = self.fusion_adapters[adapter_name]
        device = next(networks.parameters()).device
        networks.load_state_dict({key: tensor.to(device) for key, tensor in weights.items()}, assign=True)
        networks.requires_grad_(False)

    def delta(self, adapter_name: str, *sources: torch.Tensor) -> torch.Tensor:
        """The weighted sum of one fusion's adapters.

        Args:
            adapter_name: PEFT's name of the fusion.
            sources: the module's output, then what each of the adapters reads, all (..., features).

        Returns:
            (..., features), in the precision of W_v.
        """
        networks = self.fusion_adapters[adapter_name]
        query, key, value = (getattr(self, attribute)[adapter_name] for attribute in self.adapter_layer_names)
        deltas = []
        for index, hidden in zip(self.placements[adapter_name].adapters, sources[1:], strict=True):
            h = self._cast_input_dtype(hidden, networks.bottleneck_down[index].weight.dtype)
            deltas.append(networks.network(index, h))
        z = torch.stack(deltas, -2).to(value.weight.dtype)  # (..., adapters, features)
        x = self._cast_input_dtype(sources[0], query.weight.dtype)
        # q · (z W_k) = (q W_k^T) · z and sum_n s_n (z_n W_v) = (sum_n s_n z_n) W_v: one product, however many adapters.
        scores = (z @ nn.functional.linear(query(x), key.weight.T).unsqueeze(-1)).squeeze(-1)
        weights = scores.softmax(-1)
        return value((weights.unsqueeze(-2).to(z.dtype) @ z).squeeze(-2))

    def change_output(
        self, names: Sequence[str], out: torch.Tensor, hidden: torch.Tensor, tapped: torch.Tensor | None
    ) -> torch.Tensor:
        """The module's output after the fusions, each of which reads the unchanged one."""
        changed = out
        for name in names:
            sources = [source(at, out, hidden, tapped) for at in self.placements[name].adapters.values()]
            changed = self.add(name, changed, out, *sources)
        return changed
