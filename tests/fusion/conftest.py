import sys
from pathlib import Path

import pytest
import torch

# the hand-written blocks of each family, and the variants of bottleneck adapters, are those of the bottleneck's tests
sys.path.insert(0, str(Path(__file__).parents[1] / "bottleneck_method"))


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
