"""Memory that is used up in training: the step is done again in smaller micro-batches, remembered and replayed."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny

from llm_adapters.errors import WorkError
from llm_adapters.fast_paths import FastPaths
from llm_adapters.training import Interrupted, train
from llm_adapters.training.memory import is_out_of_memory
from llm_adapters.training.trainer import AdapterTrainer, Recorder

TOKENS = 600  # of a micro-batch at first: three or four of the examples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


def recipe(model: Path, **training: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "adapter": {"method": "lora", "options": {"r": 4, "lora_dropout": 0.1}},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 52, "validation": 4, "max_length": 256},
        "training": {
            "epochs": 1,
            "batch_size": 8,
            "micro_batch_tokens": TOKENS,
            "learning_rate": 1e-2,
            "log_every": 1,
            "save_every": 1,
        }
        | training,
    }


class Card:
    """A device whose memory holds `room` tokens in training; less from the step `shrinks_at` on.

    Attributes:
        sizes: tokens of every micro-batch that was computed to its end, by step.
        refused: steps at which one did not fit; 0 for the validation split.
    """

    def __init__(self, patch: pytest.MonkeyPatch, room: int, at: int = 1, where: str = "forward") -> None:
        self.room, self.at, self.where = room, at, where
        self.sizes: dict[int, list[int]] = {}
        self.refused: list[int] = []
        card, step = self, AdapterTrainer.training_step
        self.step = 0

        def training_step(trainer: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            card.step = trainer.state.global_step + 1
            try:
                return step(trainer, *args, **kwargs)
            finally:
                card.step = 0

        patch.setattr(AdapterTrainer, "training_step", training_step)
        from llm_adapters.fast_paths import session

        own = session.causal_forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if "targets" not in kwargs:
                return own(*args, **kwargs)
            tokens = kwargs["pack"].end
            full = tokens > card.room and (card.where == "evaluation") == (card.step == 0) and card.step >= card.at
            if full and card.where != "backward":
                card.fail()
            found = own(*args, **kwargs)
            if full:
                found["loss"].register_hook(lambda gradient: card.fail())
            else:
                card.sizes.setdefault(card.step, []).append(tokens)
            return found

        patch.setattr(session, "causal_forward", forward)

    def fail(self) -> None:
        self.refused.append(self.step)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def weights(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(weights(one)[name], weight) for name, weight in weights(two).items())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_is_done_again_as_if_it_had_been_smaller_from_its_start(
    where: str, model: Path, patch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(recipe(model), tmp_path / "whole", progress=False)
    card = Card(patch, room=300, at=3, where=where)
    halved = train(recipe(model), tmp_path / "halved", progress=False)
    assert card.refused == [3]
    assert max(card.sizes[2]) > 300 >= max(max(card.sizes[step]) for step in (3, 4, 5, 6))
    assert halved.manifest["micro_batch_tokens"] == {"start": TOKENS, "halvings": [{"step": 3, "tokens": 300}]}
    assert json.loads((halved.folder / "sizes.json").read_text()) == halved.manifest["micro_batch_tokens"]
    (told,) = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert "at step 3" in told
    assert "at most 300" in told
    # Dropout's masks are drawn anew for each micro-batch, so that the steps from 3 on are others.
    losses = [[line["loss"] for line in run.log if "loss" in line] for run in (whole, halved)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_without_dropout_the_result_is_the_same_up_to_rounding(
    where: str, model: Path, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = recipe(model)
    plain["adapter"]["options"] = {"r": 4, "lora_dropout": 0.0}
    whole = train(plain, tmp_path / "whole", progress=False)
    card = Card(patch, room=160, at=2, where=where)  # not even half fits: it is halved twice
    halved = train(plain, tmp_path / "halved", progress=False)
    assert card.refused == [2, 2]
    assert halved.manifest["micro_batch_tokens"]["halvings"] == [{"step": 2, "tokens": n} for n in (300, 150)]
    for one, two in zip(whole.log, halved.log, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-5)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(halved)[name], weight, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_has_the_sizes_of_the_first_also_on_a_larger_card(model: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Card(patch, room=300, at=4)
        whole = train(recipe(model), tmp_path / "whole", progress=False)
    for stop in (3, 5):  # before and after the step that did not fit
        folder = tmp_path / f"stopped at {stop}"
        with pytest.MonkeyPatch.context() as patch:
            Card(patch, room=300, at=4)
            interrupt(patch, max(stop, 4))
            with pytest.raises(Interrupted):
                train(recipe(model), folder, progress=False)
        for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
            if int(checkpoint.name.rpartition("-")[2]) > stop:
                (checkpoint / "optimizer.pt").unlink()  # as if it had not come to its end
        with pytest.MonkeyPatch.context() as patch:
            card = Card(patch, room=10**6)
            resumed = train(recipe(model), folder, progress=False)
        assert not card.refused
        assert min(step for step in card.sizes if step) == stop + 1
        assert all(max(card.sizes[step]) <= 300 for step in card.sizes if step >= 4)
        assert same(whole, resumed)
        assert resumed.manifest["micro_batch_tokens"] == whole.manifest["micro_batch_tokens"]


def interrupt(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send the process a Ctrl-C at that step."""
    original = Recorder.on_log

    def on_log(self: Recorder, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        original(self, args, state, control, logs, **kwargs)
        if state.global_step == step - 1 and "loss" in (logs or {}):
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Recorder, "on_log", on_log)


def test_the_validation_split_is_measured_again_too(model: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = train(recipe(model, evaluate_every=2), tmp_path / "whole", progress=False)
    card = Card(patch, room=300, at=0, where="evaluation")
    run = train(recipe(model, evaluate_every=2), tmp_path / "halved", progress=False)
    assert card.refused == [0]
    assert max(card.sizes[0]) <= 300
    measured = [[line["eval_loss"] for line in r.log if "eval_loss" in line] for r in (whole, run)]
    assert measured[1][0] == pytest.approx(measured[0][0], rel=1e-6)
    (halving,) = run.manifest["micro_batch_tokens"]["halvings"]
    assert halving["tokens"] == 300
    assert all(max(card.sizes[step]) <= 300 for step in card.sizes if step >= halving["step"])


def test_one_example_that_does_not_fit_ends_the_run_in_a_sentence(
    model: Path, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Card(patch, room=20)
    with pytest.raises(
        WorkError, match=r"step 1 with a single example of \d+ tokens: .*gradient_checkpointing"
    ) as error:
        train(recipe(model), tmp_path / "run", progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_other_errors_are_not_taken_for_it(model: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = Card(patch, room=100)

    def fail() -> None:
        raise RuntimeError("an index is out of range")

    card.fail = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of range"):
        train(recipe(model), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20 MiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_is_used_up(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_fast_paths_are_on_in_these_tests(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    with FastPaths(AutoModelForCausalLM.from_pretrained(model)) as fast:
        assert fast.packs
