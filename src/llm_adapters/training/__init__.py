"""Fine-tuning: the recipe, the batches, the loss, and the run folder.

For a loop or a Trainer of one's own: `Acceleration` makes a model fast, `Collator` cuts examples into micro-batches.
"""

from llm_adapters.acceleration import Acceleration
from llm_adapters.training.batching import Collator
from llm_adapters.training.recipe import Recipe, load_recipe
from llm_adapters.training.run import Interrupted, Run, train

__all__ = ["Acceleration", "Collator", "Interrupted", "Recipe", "Run", "load_recipe", "train"]
