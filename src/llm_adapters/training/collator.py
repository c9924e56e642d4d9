"""From encoded examples to micro-batches, packed or padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_adapters.tasks.templates import IGNORED, Encoded

if TYPE_CHECKING:
    import torch

    from llm_adapters.ops.packing import Pack


@dataclass
class MicroBatch:
    """Sequences that are computed at once: a pack, or rows padded on the right.

    On the right, a pad can never be seen by a token (attention is causal) and positions start at 0 in every family,
    also after the virtual tokens of prefix and prompt tuning.

    Attributes:
        inputs: what the model takes: `input_ids` and, for padded rows, `attention_mask`, each (rows, tokens).
        label_positions: (labels,): the places in the flattened `input_ids` that predict the labels, one before each.
        targets: (labels,): the labels.
        pack: the pack, where it is one.
        tokens: number of tokens, no padding counted and a shared prefix counted for every sequence.
        examples: number of sequences.
    """

    inputs: "dict[str, torch.Tensor]"
    label_positions: "torch.Tensor"
    targets: "torch.Tensor"
    pack: "Pack | None"
    tokens: int
    examples: int

    def arguments(self) -> dict[str, Any]:
        """Arguments of the forward that `FastPaths` gives a model, which returns the sum of the losses."""
        seq_len = self.inputs["input_ids"].shape[1]
        labels = {"label_positions": self.label_positions, "targets": self.targets}
        return {**self.inputs, **labels, "pack": self.pack, "seq_len": seq_len}


@dataclass
class Collator:
    """Makes micro-batches of neighbours in length from the examples of an optimiser step.

    The loss is normalised by the labels of the whole step, so that the division changes nothing but time and memory.

    Args:
        pad_token_id: fills padded rows.
        packed: packs, with the prompt's common beginning computed once in each; else padded rows.
        micro_batch_tokens: the most tokens of a micro-batch, padding counted; a longer example is one of its own.
        micro_batch_size: the most examples of a micro-batch; None for no limit.
        device: where the micro-batches go.
    """

    pad_token_id: int
    packed: bool = True
    micro_batch_tokens: int = 2688
    micro_batch_size: int | None = None
    device: Any = None

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Micro-batches of one step, what they are made of, and in ``labels`` their targets, which Trainer counts."""
        import torch

        micro_batches = self.make_micro_batches(examples) if examples else []  # this process has no part in the step
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        return {
            "labels": torch.cat([nothing, *(micro.targets for micro in micro_batches)]),
            "micro_batches": micro_batches,
            "micro_batch_tokens": self.micro_batch_tokens,
            "examples": examples,
        }

    def make_micro_batches(self, examples: Sequence[Encoded]) -> list[MicroBatch]:
        """Divide `examples` into micro-batches."""
        lengths = [len(example.input_ids) for example in examples]
        if self.packed:
            from llm_adapters.ops.packing import make_packs

            groups = make_packs(lengths, _shared(examples), self.micro_batch_tokens, self.micro_batch_size)
            return [self._pack([examples[i] for i in group]) for group in groups]
        order = sorted(range(len(examples)), key=lambda i: -lengths[i])
        micro_batches = []
        while order:
            rows = max(1, min(self.micro_batch_tokens // lengths[order[0]], self.micro_batch_size or len(order)))
            micro_batches.append(self._pad([examples[i] for i in order[:rows]]))
            order = order[rows:]
        return micro_batches

    def _pack(self, examples: list[Encoded]) -> MicroBatch:
        from llm_adapters.ops.packing import Pack

        shared = _shared(examples)
        pack = Pack.of([example.input_ids for example in examples], shared, self.device)
        starts = [start - shared for start in pack.starts]
        return self._micro_batch({"input_ids": pack.input_ids}, starts, examples, pack)

    def _pad(self, examples: list[Encoded]) -> MicroBatch:
        from llm_adapters.ops.packing import to_device

        seq_len = max(len(e.input_ids) for e in examples)

        def padded(rows: list[list[int]], filler: int) -> "torch.Tensor":
            return to_device([row + [filler] * (seq_len - len(row)) for row in rows], self.device)

        inputs = {
            "input_ids": padded([e.input_ids for e in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        }
        return self._micro_batch(inputs, [row * seq_len for row in range(len(examples))], examples, None)

    def _micro_batch(
        self, inputs: "dict[str, torch.Tensor]", starts: list[int], examples: list[Encoded], pack: "Pack | None"
    ) -> MicroBatch:
        """`starts`: where each example's first token is in the flattened input, or would be without a shared prefix."""
        import torch

        from llm_adapters.ops.packing import to_device

        label_positions, targets = [], []
        for start, example in zip(starts, examples, strict=True):
            # No token predicts the first one, so that a label there cannot be learnt.
            positions = [i for i in range(1, len(example.labels)) if example.labels[i] != IGNORED]
            label_positions += [start + position - 1 for position in positions]
            targets += [example.labels[position] for position in positions]
        return MicroBatch(
            inputs,
            to_device(label_positions, self.device, torch.int64),
            to_device(targets, self.device, torch.int64),
            pack,
            sum(len(example.input_ids) for example in examples),
            len(examples),
        )


def _shared(examples: Sequence[Encoded]) -> int:
    """Number of tokens that all examples begin with, before the first that predicts a label: computed once."""
    from llm_adapters.ops.packing import common_prefix

    first = min(next(i for i, label in enumerate(e.labels) if i and label != IGNORED) for e in examples)
    return min(common_prefix([example.input_ids for example in examples]), first - 1)
