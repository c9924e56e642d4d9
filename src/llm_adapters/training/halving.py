"""Out of memory: the same work again, from its start, in micro-batches half as large."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from llm_adapters.errors import WorkError
from llm_adapters.training.collator import MicroBatch
from llm_adapters.training.memory import is_out_of_memory, release_memory
from llm_adapters.training.sizes import Sizes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class DoesNotFitError(Exception):
    """Memory was used up while `micro_batch` was computed."""

    def __init__(self, micro_batch: MicroBatch) -> None:
        super().__init__()
        self.micro_batch = micro_batch


@contextlib.contextmanager
def computing(micro_batch: MicroBatch) -> Iterator[None]:
    """Compute `micro_batch` inside; that memory is used up becomes a `DoesNotFitError`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(micro_batch) from error
        raise


def until_it_fits(
    compute: Callable[[], Result], undo: Callable[[], None], sizes: Sizes, step: int, processes: int
) -> Result:
    """Return what `compute` returns; each time that its micro-batches do not fit, halve `sizes` and do it again.

    Args:
        compute: computes in micro-batches of ``sizes.at(step)`` tokens, each under `computing`.
        undo: takes back what a `compute` that failed has done.
        sizes: the sizes of the run.
        step: the optimiser step from which the smaller size holds.
        processes: how many train together. Several cannot do a step again, as the others may be past it.

    Raises:
        WorkError: not even one example fits; or several processes train, and the same command is to be given again.
    """
    while True:
        try:
            return compute()
        except DoesNotFitError as error:
            micro_batch = error.micro_batch
        # Only here nothing refers to what was computed any more.
        tokens = micro_batch.inputs["input_ids"].numel()
        if micro_batch.examples == 1:
            raise WorkError(
                f"out of memory at step {step} with a single example of {micro_batch.tokens} tokens: set "
                "training.gradient_checkpointing or model.quantization, or give a smaller data.max_length or a smaller "
                "adapter"
            )
        smaller = sizes.at(step) // 2
        while smaller >= tokens:
            smaller //= 2
        sizes.change(step, smaller)
        told = f"out of memory at step {step} with {tokens} tokens at once"
        if processes > 1:
            raise WorkError(f"{told}: give the same command again, it goes on with at most {smaller}")
        logger.warning("%s: it is done again, and all that follows is done, with at most %d", told, smaller)
        del micro_batch
        undo()
        release_memory()


class RandomState:
    """The state of torch's random numbers on the host and on `device`, to go back to."""

    def __init__(self, device: torch.device) -> None:
        self._device = None if device.type == "cpu" else device
        self._host = torch.get_rng_state()
        self._accelerator = torch.get_device_module(device).get_rng_state(device) if self._device else None

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._host)
        if self._device is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)
