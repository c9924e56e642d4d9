"""WHAT we add to PEFT: series and parallel adapters as one method, `BOTTLENECK`."""

import peft  # noqa: F401  loading it registers our methods, which must not happen with a module of ours half loaded

from llm_adapters.bottleneck.config import BottleneckConfig, BottleneckType
from llm_adapters.bottleneck.layer import BottleneckLayer
from llm_adapters.bottleneck.model import BottleneckModel
from llm_adapters.bottleneck.places import plan
from llm_adapters.bottleneck.registering import register_method

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel", "BottleneckType", "plan", "register"]


def register() -> None:
    """Make the method known to PEFT; calling it again changes nothing (see `register_method`)."""
    register_method(BottleneckType.BOTTLENECK, BottleneckConfig, BottleneckModel)


register()
