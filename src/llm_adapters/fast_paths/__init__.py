"""Fast paths for training and generation: the same mathematics with less work, turned on only where that is shown."""

from llm_adapters.fast_paths.session import ON, FastPaths
from llm_adapters.ops.packing import Pack, common_prefix, make_packs

__all__ = ["ON", "FastPaths", "Pack", "common_prefix", "make_packs"]
