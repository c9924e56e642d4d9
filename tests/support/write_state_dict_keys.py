"""Writes `tests/bottleneck/state_dict_keys.json`: keys and shapes of a checkpoint, by method and family.

    python tests/support/write_state_dict_keys.py

Run it for a new family. A change of what is in the file already means that checkpoints of today no longer load.
"""

import json
from pathlib import Path

from bottleneck_helpers import METHODS, config_of, fresh
from peft import get_peft_model, get_peft_model_state_dict
from tiny import FAMILIES

FILE = Path(__file__).parents[1] / "bottleneck" / "state_dict_keys.json"


def keys(method: str, family: str) -> dict[str, list[int]]:
    """Shape of each tensor of a checkpoint with an adapter in the first layer, by its key."""
    model = get_peft_model(fresh(family), config_of(method, family, layers=[0]))
    return {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}


def text() -> str:
    """Content of the file: a line for each tensor."""
    methods = []
    for method in METHODS:
        families = []
        for family in FAMILIES:
            tensors = [f"      {json.dumps(key)}: {json.dumps(shape)}" for key, shape in keys(method, family).items()]
            families.append(f"    {json.dumps(family)}: {{\n" + ",\n".join(tensors) + "\n    }")
        methods.append(f"  {json.dumps(method)}: {{\n" + ",\n".join(families) + "\n  }")
    return "{\n" + ",\n".join(methods) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
