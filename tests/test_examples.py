"""The example is a loop that learns, and that computes with fast paths what it computes without."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import save_tiny, tiny_model, tiny_tokenizer

from llm_adapters import BottleneckConfig
from llm_adapters.fast_paths import FastPaths

FILE = Path(__file__).parents[1] / "examples" / "training_loop.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_loop", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), BottleneckConfig(insertion="series", bottleneck_size=16))


def test_it_learns_and_writes_an_adapter(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example.main(str(save_tiny(tmp_path / "base")), "12")
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("loss ")]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")


def test_fast_paths_change_rounding_alone(example: ModuleType) -> None:
    expected = example.train(model(), tiny_tokenizer(), 4)
    fast_model = model()
    with FastPaths(fast_model):
        found = example.train(fast_model, tiny_tokenizer(), 4)
    assert found == pytest.approx(expected, rel=1e-4)


def test_only_answers_are_labels(example: ModuleType) -> None:
    tokenizer = tiny_tokenizer()
    ids, labels = example.encode(tokenizer, "How many?", "Seven.")
    assert len(ids) == len(labels)
    learnt = [label for label in labels if label != example.IGNORED]
    assert tokenizer.decode(learnt) == "Seven.</s>"
    assert ids[-len(learnt) :] == learnt
