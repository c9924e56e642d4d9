"""Fast paths for training and generation: the same mathematics with less work, turned on only where that is shown."""

from llm_adapters.acceleration.model import ON, Acceleration
from llm_adapters.acceleration.packing import Pack, common_prefix, split

__all__ = ["ON", "Acceleration", "Pack", "common_prefix", "split"]
