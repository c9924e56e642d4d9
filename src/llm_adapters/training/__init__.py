"""Fine-tuning: the recipe, the batches, the loss, and the run folder.

For a loop or a Trainer of one's own: `Acceleration` makes a model fast, `Collator` cuts examples into micro-batches.
"""

from typing import TYPE_CHECKING, Any

from llm_adapters.training.batching import Collator
from llm_adapters.training.recipe import Recipe, load_recipe
from llm_adapters.training.run import Interrupted, Run, train

if TYPE_CHECKING:
    from llm_adapters.acceleration import Acceleration as Acceleration

__all__ = ["Acceleration", "Collator", "Interrupted", "Recipe", "Run", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    if name == "Acceleration":  # it loads torch, which a wrong recipe need not wait for
        from llm_adapters.acceleration import Acceleration

        return Acceleration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
