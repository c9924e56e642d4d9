"""Several adapters in one forward: each row of it is computed with its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

NO_ADAPTER = "__base__"  # PEFT's name for it


class Route:
    """Which rows of the forward that is going on are of which adapter; the layers look here.

    Args:
        names: the adapters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._known = torch.tensor([-1 if name == NO_ADAPTER else number for number, name in enumerate(names)])
        self._which = self._known[:0]
        self._runs: list[tuple[int, slice]] | None = None

    def tell(self, which: torch.Tensor) -> None:
        """Say whose the rows of the next forward are: (rows,), int64, the place of each row's adapter among `names`."""
        self._which, self._runs = self._known[which.cpu()], None

    def of(self, rows: int) -> torch.Tensor:
        """What was told, (rows,), with -1 for `NO_ADAPTER`."""
        if len(self._which) != rows:
            raise RuntimeError(f"adapters were told for {len(self._which)} rows, and there are {rows}")
        return self._which

    def runs(self, rows: int) -> list[tuple[int, slice]]:
        """The same as neighbouring rows of one adapter; those of `NO_ADAPTER` are left out."""
        which = self.of(rows)
        if self._runs is None:
            values, counts = which.unique_consecutive(return_counts=True)
            ends = counts.cumsum(0).tolist()
            spans = zip(values.tolist(), counts.tolist(), ends, strict=True)
            self._runs = [(value, slice(end - count, end)) for value, count, end in spans if value >= 0]
        return self._runs


def prompt_learning(model: Any) -> Any:
    """The active adapter's config where that puts learned tokens before the sequence and is not disabled; else None."""
    config = getattr(model, "active_peft_config", None)
    return config if config is not None and config.is_prompt_learning and model.has_active_enabled_adapter else None


@contextlib.contextmanager
def using(model: Any, name: str) -> Iterator[None]:
    """With the adapter `name` alone, or with none; afterwards as it was."""
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
