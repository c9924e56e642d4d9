"""Fixtures of all tests: folders of outside data, a cache of their own, one precision."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from capabilities import pytest_addoption, pytest_configure  # noqa: F401 -- hooks of pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny tensors gain nothing from a second thread, and threads that wait for each other on a busy machine lose a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton's functions run in its interpreter where there is no GPU; it asks once, when the first test imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# hypothesis would fail an example that takes more than 0.2 s, as any does on a busy machine.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

SHARED = Path(os.environ.get("LLM_ADAPTERS_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("needs the data mirror beside the checkout (shared/data)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("needs the golden files beside the checkout (shared/golden)")
    return folder


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache, and none sees a mirror it did not ask for."""
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("LLM_ADAPTERS_MIRROR", raising=False)


@pytest.fixture(autouse=True)
def same_precision_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype: auto` is float32 in every test, on hardware that multiplies bfloat16 too: results can be compared."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)
