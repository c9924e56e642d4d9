"""What tests of CUDA graphs share: optimiser steps with graphs and without."""

import functools
from typing import Any

import torch

from llm_adapters.ops import dropout
from llm_adapters.training.collator import MicroBatch
from llm_adapters.training.graphs import MicroBatchGraphs


def compute(model: Any, arguments: dict[str, Any], count: torch.Tensor | int) -> torch.Tensor:
    with dropout.seeds_drawn_together():
        loss = model(**arguments)["loss"] / count
    loss.backward()
    return loss.detach()


def steps(
    model: Any, graphs: MicroBatchGraphs | None, batches: list[list[MicroBatch]]
) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """The losses and gradients of optimiser steps; without `graphs` as a plain loop computes them."""
    found = []
    torch.manual_seed(5)
    for batch in batches:
        count = torch.tensor(sum(len(micro.targets) for micro in batch))
        model.zero_grad()
        losses = []
        if graphs is not None:
            graphs.begin_step()
        for micro in batch:
            loss = graphs.run(micro, count, functools.partial(compute, model)) if graphs is not None else None
            losses.append(float(compute(model, micro.arguments(), count) if loss is None else loss))
        found.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    return found
