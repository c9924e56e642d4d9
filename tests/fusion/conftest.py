from collections.abc import Callable

import pytest
import torch
from bottleneck_helpers import adapted
from fusion_helpers import SOURCES
from peft import PeftModel


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, PeftModel]]:
    """For a family, the models with the three adapters; each is also saved, in `model.folder`."""
    made: dict[str, dict[str, PeftModel]] = {}

    def get(family: str) -> dict[str, PeftModel]:
        if family not in made:
            made[family] = {}
            for name, options in SOURCES.items():
                model = adapted(family, "series", **options)
                model.folder = str(tmp_path_factory.mktemp(f"{family}-{name}"))
                model.save_pretrained(model.folder)
                made[family][name] = model
        return made[family]

    return get
