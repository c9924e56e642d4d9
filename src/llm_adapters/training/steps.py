"""Which examples an optimiser step takes, and which of them each process."""

import random
from collections.abc import Iterator


class Steps:
    """A batch sampler: for each optimiser step, the examples of it that this process takes.

    The order depends on nothing but the seed and the epoch, so that a resumed run goes on in it. A step's examples are
    dealt out in turn, so that an epoch is each example once over however many processes; the last step of an epoch may
    leave some without any.

    Args:
        count: number of examples.
        batch_size: examples of a step, over all processes.
        seed: with the epoch, decides the order; None keeps that of the data.
        rank: number of this process.
        processes: how many there are.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None, rank: int = 0, processes: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.processes, self.epoch = rank, processes, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.count))
        if self.seed is not None:
            random.Random(f"{self.seed}-{self.epoch}").shuffle(order)
        for start in range(0, self.count, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.processes]
