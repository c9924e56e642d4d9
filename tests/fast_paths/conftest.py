import pytest
from backend_fixtures import functions, one_thread  # noqa: F401 -- fixtures


@pytest.fixture(autouse=True)
def both_ways(functions: str) -> str:  # noqa: F811
    """Every test here runs with the compiled functions and without."""
    return functions
