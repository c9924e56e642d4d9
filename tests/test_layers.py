"""Imports point only down the layers (`tests/support/layers.py`), and nothing imports itself in a circle."""

from graphlib import CycleError, TopologicalSorter

import pytest
from layers import LAYERS, imports, modules

MODULES = modules()
IMPORTS = {name: set(imports(name, file, set(MODULES))) for name, file in MODULES.items()}
LIBRARIES = ("transformers", "peft")
LEVEL = {group: level for level, groups in enumerate(LAYERS) for group in groups}


def group_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_a_layer() -> None:
    assert {group_of(name) for name in MODULES} <= LEVEL.keys()


@pytest.mark.parametrize("group", [group for groups in LAYERS for group in groups])
def test_imports_point_down(group: str) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        for target in sorted(targets)
        if group_of(name) == group != group_of(target) and LEVEL.get(group_of(target), -1) <= LEVEL[group]
    ]
    assert not wrong


def test_ops_knows_neither_transformers_nor_peft() -> None:
    for name, file in MODULES.items():
        if group_of(name) == "ops":
            text = file.read_text(encoding="utf-8")
            assert not any(f"{verb} {library}" in text for verb in ("import", "from") for library in LIBRARIES), name


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
