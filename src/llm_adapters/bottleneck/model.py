"""The tuner: finds the target modules in a model and wraps them with bottleneck layers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from llm_adapters.bottleneck import checks
from llm_adapters.bottleneck.config import BottleneckConfig, BottleneckType
from llm_adapters.bottleneck.layer import BottleneckLayer
from llm_adapters.bottleneck.placement import placements
from llm_adapters.bottleneck.wrapper import Wrapper, install_tap, move_taps, remove_unused
from llm_adapters.compat.peft import routed_module_copies
from llm_adapters.compat.transformers import forget_adapters
from llm_adapters.errors import RequestError

# Adapters whose weights are still to come from a file, and can turn out not to fit: by model and adapter name, the ids
# of the parameters that were trained before. No attribute of the tuner, as transformers' `load_adapter` keeps none.
_pending: WeakKeyDictionary[nn.Module, dict[str, set[int]]] = WeakKeyDictionary()


class BottleneckModel(BaseTuner):
    """Series and parallel adapters as a PEFT tuner (see `BottleneckConfig` for what they are).

    Args:
        model: a transformers decoder.
        config: the `BottleneckConfig`, or a mapping from adapter name to one.
        adapter_name: PEFT's name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, for a checkpoint that follows.
    """

    key: Any = BottleneckType.BOTTLENECK
    config_class: type[PeftConfig] = BottleneckConfig
    prefix = "bottleneck_"
    tuner_layer_cls: type[Wrapper] = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  the architecture rows say where
    _placements: dict[str, Any] = {}  # noqa: RUF012  replaced while an adapter is injected

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward; `adapter_names` arrives here only for MPT, whose routing PEFT leaves out."""
        if adapter_names is None:
            _pending.pop(self.model, None)
            return self.model(*args, **kwargs)
        with self._enable_peft_forward_hooks(*args, adapter_names=adapter_names, **kwargs):
            return self.model(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter, or leave the model as it was and say in one sentence why not."""
        config = self.peft_config[adapter_name]
        targets = config.target_modules
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        try:
            checks.check_adapter_name(model, adapter_name)
            remove_unused(model)
            self._placements = self._find(model, config)
            checks.check_modules_to_save(model, config, self._placements)
            checks.check_keys(kwargs.get("state_dict"), self.prefix, self._placements)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            _take_out(model, self.peft_config, adapter_name, trained)
            raise
        finally:
            config.target_modules = targets  # PEFT shortens a long list, which would no longer match `insertion`
            self._placements = {}
        if config.inference_mode or config.from_folder:
            _pending.setdefault(model, {})[adapter_name] = trained

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Match a checkpoint's tensors with the model's, all of them: PEFT alone would leave the rest as they are."""
        result = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        trained = _pending.get(base, {}).pop(adapter_name, None)
        try:
            checks.check_checkpoint(model, adapter_name, result)
        except RequestError:
            if trained is not None:
                _take_out(base, model.peft_config, adapter_name, trained)
            raise
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was the only active one, the first of the others becomes active everywhere."""
        active = self.active_adapters
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")  # once per layer
            super().delete_adapter(adapter_name)
        remove_unused(self.model)
        left = [name for name in active if name != adapter_name] or sorted(self.peft_config)[:1]
        if adapter_name in active and left:  # PEFT asks the first layer alone, which may have had no other adapter
            self.set_adapter(left)

    def _find(self, model: nn.Module, config: Any) -> dict[str, Any]:
        """Placement of the adapter by the module's full name, as the layer's `update_layer` takes it."""
        return placements(model, config)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        # Outside of an injection, PEFT asks it to show what matches.
        return key in (self._placements or self._find(self.model, peft_config))

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, self.tuner_layer_cls) else self.tuner_layer_cls(target)
        here = self._placements[current_key]
        layer.update_layer(adapter_name, here, peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an adapter added beside the active one is not trained
            self._replace_module(parent, target_name, layer, target)
            move_taps(target, layer)
        if here.input_from:
            install_tap(self.model.get_submodule(here.input_from), layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight` and `bias`, which a block does not have; `update_layer` has already moved the
        # adapter to the device of what it wraps.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise RequestError(self.tuner_layer_cls.merge_refused)

    def unload(self) -> nn.Module:
        """Take every adapter out and return the base model as it was, with its own `modules_to_save`."""
        _unwrap_copies(self.model, every=True)  # PEFT would leave the active adapter's copies in
        model = super().unload()
        remove_unused(model)
        return model

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones (series: applied in that order; parallel: summed)."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name in names:
            if name not in self.peft_config:
                raise RequestError(f"no adapter {name!r}: the model has {checks.listed(self.peft_config)}")
        super().set_adapter(adapter_name, inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route each sequence of a batch through the adapter that `adapter_names` gives it, for one call."""
        _pending.pop(self.model, None)  # an adapter that runs is not one whose weights are still to come
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        checks.check_adapter_names(names, self.peft_config, self.training)
        handles = []
        inputs = next((kwargs[k] for k in ("input_ids", "inputs", "inputs_embeds") if kwargs.get(k) is not None), None)
        if inputs is None and args:
            inputs = args[0]
        if inputs is not None:  # `generate`, which may multiply the rows by its beams later on
            checks.check_batch(names, inputs.shape[0])
        else:  # `forward`, whose inputs PEFT doesn't show here
            handles.append(self.model.register_forward_pre_hook(partial(checks.check_forward, names), with_kwargs=True))
        layers = [m for m in self.model.modules() if isinstance(m, Wrapper)]
        try:
            for layer in layers:
                layer.routing = tuple(names)
            with routed_module_copies(self.model, names):
                yield
        finally:
            for layer in layers:
                layer.routing = None
                layer.tapped = None
            for handle in handles:
                handle.remove()


def _take_out(model: nn.Module, configs: dict[str, PeftConfig], adapter_name: str, trained: set[int]) -> None:
    """Take an adapter out of `model` and of `configs`; the parameters with an id in `trained` are trained again."""
    configs.pop(adapter_name, None)
    if not configs:
        forget_adapters(model)
    for module in model.modules():
        if isinstance(module, Wrapper):
            module.discard(adapter_name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, [name for name in module.active_adapters if name != adapter_name])
    _unwrap_copies(model, every=not configs)
    remove_unused(model)
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained


def _unwrap_copies(model: nn.Module, every: bool) -> None:
    """Put back the modules that `modules_to_save` copied: every one, or those that no adapter has a copy of."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and (every or not module.modules_to_save):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)
