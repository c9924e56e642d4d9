"""From examples to batches: encoding, the validation split, and padding."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_adapters.errors import RequestError
from llm_adapters.tasks.examples import Example
from llm_adapters.tasks.templates import IGNORED, Encoded, encode_example, render_prompt
from llm_adapters.training.recipe import DataSettings

if TYPE_CHECKING:
    import torch

    from llm_adapters.fast_paths import Pack


@dataclass(frozen=True)
class TrainingData:
    """The encoded examples of a run and what is to be said of them.

    Attributes:
        train, validation: encoded examples, in the order of the seed's shuffle.
        questions: the questions trained on, for the contamination report.
        dropped: how many examples were longer than the limit and left out.
        cut: how many were longer and cut.
        example: prompt and response of the first training example, as text.
        fingerprint: SHA-256 over the examples as they were read, in order.
    """

    train: list[Encoded]
    validation: list[Encoded]
    questions: list[str]
    dropped: int
    cut: int
    example: dict[str, str]
    fingerprint: str

    def counts(self) -> dict[str, int]:
        """Examples, tokens and labels, as the manifest reports them."""
        return {
            "train_examples": len(self.train),
            "validation_examples": len(self.validation),
            "train_tokens": sum(len(e.input_ids) for e in self.train),
            "train_labels": sum(label != IGNORED for e in self.train for label in e.labels),
            "longest": max(len(e.input_ids) for e in self.train),
            "dropped_too_long": self.dropped,
            "cut_too_long": self.cut,
        }


def prepare(
    examples: Sequence[Example],
    tokenizer: Any,
    settings: DataSettings,
    seed: int,
    context: int | None = None,
) -> TrainingData:
    """Shuffle with the seed, encode, deal with what is too long up to `settings.limit`, hold out the validation split.

    Args:
        examples: as read from the data set.
        tokenizer: the base model's.
        settings: the recipe's data section.
        seed: decides the shuffle.
        context: the longest sequence that the base model takes; None where it has no limit.

    Raises:
        RequestError: nothing is left to train on, or an example is too long and `settings.too_long` is ``"error"``.
    """
    if context is not None and settings.max_length > context:
        raise RequestError(f"data.max_length is {settings.max_length}: the model takes at most {context} tokens")
    chosen = list(examples)
    random.Random(seed).shuffle(chosen)
    encoded: list[tuple[Example, Encoded]] = []
    dropped = cut = 0
    longest = 0
    for example in chosen:
        if len(encoded) == settings.limit:
            break
        tokens = encode_example(
            tokenizer, example, template=settings.template, train_on_prompt=settings.train_on_prompt
        )
        length = len(tokens.input_ids)
        longest = max(longest, length)
        if length > settings.max_length:
            if settings.too_long == "error":
                raise RequestError(
                    f"an example has {length} tokens, data.max_length is {settings.max_length}: "
                    "raise it, or set data.too_long to drop or cut"
                )
            if settings.too_long == "drop":
                dropped += 1
                continue
            tokens = Encoded(
                tokens.input_ids[: settings.max_length], tokens.labels[: settings.max_length], tokens.prompt_length
            )
            cut += 1
        if all(label == IGNORED for label in tokens.labels[1:]):
            dropped += 1  # cut before its response begins: there is nothing to learn from it
            continue
        encoded.append((example, tokens))
    held_out = round(settings.validation * len(encoded)) if settings.validation < 1 else int(settings.validation)
    if settings.validation and held_out == 0:
        raise RequestError(f"data.validation is {settings.validation}: of {len(encoded)} examples that leaves none")
    if len(encoded) - held_out < 1:
        reason = (
            f"all {len(chosen)} are longer than data.max_length, {settings.max_length} (the longest: {longest} tokens)"
            if not encoded
            else f"the validation split takes {held_out} of {len(encoded)}"
        )
        raise RequestError(f"no example is left to train on: {reason}")
    validation, train = encoded[:held_out], encoded[held_out:]
    first = train[0][0]
    prompt = render_prompt(settings.template, first.question, first.input, tokenizer=tokenizer, stage="train")
    return TrainingData(
        train=[tokens for _, tokens in train],
        validation=[tokens for _, tokens in validation],
        questions=[example.question for example, _ in train],
        dropped=dropped,
        cut=cut,
        example={"prompt": prompt, "response": first.response},
        fingerprint=_fingerprint([example for example, _ in encoded]),
    )


@dataclass
class MicroBatch:
    """Sequences that are computed at once: a pack, or rows padded on the right.

    On the right, a pad can never be seen by a token (attention is causal) and positions start at 0 in every family,
    also after the virtual tokens of prefix and prompt tuning.

    Attributes:
        inputs: what the model takes: `input_ids` and, for padded rows, `attention_mask`, each (rows, tokens).
        at: (labels,): where in the flattened `input_ids` the labels are predicted, one place before each.
        targets: (labels,): the labels.
        pack: the pack, where it is one.
        tokens: number of tokens, no padding counted and a shared prefix counted for every sequence.
    """

    inputs: "dict[str, torch.Tensor]"
    at: "torch.Tensor"
    targets: "torch.Tensor"
    pack: "Pack | None"
    tokens: int

    def arguments(self) -> dict[str, Any]:
        """For the forward of an accelerated model, which returns the sum of the losses (see `FastPaths`)."""
        width = self.inputs["input_ids"].shape[1]
        return {**self.inputs, "at": self.at, "targets": self.targets, "pack": self.pack, "width": width}


@dataclass(frozen=True)
class Collator:
    """Cuts the examples of an optimiser step into micro-batches of neighbours in length.

    The loss is normalised by the labels of the whole step, so that the cut changes nothing but time and memory.

    Args:
        pad_token_id: fills padded rows.
        packed: packs, with the prompt's common beginning computed once in each; else padded rows.
        tokens: the most tokens (of padded rows, places) of a micro-batch; a longer example is one of its own.
        most: the most examples of a micro-batch; None for no limit.
        device: where the micro-batches go.
    """

    pad_token_id: int
    packed: bool = True
    tokens: int = 2688
    most: int | None = None
    device: Any = None

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """The micro-batches of one step, and in ``labels`` all their targets, which Trainer counts."""
        import torch

        micro_batches = self.cut(examples)
        return {"labels": torch.cat([micro.targets for micro in micro_batches]), "micro_batches": micro_batches}

    def cut(self, examples: Sequence[Encoded]) -> list[MicroBatch]:
        """Cut `examples` into micro-batches."""
        lengths = [len(example.input_ids) for example in examples]
        if self.packed:
            from llm_adapters.fast_paths import make_packs

            groups = make_packs(lengths, _shared(examples), self.tokens, self.most)
            return [self._pack([examples[i] for i in group]) for group in groups]
        order = sorted(range(len(examples)), key=lambda i: -lengths[i])
        micro_batches = []
        while order:
            rows = max(1, min(self.tokens // lengths[order[0]], self.most or len(order)))
            micro_batches.append(self._pad([examples[i] for i in order[:rows]]))
            order = order[rows:]
        return micro_batches

    def _pack(self, examples: list[Encoded]) -> MicroBatch:
        from llm_adapters.fast_paths import Pack

        shared = _shared(examples)
        pack = Pack.of([example.input_ids for example in examples], shared, self.device)
        starts = [start - shared for start in pack.starts]
        return self._micro_batch({"input_ids": pack.input_ids}, starts, examples, pack)

    def _pad(self, examples: list[Encoded]) -> MicroBatch:
        import torch

        width = max(len(e.input_ids) for e in examples)

        def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=self.device)

        inputs = {
            "input_ids": padded([e.input_ids for e in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        }
        return self._micro_batch(inputs, [row * width for row in range(len(examples))], examples, None)

    def _micro_batch(
        self, inputs: "dict[str, torch.Tensor]", starts: list[int], examples: list[Encoded], pack: "Pack | None"
    ) -> MicroBatch:
        """`starts`: where each example's first token is in the flattened input, or would be without a shared prefix."""
        import torch

        at, targets = [], []
        for start, example in zip(starts, examples, strict=True):
            # No token predicts the first one, so that a label there has no place.
            found = [place for place in range(1, len(example.labels)) if example.labels[place] != IGNORED]
            at += [start + place - 1 for place in found]
            targets += [example.labels[place] for place in found]
        return MicroBatch(
            inputs,
            torch.tensor(at, dtype=torch.int64, device=self.device),
            torch.tensor(targets, dtype=torch.int64, device=self.device),
            pack,
            sum(len(example.input_ids) for example in examples),
        )


def _shared(examples: Sequence[Encoded]) -> int:
    """How many tokens all examples begin with before the first that predicts a label: those may be computed once."""
    from llm_adapters.fast_paths import common_prefix

    first = min(next(i for i, label in enumerate(e.labels) if i and label != IGNORED) for e in examples)
    return min(common_prefix([example.input_ids for example in examples]), first - 1)


class Shuffle:
    """A sampler whose order depends on nothing but the seed and the epoch, so that a resumed run goes on in it.

    Args:
        count: number of examples.
        seed: with the epoch, decides the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        order = list(range(self.count))
        random.Random(f"{self.seed}-{self.epoch}").shuffle(order)
        return iter(order)


def _fingerprint(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        fields = [example.question, example.input, example.response, example.answer]
        digest.update(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
