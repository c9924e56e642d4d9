"""Private interfaces of transformers' Trainer that `compat.trainer` uses: a test fails by name where one is gone."""

import inspect

import pytest
from accelerate import Accelerator
from transformers import Trainer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_save", ["self", "output_dir", "state_dict"]),
    ],
)
def test_a_hook_that_is_overridden(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters


@pytest.mark.parametrize(
    ("attribute", "used_in"),
    [
        ("model_accepts_loss_kwargs", "_get_num_items_in_batch"),
        ("_loss_shifts_labels", "_get_num_items_in_batch"),
        ("_load_from_checkpoint", "train"),
        ("_save", "save_model"),
    ],
)
def test_an_attribute_that_trainer_reads(attribute: str, used_in: str) -> None:
    assert f"self.{attribute}" in inspect.getsource(getattr(Trainer, used_in))


def test_the_loss_may_be_declared_scaled() -> None:
    assert Trainer.loss_is_scaled_for_ga is None


def test_a_model_that_is_prepared_for_evaluation_is_not_wrapped() -> None:
    assert "evaluation_mode" in inspect.signature(Accelerator.prepare_model).parameters
    assert "if not evaluation_mode:" in inspect.getsource(Accelerator.prepare_model)


def test_the_epoch_reaches_the_batch_sampler_of_a_loader_that_skips() -> None:
    assert "underlying_sampler.set_epoch(epoch)" in inspect.getsource(Trainer._run_epoch)
