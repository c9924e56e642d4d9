"""The one place where text is generated: prompts go in as tokens, finished answers come out, as many at a time as fit.

Decoding is greedy or beam search, never sampled, and nothing that a checkpoint's own generation config asks for
(penalties, minimum lengths, sampling) takes part, except its end-of-sequence tokens. In float32 an answer does not
depend on its neighbours.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llm_adapters.errors import RequestError, unknown
from llm_adapters.models import context_length

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LARGEST_BATCH = 256
LARGEST_PADDED_BATCH = {"cpu": 32, "other": 64}


@dataclass(frozen=True)
class Generation:
    """What a model generated after one prompt.

    `tokens` are the generated ids without the end-of-sequence token, `text` is what they spell. `finished` says that
    the model ended the answer itself, and did not meet the limit; `skipped` that the prompt was too long to be asked.
    `seconds` is its share of the time since the answers before it.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    finished: bool = False
    skipped: bool = False
    seconds: float = field(default=0.0, compare=False)

    @property
    def computed(self) -> int:
        """How many tokens were generated for it, the end-of-sequence token counted."""
        return len(self.tokens) + self.finished


class Generator:
    """Generates with one model, as a context: inside, the model is in eval mode, its weights must not change, and what
    makes it fast is on; afterwards it is as it was.

    Args:
        model: a transformers model or a `PeftModel`.
        tokenizer: the model's.
        max_new_tokens: the longest answer.
        num_beams: above 1, beam search without early stopping and with length penalty 1.
        batch_size: answers in the making at a time; None chooses what fits.
        merge: compute LoRA merged into copies of the weights, where that changes no more than rounding does.
        own: False generates with transformers' `generate` in any case.
        adapters: the adapters of a `PeftModel` that the prompts name; None for the active ones. Only the own engine
            has several: see ``reason`` in the `report`.

    Attributes:
        report: how it generates, for the summary: ``engine`` is ``"own"`` or ``"transformers"`` (then ``reason`` says
            why), ``fast_paths`` which of them are on, or why not.

    Raises:
        RequestError: a size below 1, or an adapter that the model does not have.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_new_tokens: int = 256,
        num_beams: int = 1,
        batch_size: int | None = None,
        merge: bool = True,
        own: bool = True,
        adapters: Sequence[str] | None = None,
    ) -> None:
        for name, value in (
            ("max_new_tokens", max_new_tokens),
            ("num_beams", num_beams),
            ("batch_size", 1 if batch_size is None else batch_size),
        ):
            if value < 1:
                raise RequestError(f"{name}={value} is too small: give 1 or more.")
        self.model, self.tokenizer, self.merge, self.own = model, tokenizer, merge, own
        self.max_new_tokens, self.num_beams, self.batch_size = max_new_tokens, num_beams, batch_size
        self.adapters = list(adapters) if adapters is not None else None
        if adapters is not None:
            check_names(adapters, adapters_of(model), len(adapters))
        self.ends = end_tokens(model, tokenizer)
        self.report: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._fast_paths: Any = None

    def __enter__(self) -> "Generator":
        from llm_adapters.fast_paths.session import FastPaths
        from llm_adapters.generation import engine

        with contextlib.ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            reason: str | None = "asked for"
            if self.own:
                with contextlib.ExitStack() as faster:
                    fast_paths = FastPaths(self.model, inference=True, merge=self.merge, adapters=self.adapters)
                    faster.enter_context(fast_paths)
                    reason = engine.why_not(fast_paths)
                    self._fast_paths = None if reason else fast_paths
                    if reason is None:
                        stack.push(faster.pop_all())
            if reason is None:
                self.report = {"engine": "own", "fast_paths": fast_paths.report}
            else:
                self.report = {"engine": "transformers", "reason": reason}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._fast_paths = None
        self._stack.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        on_token: Callable[[int, int], None] | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Generate after each prompt; yields (index of the prompt, `Generation`) as answers end, long prompts first (of
        several adapters, each one's).

        A prompt that leaves no room for `max_new_tokens` in the model's context is not asked, never cut: it comes back
        as `skipped`. Where the accelerator's memory is too small for the batch, that is halved, with a warning.

        Args:
            prompts: token ids.
            on_token: called with a prompt's index and a token of its answer as soon as it is there, for streaming;
                with transformers' `generate` and with beams, when the answer has ended.
            adapter_names: which of the `adapters` answers each prompt, where there are some.

        Raises:
            RequestError: as `check_prompts` does; a name that is none of the `adapters`, not one for each prompt, or
                the own engine does not take these adapters.
            WorkError: the model's logits are not numbers.
        """
        if self.adapters is not None and self._fast_paths is None:
            raise RequestError(f"these adapters cannot answer in one batch: {self.report.get('reason', 'closed')}.")
        check_names(adapter_names, self.adapters, len(prompts))
        skipped = check_prompts(self.model, prompts, self.max_new_tokens)
        yield from ((index, Generation(skipped=True)) for index in sorted(skipped))
        left = [index for index in range(len(prompts)) if index not in skipped]
        if not left:
            return
        size = self.size([prompts[index] for index in left])
        while left:
            asked, done = list(left), set()
            started = time.perf_counter()
            try:
                for ended in self._answers(prompts, asked, size, on_token, adapter_names):
                    share = (time.perf_counter() - started) / len(ended)
                    for at, tokens in ended:
                        done.add(asked[at])
                        yield asked[at], self._generation(tokens, share)
                    started = time.perf_counter()
            except Exception as error:
                if size == 1 or not _out_of_memory(error):
                    raise
                logger.warning("a batch of %d does not fit in memory: going on with %d", size, size // 2)
                size //= 2
            left = [index for index in left if index not in done]

    def size(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many answers to `prompts` are in the making at a time."""
        if self.batch_size is not None:
            return self.batch_size
        largest = LARGEST_BATCH
        if self._fast_paths is None:
            largest = LARGEST_PADDED_BATCH["cpu" if self.model.device.type == "cpu" else "other"]
        return choose_batch_size(self.model, list(map(len, prompts)), self.max_new_tokens, self.num_beams, largest)

    def _answers(
        self,
        every: Sequence[Sequence[int]],
        names: list[int],
        size: int,
        on_token: Callable[[int, int], None] | None,
        adapter_names: Sequence[str] | None,
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Lists of (place among `names`, tokens with the one that ends them) as answers end."""
        from llm_adapters.generation.engine import Engine
        from llm_adapters.generation.padded import generate_batch

        prompts = [every[name] for name in names]
        options: dict[str, Any] = {
            "ends": self.ends,
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
        }
        streams = on_token is not None and self._fast_paths is not None and self.num_beams == 1
        tell = (lambda at, token: on_token(names[at], token)) if on_token is not None else None
        if self._fast_paths is not None:
            routes = None
            if adapter_names is not None and self.adapters is not None:
                routes = [self.adapters.index(adapter_names[name]) for name in names]
            engine = Engine(self._fast_paths, prompts, slots=size, routes=routes, **options)
            answers = engine.run(tell if streams else None)
        else:
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            pad = self.tokenizer.pad_token_id
            answers = (
                list(
                    zip(batch, generate_batch(self.model, [prompts[i] for i in batch], pad=pad, **options), strict=True)
                )
                for batch in batches
            )
        for ended in answers:
            if tell is not None and not streams:
                for at, tokens in ended:
                    for token in tokens:
                        tell(at, token)
            yield ended

    def _generation(self, tokens: list[int], seconds: float) -> Generation:
        finished = bool(tokens) and tokens[-1] in self.ends
        kept = tokens[:-1] if finished else tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(text, tuple(kept), finished, seconds=seconds)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    adapter_names: Sequence[str] | None = None,
    **options: Any,
) -> Iterator[tuple[int, Generation]]:
    """`Generator.generate` with a `Generator` for this once; `options` are its.

    Args:
        model: a transformers model or a `PeftModel`.
        tokenizer: the model's.
        prompts: token ids.
        adapter_names: for each prompt the adapter of a `PeftModel` that answers it, ``"__base__"`` for none of them.
            Several answer in one batch, unmerged, where that can be; else one adapter after the other.
        options: as of `Generator`.

    Raises:
        RequestError: a name that the model does not have, or not one for each prompt; and as `Generator.generate`.
    """
    if adapter_names is None:
        with Generator(model, tokenizer, **options) as generator:
            yield from generator.generate(prompts)
        return
    from llm_adapters.fast_paths.routing import using

    check_names(adapter_names, adapters_of(model), len(prompts))
    names = list(dict.fromkeys(adapter_names))
    if len(names) > 1:
        with Generator(model, tokenizer, adapters=names, **options) as generator:
            if generator.report["engine"] == "own":
                yield from generator.generate(prompts, adapter_names=adapter_names)
                return
            logger.info("one adapter after the other: %s", generator.report["reason"])
    for name in names:
        asked = [index for index, other in enumerate(adapter_names) if other == name]
        with using(model, name), Generator(model, tokenizer, **options) as generator:
            for at, generation in generator.generate([prompts[index] for index in asked]):
                yield asked[at], generation


def adapters_of(model: "PreTrainedModel") -> list[str]:
    """The adapters that a prompt may name."""
    from llm_adapters.fast_paths.routing import NO_ADAPTER

    return [*getattr(model, "peft_config", ()), NO_ADAPTER]


def check_names(names: Sequence[str] | None, known: Sequence[str] | None, count: int) -> None:
    """Raise `RequestError` where `names` are not `count` of the `known` adapters, or there are some and none are known,
    or the other way round."""
    if known is None and names is not None:
        raise RequestError("adapter_names are given, and the Generator has no adapters: name them there.")
    if names is None and known is not None:
        raise RequestError("the Generator has several adapters: give adapter_names, one for each prompt.")
    if names is None or known is None:
        return
    if len(names) != count:
        raise RequestError(f"{len(names)} adapter_names for {count} prompts: give one for each.")
    for name in dict.fromkeys(names):
        if name not in known:
            raise unknown("adapter", name, known)


def check_prompts(model: "PreTrainedModel", prompts: Sequence[Sequence[int]], max_new_tokens: int) -> set[int]:
    """The indices of the prompts that are too long for `model` to be asked with `max_new_tokens` to come.

    Raises `RequestError` where all are too long, where one is empty or holds a token that the model does not have, and
    where `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens={max_new_tokens} is too small: give 1 or more.")
    rows = model.get_input_embeddings().weight.shape[0]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"prompt {index} is empty: a model needs a token to go on from.")
        if not 0 <= min(prompt) <= max(prompt) < rows:
            raise RequestError(
                f"prompt {index} holds token {max(prompt)}, and the model has {rows}: "
                "the tokenizer does not belong to the model."
            )
    limit = context_limit(model)
    skipped = {index for index, prompt in enumerate(prompts) if len(prompt) > limit - max_new_tokens}
    if skipped and len(skipped) == len(prompts):
        raise RequestError(
            f"every prompt is too long: the shortest has {min(map(len, prompts))} tokens, and the model's context of "
            f"{limit} leaves {max(limit - max_new_tokens, 0)} beside max_new_tokens={max_new_tokens}. Lower that."
        )
    return skipped


def context_limit(model: "PreTrainedModel") -> int:
    """How many tokens, prompt and answer together, `model` can take; a prompt adapter's own are subtracted.

    A model without a limit (BLOOM) gives a very large number.
    """
    from llm_adapters.fast_paths.routing import prompt_learning

    return (context_length(model) or 1 << 40) - (getattr(prompt_learning(model), "num_virtual_tokens", None) or 0)


def choose_batch_size(
    model: "PreTrainedModel",
    lengths: Sequence[int],
    max_new_tokens: int,
    num_beams: int = 1,
    largest: int = LARGEST_BATCH,
) -> int:
    """How many prompts of these `lengths` fit in half of the free memory at once; no more than `largest` beams."""
    import torch

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = torch.finfo(model.dtype).bits // 8
    cache = 2 * config.num_hidden_layers * heads * width * item * (max(lengths, default=0) + max_new_tokens)
    # Beside the cache: the cache is copied when beams are reordered, logits and their softmax are float32.
    row = num_beams * (cache * (2 if num_beams > 1 else 1) + 4 * 4 * config.vocab_size)
    return max(1, min(largest // num_beams, _free_memory(model.device) // 2 // row))


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that end an answer: the tokenizer's end-of-sequence token and those that the checkpoint names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list | tuple) else [named]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode, and none of the checkpoint's own wishes for generation; both as they were afterwards."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    wishes, training = base.generation_config, [module for module in model.modules() if module.training]
    base.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        base.generation_config = wishes
        for module in training:
            module.training = True


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _free_memory(device: "torch.device") -> int:
    """Free bytes where the model runs."""
    import psutil  # PEFT needs it, so it is there
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
