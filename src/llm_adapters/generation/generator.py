"""The one place where text is generated: prompts go in as tokens, finished answers come out, as many at a time as fit.

Decoding is greedy, beam search or sampling, as the caller says. Nothing that a checkpoint's own generation config asks
for (penalties, minimum lengths, sampling) takes part, except its end-of-sequence tokens. In float32 an answer does not
depend on its neighbours, and a sampled one on nothing but the prompt, the seed and the sample's number.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from llm_adapters.errors import RequestError, unknown
from llm_adapters.generation.sampling_params import SamplingParams
from llm_adapters.models import context_length
from llm_adapters.models.memory import free_memory
from llm_adapters.models.rope import independent_length
from llm_adapters.models.starts import check_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_adapters.generation.engine import Engine

logger = logging.getLogger(__name__)

LARGEST_BATCH = 256
LARGEST_PADDED_BATCH = {"cpu": 32, "other": 64}


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    Attributes:
        text: the spelled tokens.
        tokens: generated ids, without the stop token.
        finish_reason: ``"stop"`` where the model ended the answer itself, ``"length"`` where the limit of new tokens
            was met, ``"skipped"`` where the prompt was too long to be asked.
        sample: its number among the `n` answers to the prompt, from 0.
        seconds: its share of the time since the answers before it.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length", "skipped"] = "length"
    sample: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def finished(self) -> bool:
        """True where the model ended the answer itself."""
        return self.finish_reason == "stop"

    @property
    def skipped(self) -> bool:
        """True where the prompt was too long to be asked."""
        return self.finish_reason == "skipped"

    @property
    def computed(self) -> int:
        """Tokens that were generated for it, the stop token counted."""
        return len(self.tokens) + self.finished


@dataclass(frozen=True, eq=False)
class _Request:
    """An answer that is asked for: one sample of one prompt."""

    index: int
    sample: int
    prompt: Sequence[int]
    adapter: str | None
    sampling: SamplingParams | None


class Generator:
    """Generates with one model, as a context: inside, the model is in eval mode, its weights must not change, and what
    makes it fast is on; afterwards it is as it was. The engine and its cache stay for all calls of `generate`.

    Args:
        model: a transformers model or a `PeftModel`.
        tokenizer: the model's.
        max_new_tokens: the longest answer.
        num_beams: above 1, beam search without early stopping and with length penalty 1.
        batch_size: requests that run at a time; None chooses what fits.
        merge: compute LoRA merged into copies of the weights, where that changes no more than rounding does.
        own: False generates with transformers' `generate` in any case.
        adapters: the adapters of a `PeftModel` that the prompts name; None for the active ones. Only the own engine
            has several: see ``reason`` in the `report`.

    Attributes:
        report: how it generates, for the summary: ``engine`` is ``"own"`` or ``"transformers"`` (then ``reason`` says
            why), ``fast_paths`` which of them are on, or why not.

    Raises:
        RequestError: a size below 1, an adapter that the model does not have, or one whose base model another has
            changed.
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
        self.stop_token_ids = find_stop_token_ids(model, tokenizer)
        self.report: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._fast_paths: Any = None
        self._engine: Engine | None = None

    def __enter__(self) -> "Generator":
        from llm_adapters.fast_paths.session import FastPaths
        from llm_adapters.generation.forward import unsupported_reason

        check_base(self.model, self.adapters)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            reason: str | None = "asked for"
            if self.own:
                with contextlib.ExitStack() as faster:
                    fast_paths = FastPaths(self.model, inference=True, merge=self.merge, adapters=self.adapters)
                    faster.enter_context(fast_paths)
                    reason = unsupported_reason(fast_paths)
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
        self._fast_paths = self._engine = None
        self._stack.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        on_token: Callable[[int, int], None] | None = None,
        adapter_names: Sequence[str] | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        n: int = 1,
        seed: int = 0,
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
            temperature: what logits are divided by before a token is drawn; 0 draws nothing (greedy, or the beams).
            top_p: draw only from the most probable tokens that together have this probability.
            top_k: draw only from so many most probable tokens; 0 for all.
            n: answers to each prompt, numbered by `Generation.sample`.
            seed: of the random numbers. The same seed gives the same answers to a prompt, whatever else is asked.

        Raises:
            RequestError: as `check_prompts` and `SamplingParams` do; a name that is none of the `adapters`, not one for
                each prompt, or the own engine does not take these adapters; sampling with beams; `on_token` with
                several answers to a prompt.
            WorkError: the model's logits are not numbers.
        """
        if self.adapters is not None and self._fast_paths is None:
            raise RequestError(f"these adapters cannot answer in one batch: {self.report.get('reason', 'closed')}.")
        check_names(adapter_names, self.adapters, len(prompts))
        params = SamplingParams(temperature, top_p, top_k, n, seed)
        if not params.greedy and self.num_beams > 1:
            raise RequestError(f"temperature={temperature} with num_beams={self.num_beams}: beams are not sampled.")
        if on_token is not None and n > 1:
            raise RequestError(f"on_token cannot tell {n} answers to a prompt apart: ask for one.")
        skipped = check_prompts(self.model, prompts, self.max_new_tokens)
        for index in sorted(skipped):
            yield from ((index, Generation(finish_reason="skipped", sample=sample)) for sample in range(n))
        requests = [
            _Request(
                index,
                sample,
                prompt,
                adapter_names[index] if adapter_names is not None else None,
                None if params.greedy else params.sample(prompt, sample),
            )
            for index, prompt in enumerate(prompts)
            if index not in skipped
            for sample in range(n)
        ]
        groups = self._of_one_length(requests)
        dependent = {request for group in groups for request in group}
        if dependent and self.adapters is not None:
            raise RequestError(
                f"{len(dependent)} prompts are too long for several adapters in one batch: the model's rotary "
                "positions depend on the longest row. Ask one adapter after the other."
            )
        answer = self._by_transformers if self._fast_paths is None else self._by_engine
        yield from self._answered(answer, [request for request in requests if request not in dependent], on_token)
        for group in groups:
            yield from self._answered(self._by_transformers, group, on_token)

    def _of_one_length(self, requests: list[_Request]) -> list[list[_Request]]:
        """Groups of the requests that change how the rows beside them are computed, each group of one length."""
        from llm_adapters.fast_paths.routing import prompt_learning

        limit = independent_length(self.model)
        if limit is None:
            return []
        virtual = getattr(prompt_learning(self.model), "num_virtual_tokens", None) or 0
        groups: dict[int, list[_Request]] = {}
        for request in requests:
            if len(request.prompt) + virtual + self.max_new_tokens > limit:
                groups.setdefault(len(request.prompt), []).append(request)
        if groups:
            self.report["lengths"] = (
                f"prompts and answers of more than {limit} tokens are computed with others of the same length, by "
                "transformers: the rotary positions depend on the longest row"
            )
        return [groups[length] for length in sorted(groups, reverse=True)]

    def _answered(
        self,
        answer: Callable[..., Iterator[list[tuple[_Request, list[int]]]]],
        requests: list[_Request],
        on_token: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[int, Generation]]:
        """What `answer` gives for the `requests`, in batches that fit."""
        if not requests:
            return
        size, left = self.size([request.prompt for request in requests]), dict.fromkeys(requests)
        while left:
            started = time.perf_counter()
            try:
                for ended in answer(list(left), size, on_token):
                    share = (time.perf_counter() - started) / len(ended)
                    for request, tokens in ended:
                        del left[request]
                        yield request.index, self._generation(tokens, request.sample, share)
                    started = time.perf_counter()
            except Exception as error:
                if size == 1 or not _out_of_memory(error):
                    raise
                logger.warning("a batch of %d does not fit in memory: going on with %d", size, size // 2)
                size //= 2
                self._engine = None  # and its cache

    def size(self, prompts: Sequence[Sequence[int]]) -> int:
        """Number of requests to run at a time for these `prompts`."""
        if self.batch_size is not None:
            return self.batch_size
        largest = LARGEST_BATCH
        if self._fast_paths is None:
            largest = LARGEST_PADDED_BATCH["cpu" if self.model.device.type == "cpu" else "other"]
        held = self._engine.cache.num_bytes if self._engine is not None else 0
        lengths = list(map(len, prompts))
        return choose_batch_size(self.model, lengths, self.max_new_tokens, self.num_beams, largest, held)

    def _by_engine(
        self, asked: list[_Request], size: int, on_token: Callable[[int, int], None] | None
    ) -> Iterator[list[tuple[_Request, list[int]]]]:
        """Answers of the engine: lists of (request, tokens with the stop token) as answers end."""
        from llm_adapters.generation.engine import Engine
        from llm_adapters.ops.packing import common_prefix

        # The engine of before, unless another call that has not come to its end is using it.
        if self._engine is None or self._engine.has_unfinished:
            self._engine = Engine(self._fast_paths, self.stop_token_ids, num_beams=self.num_beams)
        engine = self._engine
        engine.max_num_seqs = size
        if len(asked) > 1:  # of a single prompt nobody knows what others will begin with
            prompts = [request.prompt for request in asked]
            engine.set_prefix(prompts[0][: common_prefix(prompts)])
        requests: dict[int, _Request] = {}
        answers: dict[int, list[int]] = {}
        try:
            for request in sorted(asked, key=lambda r: (len(r.prompt), r.index), reverse=True):
                number = engine.add(
                    request.prompt,
                    adapter=request.adapter,
                    max_new_tokens=self.max_new_tokens,
                    sampling=request.sampling,
                )
                requests[number], answers[number] = request, []
            while engine.has_unfinished:
                outputs = engine.step()
                for output in outputs:
                    answers[output.request_id] += output.token_ids
                    if on_token is not None:
                        for token in output.token_ids:
                            on_token(requests[output.request_id].index, token)
                ended = [output.request_id for output in outputs if output.finish_reason]
                if ended:
                    yield [(requests[number], answers.pop(number)) for number in ended]
        finally:
            for number in requests:
                engine.cancel(number)

    def _by_transformers(
        self, asked: list[_Request], size: int, on_token: Callable[[int, int], None] | None
    ) -> Iterator[list[tuple[_Request, list[int]]]]:
        """The same of transformers' `generate`, in padded batches of prompts of about the same length."""
        from llm_adapters.generation.padded import generate_batch

        order = sorted(asked, key=lambda request: len(request.prompt), reverse=True)
        for batch in (order[start : start + size] for start in range(0, len(order), size)):
            answers = generate_batch(
                self.model,
                [request.prompt for request in batch],
                pad=self.tokenizer.pad_token_id,
                stop_token_ids=self.stop_token_ids,
                max_new_tokens=self.max_new_tokens,
                num_beams=self.num_beams,
                sampling=[request.sampling for request in batch],
            )
            ended = list(zip(batch, answers, strict=True))
            if on_token is not None:
                for request, tokens in ended:
                    for token in tokens:
                        on_token(request.index, token)
            yield ended

    def _generation(self, tokens: list[int], sample: int, seconds: float) -> Generation:
        stopped = bool(tokens) and tokens[-1] in self.stop_token_ids
        kept = tokens[:-1] if stopped else tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(text, tuple(kept), "stop" if stopped else "length", sample, seconds)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    adapter_names: Sequence[str] | None = None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    n: int = 1,
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[int, Generation]]:
    """`Generator.generate` with a `Generator` for this once; `options` are its.

    Args:
        model: a transformers model or a `PeftModel`.
        tokenizer: the model's.
        prompts: token ids.
        adapter_names: for each prompt the adapter of a `PeftModel` that answers it, ``"__base__"`` for none of them.
            Several answer in one batch, unmerged, where that can be; else one adapter after the other.
        temperature: as of `Generator.generate`, like the next four.
        top_p: likewise.
        top_k: likewise.
        n: likewise.
        seed: likewise.
        options: as of `Generator`.

    Raises:
        RequestError: a name that the model does not have, or not one for each prompt; and as `Generator.generate`.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "n": n, "seed": seed}
    if adapter_names is None:
        with Generator(model, tokenizer, **options) as generator:
            yield from generator.generate(prompts, **sampling)
        return
    from llm_adapters.fast_paths.routing import using

    check_names(adapter_names, adapters_of(model), len(prompts))
    names = list(dict.fromkeys(adapter_names))
    if len(names) > 1:
        with Generator(model, tokenizer, adapters=names, **options) as generator:
            if generator.report["engine"] == "own":
                yield from generator.generate(prompts, adapter_names=adapter_names, **sampling)
                return
            logger.info("one adapter after the other: %s", generator.report["reason"])
    for name in names:
        asked = [index for index, other in enumerate(adapter_names) if other == name]
        with using(model, name), Generator(model, tokenizer, **options) as generator:
            for at, generation in generator.generate([prompts[index] for index in asked], **sampling):
                yield asked[at], generation


def adapters_of(model: "PreTrainedModel") -> list[str]:
    """The adapters that a prompt may name."""
    from llm_adapters.fast_paths.routing import NO_ADAPTER

    return [*getattr(model, "peft_config", ()), NO_ADAPTER]


def check_names(names: Sequence[str] | None, known: Sequence[str] | None, count: int) -> None:
    """Check the adapters that prompts name.

    Args:
        names: the adapter of each prompt; None where none are named.
        known: the adapters that there are; None where none may be named.
        count: the number of prompts.

    Raises:
        RequestError: names without known adapters or the other way round, not one for each prompt, or an unknown one.
    """
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
    """Find the prompts that are too long for `model` to be asked with `max_new_tokens` to come.

    Args:
        model: the model.
        prompts: token ids.
        max_new_tokens: the longest answer.

    Returns:
        Their indices.

    Raises:
        RequestError: all are too long, one is empty or holds a token that the model does not have, or `max_new_tokens`
            is below 1.
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
    """Limit of tokens, prompt and answer together, that `model` can take; a prompt adapter's own are subtracted.

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
    held: int = 0,
) -> int:
    """Number of prompts that fit in half of the free memory at once.

    Args:
        model: the model.
        lengths: tokens of the prompts.
        max_new_tokens: the longest answer.
        num_beams: sequences of each prompt.
        largest: the most sequences.
        held: bytes that count as free, as they belong to the cache that will be used.
    """
    import torch

    config = model.config.get_text_config()
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = torch.finfo(model.dtype).bits // 8
    cache = 2 * config.num_hidden_layers * num_kv_heads * head_dim * item * (max(lengths, default=0) + max_new_tokens)
    # Beside the cache: the cache is copied when beams are reordered, logits and their softmax are float32.
    row = num_beams * (cache * (2 if num_beams > 1 else 1) + 4 * 4 * config.vocab_size)
    return max(1, min(largest // num_beams, (free_memory(model.device) + held) // 2 // row))


def find_stop_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
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
