"""The command line: one typed function per verb; its signature and docstring are the options and the help."""

from llm_adapters.cli.verbs import VERBS as VERBS
from llm_adapters.cli.verbs import main as main
