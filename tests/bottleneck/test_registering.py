"""`import llm_adapters` makes PEFT know the method, whenever PEFT is imported, and imports nothing heavy itself."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import llm_adapters
from llm_adapters._registration import OWN_METHODS, OwnMethod, register_own_methods
from llm_adapters.bottleneck import BottleneckConfig, BottleneckModel, BottleneckType

SOURCES = Path(llm_adapters.__file__).parents[1]
KNOWN = "print('BOTTLENECK' in __import__('peft').PEFT_TYPE_TO_CONFIG_MAPPING)"


def output(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCES)
    return done.stdout.strip()


def test_imports_neither_torch_nor_peft() -> None:
    heavy = ["torch", "peft", "transformers", "datasets", "numpy"]
    assert output(f"import sys, llm_adapters; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_registers_when_peft_comes_later() -> None:
    assert output(f"import llm_adapters, peft; {KNOWN}") == "True"


def test_registers_when_peft_came_before() -> None:
    assert output(f"import peft, llm_adapters; {KNOWN}") == "True"


def test_looking_for_peft_is_not_importing_it() -> None:
    """transformers asks whether PEFT is installed before anyone imports it."""
    look = "import importlib.util as u; u.find_spec('peft'); u.find_spec('peft')"
    assert output(f"import llm_adapters; {look}; {KNOWN}") == "True"


def test_registering_again_changes_nothing() -> None:
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(table) for table in tables]
    register_own_methods()
    assert [dict(table) for table in tables] == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BOTTLENECK"] is BottleneckConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"] is BottleneckModel


@pytest.mark.parametrize("taken", ["name", "tuner", "prefix"])
def test_a_name_or_prefix_of_another_package_is_not_overwritten(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = BottleneckType.BOTTLENECK
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, key)
    if taken != "tuner":
        monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, key)
    if taken == "name":
        monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, key, object)
    if taken != "prefix":
        monkeypatch.delitem(PEFT_TYPE_TO_PREFIX_MAPPING, key)
    message = "prefix 'bottleneck_'" if taken == "prefix" else "method called 'BOTTLENECK'"
    with pytest.raises(KeyError, match=message):
        register_own_methods()


@pytest.mark.parametrize("first", ["llm_adapters.bottleneck.model", "llm_adapters.fusion.config", "peft"])
def test_whatever_is_imported_first(first: str) -> None:
    code = f"import llm_adapters, {first}; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; "
    code += "assert {'BOTTLENECK', 'FUSION'} <= {key.value for key in known}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", OWN_METHODS, ids=lambda method: method.peft_type)
def test_the_rows_of_own_methods_say_what_their_tuners_say(method: OwnMethod) -> None:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[method.peft_type]
    assert (tuner.__module__, tuner.__name__) == (method.module, method.tuner)
    assert tuner.prefix == PEFT_TYPE_TO_PREFIX_MAPPING[method.peft_type] == method.prefix
    assert tuner.key.value == method.peft_type
