"""Fine-tuning: the recipe, the batches, the loss, and the run folder.

For a loop or a Trainer of one's own: `FastPaths` makes a model fast, `Collator` divides examples into micro-batches.
"""

from llm_adapters.errors import Interrupted
from llm_adapters.fast_paths import FastPaths
from llm_adapters.training.collator import Collator
from llm_adapters.training.recipe import Recipe, load_recipe
from llm_adapters.training.run import Run, train

__all__ = ["Collator", "FastPaths", "Interrupted", "Recipe", "Run", "load_recipe", "train"]
