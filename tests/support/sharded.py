"""What one of the processes of `test_ranks.test_a_model_may_be_sharded_once_it_is_accelerated` does.

Prints, as JSON, the loss of one process and of all, and how far apart their gradients are.
"""

import json
import sys

import peft
import torch
import torch.distributed
from tiny import tiny_model
from torch.distributed.fsdp import fully_shard

from llm_adapters.errors import RequestError
from llm_adapters.tasks.templates import Encoded
from llm_adapters.training import Collator, FastPaths


def adapted() -> peft.PeftModel:
    torch.manual_seed(0)  # PEFT draws A
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    model = peft.get_peft_model(tiny_model("llama"), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def loss(model: torch.nn.Module, fast: FastPaths, examples: list[Encoded], labels: int) -> torch.Tensor:
    """Their share of the mean loss over so many labels; its gradient is left in the model."""
    total = torch.zeros(())
    for micro in Collator(0, packed=fast.packs).make_micro_batches(examples):
        part = model(**micro.arguments())["loss"] / labels
        part.backward()
        total += part.detach()
    return total


def shard(model: peft.PeftModel) -> None:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(2)
    rows = [[5, 6, 7, *torch.randint(3, 300, (n,), generator=generator).tolist()] for n in (20, 14, 17, 11)]
    examples = [Encoded(ids, [-100] * 8 + ids[8:], 8) for ids in rows]
    labels = sum(len(ids) - 8 for ids in rows)
    whole = adapted()
    with FastPaths(whole) as fast:
        expected = loss(whole, fast, examples, labels)
        packed = fast.packs
    parts = adapted()
    with FastPaths(parts) as fast:
        shard(parts)
        found = loss(parts, fast, examples[rank::world], labels)
        torch.distributed.all_reduce(found)
    furthest = 0.0
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        if one.requires_grad:
            gradient = other.grad.full_tensor() * world  # FSDP gives the mean over the processes
            furthest = max(furthest, float((gradient - one.grad).abs().max() / one.grad.abs().max()))
    try:
        FastPaths(parts).__enter__()
        refused = ""
    except RequestError as error:
        refused = str(error)
    if rank == 0:
        result = {"one": expected.item(), "all": found.item(), "furthest": furthest}
        print(json.dumps(result | {"packed": packed, "refused": refused}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
