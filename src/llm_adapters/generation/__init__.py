"""Text generation: requests go in as token ids, finished answers come out, as many at a time as fit."""

from llm_adapters.generation.generator import Generation as Generation
from llm_adapters.generation.generator import Generator as Generator
from llm_adapters.generation.generator import generate as generate
