"""Adds a method to PEFT's tables."""

import enum

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register_method(key: enum.Enum, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Make a method known to PEFT; calling it again changes nothing.

    PEFT's own `register_peft_method` refuses every name outside its closed enum, so this fills the same three tables,
    after the same checks that the name and the prefix are free.

    Args:
        key: the method's name, a `str` enumeration (PEFT compares it with strings, transformers asks for `.value`).
        config: its configuration.
        tuner: its tuner, which has the prefix.

    Raises:
        KeyError: another package has taken the name or the prefix.
    """
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(key) is config:
        return
    if key in PEFT_TYPE_TO_CONFIG_MAPPING or key in PEFT_TYPE_TO_TUNER_MAPPING:
        raise KeyError(f"there is already a PEFT method called {key.value!r}")
    if tuner.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise KeyError(f"there is already a PEFT method with the prefix {tuner.prefix!r}")
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
