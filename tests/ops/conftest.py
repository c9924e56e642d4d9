import pytest
import torch
from op_helpers import PRECISIONS

from llm_adapters.ops import backends


@pytest.fixture(params=["backend", "reference"], autouse=True)
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds with the backend's functions, and with the plain torch references."""
    monkeypatch.setattr(backends, "disabled", request.param == "reference")
    return request.param


@pytest.fixture(params=PRECISIONS, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param
