"""Private interfaces of transformers' Trainer that `compat.trainer` uses: a test fails by name where one is gone."""

import inspect

import pytest
from transformers import Trainer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_get_train_sampler", ["self", "train_dataset"]),
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
        ("_get_train_sampler", "get_train_dataloader"),
        ("_save", "save_model"),
    ],
)
def test_an_attribute_that_trainer_reads(attribute: str, used_in: str) -> None:
    assert f"self.{attribute}" in inspect.getsource(getattr(Trainer, used_in))


def test_the_loss_may_be_declared_scaled() -> None:
    assert Trainer.loss_is_scaled_for_ga is None
