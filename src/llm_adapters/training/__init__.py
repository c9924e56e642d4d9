"""Fine-tuning: the recipe, the batches, the loss, and the run folder.

For a loop or a Trainer of one's own: `FastPaths` makes a model fast, `Collator` cuts examples into micro-batches. The
names below are imported when they are first used: the command line explains a recipe's keys without loading torch.
"""

from typing import TYPE_CHECKING

from llm_adapters._lazy import lazy

if TYPE_CHECKING:
    from llm_adapters.errors import Interrupted as Interrupted
    from llm_adapters.fast_paths import FastPaths as FastPaths
    from llm_adapters.training.collator import Collator as Collator
    from llm_adapters.training.recipe import Recipe as Recipe
    from llm_adapters.training.recipe import load_recipe as load_recipe
    from llm_adapters.training.run import Run as Run
    from llm_adapters.training.run import finished_run as finished_run
    from llm_adapters.training.run import train as train

_PUBLIC = {
    "Collator": "llm_adapters.training.collator",
    "FastPaths": "llm_adapters.fast_paths",
    "Interrupted": "llm_adapters.errors",
    "Recipe": "llm_adapters.training.recipe",
    "Run": "llm_adapters.training.run",
    "finished_run": "llm_adapters.training.run",
    "load_recipe": "llm_adapters.training.recipe",
    "train": "llm_adapters.training.run",
}

__all__ = ["Collator", "FastPaths", "Interrupted", "Recipe", "Run", "finished_run", "load_recipe", "train"]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)
