"""Several adapters in one forward: each row of it is computed with its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llm_adapters.compat.peft import NO_ADAPTER


class Route:
    """The adapter of each row of the current forward; the layers look here.

    Args:
        names: the adapters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._known = torch.tensor([-1 if name == NO_ADAPTER else number for number, name in enumerate(names)])
        self._ids = self._known[:0]
        self._runs: list[tuple[int, slice]] | None = None

    def set(self, adapter_ids: torch.Tensor) -> None:
        """Set whose the rows of the next forward are: (rows,), int64, the index of each row's adapter in `names`."""
        self._ids, self._runs = self._known[adapter_ids.cpu()], None

    def get(self, rows: int) -> torch.Tensor:
        """Return what was set, (rows,), with -1 for `NO_ADAPTER`.

        Raises:
            RuntimeError: it was set for another number of rows.
        """
        if len(self._ids) != rows:
            raise RuntimeError(f"adapters were set for {len(self._ids)} rows, and there are {rows}")
        return self._ids

    def runs(self, rows: int) -> list[tuple[int, slice]]:
        """Return the same as neighbouring rows of one adapter, those of `NO_ADAPTER` left out."""
        ids = self.get(rows)
        if self._runs is None:
            values, counts = ids.unique_consecutive(return_counts=True)
            ends = counts.cumsum(0).tolist()
            spans = zip(values.tolist(), counts.tolist(), ends, strict=True)
            self._runs = [(value, slice(end - count, end)) for value, count, end in spans if value >= 0]
        return self._runs


def prompt_learning(model: Any) -> Any:
    """Return the active adapter's config, if it puts learned tokens before the sequence and is enabled; else None."""
    config = getattr(model, "active_peft_config", None)
    return config if config is not None and config.is_prompt_learning and model.has_active_enabled_adapter else None


def is_prefix_tuning(model: Any) -> bool:
    """Tell whether the active adapter is PEFT's prefix tuning, whose keys and values a cache can hold."""
    config = prompt_learning(model)
    return config is not None and config.peft_type.value == "PREFIX_TUNING"


@contextlib.contextmanager
def using(model: Any, name: str) -> Iterator[None]:
    """Activate the adapter `name` alone, or none; afterwards the active ones are as before."""
    if name == NO_ADAPTER:
        with model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext():
            yield
        return
    before, trained = list(model.active_adapters), [p for p in model.parameters() if p.requires_grad]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before[0])
        if len(before) > 1:
            model.base_model.set_adapter(before)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
