"""Fixtures of the tests that run models: with the backend's functions and with the references, in one thread."""

from collections.abc import Iterator

import pytest
import torch

from llm_adapters.ops import backends


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and lose much where other work runs beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["kernels", "torch"])
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds with the compiled functions, and with torch's in their place."""
    monkeypatch.setattr(backends, "disabled", request.param == "torch")
    return request.param
