"""Base models and adapters: where they come from, how they are loaded, and whether they fit."""

from llm_adapters.models.loading import LoadedModel as LoadedModel
from llm_adapters.models.loading import context_length as context_length
from llm_adapters.models.loading import load as load
from llm_adapters.models.loading import load_base as load_base
from llm_adapters.models.loading import model_config as model_config
from llm_adapters.models.quantization import Quantization as Quantization
