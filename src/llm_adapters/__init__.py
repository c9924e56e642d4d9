"""LLM-Adapters: series, parallel and LoRA adapters for frozen language models, trained fast and measured right.

Importing the package registers the bottleneck method with PEFT, so that ``PeftModel.from_pretrained`` loads it. The
names below are imported when they are first used: the command line answers ``--help`` without loading torch.
"""

from typing import TYPE_CHECKING

from llm_adapters._lazy import lazy
from llm_adapters._registration import register_with_peft
from llm_adapters._version import __version__

if TYPE_CHECKING:
    from llm_adapters.api import train as train
    from llm_adapters.bottleneck import BottleneckConfig as BottleneckConfig
    from llm_adapters.evaluation import evaluate as evaluate
    from llm_adapters.fusion import FusionConfig as FusionConfig
    from llm_adapters.models import load as load
    from llm_adapters.training import Recipe as Recipe

_PUBLIC = {
    "BottleneckConfig": "llm_adapters.bottleneck",
    "FusionConfig": "llm_adapters.fusion",
    "Recipe": "llm_adapters.training",
    "evaluate": "llm_adapters.evaluation",
    "load": "llm_adapters.models",
    "train": "llm_adapters.api",
}

__all__ = ["BottleneckConfig", "FusionConfig", "Recipe", "__version__", "evaluate", "load", "train"]


__getattr__, __dir__ = lazy(__name__, _PUBLIC)
register_with_peft()
