"""WHAT is added to PEFT: series and parallel adapters as one method, `BOTTLENECK`."""

import peft  # noqa: F401  loading it registers our methods, which must not happen with a module of ours half loaded

from llm_adapters.bottleneck.config import BottleneckConfig, BottleneckType
from llm_adapters.bottleneck.layer import BottleneckLayer
from llm_adapters.bottleneck.model import BottleneckModel
from llm_adapters.bottleneck.placement import placements

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel", "BottleneckType", "placements"]
