import pytest

from llm_adapters.ops import backends


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds with the compiled functions, and with torch's in their place."""
    monkeypatch.setattr(backends, "disabled", request.param == "torch")
    return request.param
