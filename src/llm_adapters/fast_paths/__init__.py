"""Fast paths for training and generation: the same mathematics with less work, turned on only where that is shown."""

from llm_adapters.fast_paths.session import ON as ON
from llm_adapters.fast_paths.session import FastPaths as FastPaths
