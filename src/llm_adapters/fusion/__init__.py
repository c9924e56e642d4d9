"""A learned attention over trained, frozen bottleneck adapters, as a PEFT method: `FUSION`."""

import peft  # noqa: F401  as in `llm_adapters.bottleneck`

from llm_adapters.fusion.config import FusionConfig, FusionType
from llm_adapters.fusion.layer import FusionLayer
from llm_adapters.fusion.model import FusionModel

__all__ = ["FusionConfig", "FusionLayer", "FusionModel", "FusionType"]
