"""The generation engine: requests come at any time, and all that run share every forward (continuous batching).

    engine = Engine(fast_paths, stop_token_ids, max_num_seqs=256)
    request_id = engine.add(prompt_ids, max_new_tokens=256)    # at any time, also between steps
    while engine.has_unfinished:
        for output in engine.step():
            output.request_id, output.token_ids, output.finish_reason

A forward computes the next tokens of each running request and the whole prompts of those that begin, in one row (see
`ops.kv_cache`): a request that ends makes room for the next one in the same moment. The prefix that prompts share is
computed once by each adapter and kept.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from llm_adapters.errors import RequestError, unknown
from llm_adapters.fast_paths.routing import NO_ADAPTER
from llm_adapters.fast_paths.session import FastPaths
from llm_adapters.generation.decoding import BeamSearch, DecodingStrategy
from llm_adapters.generation.forward import forward_logits, learned_prefix
from llm_adapters.generation.sampling import Sampling
from llm_adapters.generation.sampling_params import SamplingParams
from llm_adapters.ops.kv_cache import DecodeBatch, ForwardBatch, PagedCache, num_blocks
from llm_adapters.ops.packing import Pack, common_prefix
from llm_adapters.ops.sizes import padded_size

_ROW_STEP = 16  # tokens are computed in such numbers (see `ops.sizes`)
MAX_PREFILL_TOKENS = 1024  # of new prompts in one forward: more makes no product faster, and running requests wait

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class RequestOutput:
    """Result of one step for a request.

    Attributes:
        request_id: as `Engine.add` returned it.
        token_ids: new tokens, the stop token included; of beam search all of them, when the request ends.
        finish_reason: ``"stop"`` for a stop token, ``"length"`` for `max_new_tokens`, None while it is running.
    """

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass
class _Request:
    """A request that is waiting or running; `prompt` begins with places for a learned prefix."""

    request_id: int
    prompt: list[int]
    adapter: int
    max_new_tokens: int
    sampling: SamplingParams | None = None

    @property
    def max_len(self) -> int:
        return len(self.prompt) + self.max_new_tokens


class Engine:
    """Answers requests with a model whose fast paths are on. The cache grows with what is asked, and is kept.

    Args:
        fast_paths: the model's, on, for inference, with `packs`.
        stop_token_ids: the tokens that end an answer.
        num_beams: 1 for greedy decoding and sampling, as each request says.
        max_num_seqs: the most requests that run at a time; may be changed between steps.
    """

    def __init__(
        self, fast_paths: FastPaths, stop_token_ids: Sequence[int], *, num_beams: int = 1, max_num_seqs: int = 256
    ) -> None:
        self.fast_paths, self._max_num_seqs = fast_paths, max_num_seqs
        self._device: torch.device = fast_paths.base.device
        self._stops = frozenset(stop_token_ids)
        self._strategy: DecodingStrategy = (
            Sampling(stop_token_ids, self._device)
            if num_beams == 1
            else BeamSearch(num_beams, stop_token_ids, self._device)
        )
        self.cache = PagedCache(0, 0, self._device)
        with torch.no_grad():
            self._learned = learned_prefix(fast_paths.model)
        # A learned prefix takes the places of so many tokens that all prompts begin with, and that are never computed.
        self._num_learned = self._learned[0][0].shape[1] if self._learned else 0
        self._ids = itertools.count()
        self._waiting: dict[int, deque[_Request]] = {n: deque() for n in range(fast_paths.adapter_count)}
        self._running: dict[int, _Request] = {}  # by slot
        self._misfits: set[int] = set()  # waiting requests that do not begin with the prefix
        self._grows = False  # requests have come, or the prefix has changed, since the cache was last made to fit
        self._prefix: list[int] = []
        self._compute_prefix([0] * self._num_learned)

    @property
    def max_num_seqs(self) -> int:
        """The most requests that run at a time."""
        return self._max_num_seqs

    @max_num_seqs.setter
    def max_num_seqs(self, value: int) -> None:
        self._max_num_seqs, self._grows = value, self.has_unfinished

    @property
    def has_unfinished(self) -> bool:
        """True while a request is waiting or running."""
        return bool(self._running) or any(self._waiting.values())

    def add(
        self,
        prompt: Sequence[int],
        *,
        adapter: str | None = None,
        max_new_tokens: int = 256,
        sampling: SamplingParams | None = None,
    ) -> int:
        """Add a request; it begins in one of the next steps, after those of the same adapter that came before.

        Args:
            prompt: token ids.
            adapter: the name of one of the adapters that `fast_paths` was given; None for the model as it is.
            max_new_tokens: the longest answer.
            sampling: None for greedy decoding, or beam search if it is the engine's.

        Returns:
            Its number.

        Raises:
            RequestError: the prompt is empty, the limit below 1, or the adapter unknown; sampling with beam search, or
                several samples in one request.
        """
        if not prompt:
            raise RequestError("the prompt is empty: a model needs a token to go on from.")
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={max_new_tokens} is too small: give 1 or more.")
        if sampling is not None and self._strategy.num_beams > 1:
            raise RequestError(f"num_beams={self._strategy.num_beams}: beam search does not sample.")
        if sampling is not None and sampling.n > 1:
            raise RequestError(f"n={sampling.n}: add a request for each sample (`SamplingParams.sample`).")
        sampling = None if sampling is None or sampling.greedy else sampling
        number, ids = self._adapter_number(adapter), [0] * self._num_learned + list(prompt)
        request = _Request(next(self._ids), ids, number, max_new_tokens, sampling)
        self._waiting[number].append(request)
        if not self._fits(request):
            self._misfits.add(request.request_id)
        self._grows = True
        return request.request_id

    @torch.inference_mode()
    def cancel(self, request_id: int) -> None:
        """Drop a request that is waiting or running; nothing more comes of it. One that has ended is left as it is."""
        self._misfits.discard(request_id)
        for queue in self._waiting.values():
            for request in queue:
                if request.request_id == request_id:
                    queue.remove(request)
                    return
        for slot, request in self._running.items():
            if request.request_id == request_id:
                self._release(slot)
                return

    @torch.inference_mode()
    def set_prefix(self, prefix: Sequence[int]) -> None:
        """Compute the beginning that the next prompts share, by each adapter, unless it is the one that is kept.

        Requests that do not begin with it are answered too: they wait until no other is running, and the engine takes
        what all that wait begin with for the prefix then.

        Args:
            prefix: token ids; none for no shared prefix.

        Raises:
            RequestError: requests are running, on the prefix that there is.
        """
        wanted = [0] * self._num_learned + list(prefix)
        if wanted == self._prefix:
            return
        if self._running:
            raise RequestError(
                f"the shared prefix cannot change while {len(self._running)} requests are running: step until "
                "they have ended, or cancel them."
            )
        self._compute_prefix(wanted)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One forward: one or more new tokens for each running request, the first ones for those that begin.

        Raises:
            WorkError: the model's logits are not numbers.
        """
        # 1. Schedule: waiting requests of one adapter take free slots. Running ones are in the order of their adapters.
        decoding = sorted(self._running, key=lambda slot: (self._running[slot].adapter, slot))
        prefills, adapter = self._schedule()
        if not decoding and not prefills:
            return []
        # 2. Propose: the last token of each running request, and draft tokens after it.
        proposed = self._strategy.propose(decoding) if decoding else []
        # 3. Forward: all of these tokens and the new prompts, in one row; a prompt that several have is computed once.
        sources = self._sources(prefills)
        *logits, prompt_logits = self._forward(proposed, list(dict.fromkeys(sources)), adapter)
        # 4. Verify and append: drafts are kept as far as the model agrees; one more token in any case.
        for (slots, input_tokens), part in zip(proposed, logits, strict=True):
            self._advance(slots, input_tokens, part)
        if prefills:
            self._begin(prefills, sources, prompt_logits)
        # 5. Retire: requests that have ended free their slots and blocks.
        outputs = self._retire()
        if not any(self._waiting.values()):
            self.cache.compact()
        return outputs

    # --- 1. schedule

    def _schedule(self) -> tuple[list[int], int]:
        """Give free slots to waiting requests of the adapter that most are waiting for; returns the slots, and it."""
        if self._misfits and not self._running:
            prompts = [request.prompt for queue in self._waiting.values() for request in queue]
            self._compute_prefix(prompts[0][: max(self._num_learned, common_prefix(prompts))])
        if self._grows:
            self._grow()
        # Nobody overtakes a request that waits for another prefix, or it might wait for ever.
        barrier = min(self._misfits, default=None)
        ready = {
            adapter: queue
            for adapter, queue in self._waiting.items()
            if queue and (barrier is None or queue[0].request_id < barrier)
        }
        if not ready:
            return [], 0
        prefills: list[int] = []
        adapter = max(ready, key=lambda number: len(ready[number]))
        queue, budget = ready[adapter], MAX_PREFILL_TOKENS
        for slot in (slot for slot in range(self.max_num_seqs) if slot not in self._running):
            if not queue or (barrier is not None and queue[0].request_id >= barrier):
                break
            again = bool(prefills) and queue[0].prompt == self._running[prefills[-1]].prompt
            size = 0 if again else len(queue[0].prompt) - len(self._prefix)
            if len(self._running) >= self.max_num_seqs or (prefills and budget < size):
                break
            self._running[slot] = queue.popleft()
            budget -= size
            prefills.append(slot)
        return prefills, adapter

    def _sources(self, slots: list[int]) -> list[int]:
        """For each slot whose request begins, the first one with the same prompt."""
        first: dict[tuple[int, ...], int] = {}
        return [first.setdefault(tuple(self._running[slot].prompt), slot) for slot in slots]

    def _grow(self) -> None:
        """Make the cache large enough for the largest requests that may ever run together: none meets its end."""
        waiting = itertools.chain.from_iterable(self._waiting.values())
        requests = [*self._running.values(), *waiting]
        num_slots, num_beams = min(self.max_num_seqs, len(requests)), self._strategy.num_beams
        num_slots = max([num_slots, *(1 + slot for slot in self._running)])
        lengths = heapq.nlargest(num_slots, (request.max_len - len(self._prefix) for request in requests))
        self.cache.grow(num_slots * num_beams, lengths[0], num_beams * sum(map(num_blocks, lengths)))
        self._strategy.grow(num_slots, max(request.max_new_tokens for request in requests))
        self._grows = False

    def _fits(self, request: _Request) -> bool:
        size = len(self._prefix)
        return len(request.prompt) > size and request.prompt[:size] == self._prefix

    def _compute_prefix(self, prefix: list[int]) -> None:
        """Have the cache hold the keys and values of `prefix`, which begins with the places of a learned one."""
        self._prefix = []
        self.cache.clear_prefix()
        for layer, (keys, values) in enumerate(self._learned):
            self.cache.keep_prefix(layer, keys, values)
        for adapter in range(self.fast_paths.adapter_count) if len(prefix) > self._num_learned else ():
            pack = Pack.of([prefix], self._num_learned, self._device)
            batch = ForwardBatch(self.cache, (), pack, None, adapter)
            forward_logits(self.fast_paths, batch, torch.zeros(0, dtype=torch.int64, device=self._device))
        self._prefix, self._grows = prefix, any(self._waiting.values())
        waiting = itertools.chain.from_iterable(self._waiting.values())
        self._misfits = {request.request_id for request in waiting if not self._fits(request)}

    def _adapter_number(self, adapter: str | None) -> int:
        route = self.fast_paths.route
        if route is None:
            if adapter is not None:
                raise RequestError(
                    f"adapter={adapter!r} is named, and the engine has no adapters: give `FastPaths(adapters=)`."
                )
            return 0
        name = NO_ADAPTER if adapter is None else adapter
        if name not in route.names:
            raise unknown("adapter", name, route.names)
        return int(route.names.index(name))

    # --- 3. forward

    def _forward(
        self, proposed: list[tuple[list[int], torch.Tensor]], prefills: list[int], adapter: int
    ) -> list[torch.Tensor]:
        """Logits of one forward.

        Args:
            proposed: slots and their input tokens, for each number of query tokens.
            prefills: the slots whose prompts are computed.
            adapter: of these.

        Returns:
            What follows the tokens of each part of `proposed`, (sequences, query tokens, vocabulary), and the prompts,
            (prefills, vocabulary).
        """
        count = sum(tokens.numel() for _, tokens in proposed)
        padding = padded_size(count, _ROW_STEP) - count  # all in the first part, which has the fewest query tokens
        decodes, row = [], [torch.zeros(0, dtype=torch.int64, device=self._device)]
        for slots, tokens in proposed:
            decode = self._decode_batch(slots, tokens.shape[1], padding // tokens.shape[1])
            row.append(nn.functional.pad(tokens, (0, 0, 0, len(decode.seqs) - len(tokens))).flatten())
            decodes.append(decode)
            padding = 0
        batch = ForwardBatch(self.cache, decodes, *self._prefill_pack(prefills), adapter)
        logits = forward_logits(self.fast_paths, batch, torch.cat(row))
        *parts, prompts = logits.split([*(len(part) for part in row[1:]), len(prefills)])
        found = [
            part.view(-1, tokens.shape[1], part.shape[-1])[: len(tokens)]
            for part, (_, tokens) in zip(parts, proposed, strict=True)
        ]
        return [*found, prompts]

    def _prefill_pack(self, prefills: list[int]) -> tuple[Pack | None, list[int] | None]:
        """The prompts that are computed, and the first sequence of each."""
        if not prefills:
            return None, None
        pack = Pack.of([self._running[slot].prompt for slot in prefills], len(self._prefix), self._device)
        seqs = [slot * self._strategy.num_beams for slot in prefills]
        for seq, length in zip(seqs, pack.lengths, strict=True):
            self.cache.reserve(seq, length)
        return pack, seqs

    def _decode_batch(self, slots: list[int], num_query_tokens: int, padding: int) -> DecodeBatch:
        """Neighbouring tokens of all sequences of the `slots`, from the last token that each has.

        Args:
            slots: the slots.
            num_query_tokens: tokens of each sequence.
            padding: rows more that belong to no sequence.
        """
        seqs: list[int] = []
        spans: list[tuple[int, int]] = []  # the first position, and the last one that may be asked
        adapters: list[int] = []
        for slot in slots:
            request = self._running[slot]
            first = len(request.prompt) + self._strategy.num_tokens[slot] - 1
            last = request.max_len - 2  # nothing follows the last token of an answer
            for seq in self._seqs(slot):
                self.cache.reserve(seq, min(first + num_query_tokens - 1, last) - len(self._prefix) + 1)
                seqs.append(seq)
                spans.append((first, last))
                adapters.append(request.adapter)
        first_at, last_at = torch.tensor(spans + [(0, -1)] * padding, device=self._device).split(1, 1)
        positions = first_at + torch.arange(num_query_tokens, device=self._device)
        valid = positions <= last_at
        positions = positions.minimum(last_at.clamp(min=0))
        return DecodeBatch(tuple(seqs) + (-1,) * padding, positions, valid, tuple(adapters) + (0,) * padding)

    def _seqs(self, slot: int) -> range:
        """The sequences of a slot, one for each beam."""
        num_beams = self._strategy.num_beams
        return range(slot * num_beams, (slot + 1) * num_beams)

    # --- 4. verify and append

    def _advance(self, slots: list[int], input_tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """More tokens for running requests; where beams go on from others, blocks are copied."""
        parents = self._strategy.advance(slots, input_tokens, logits)
        if parents is None:
            return
        seqs = torch.tensor([list(self._seqs(slot)) for slot in slots], device=self._device)
        source = seqs.gather(1, parents)
        moved = source != seqs
        if moved.any():
            # The beams of a request share its prompt.
            changed = moved.any(1).nonzero().flatten().tolist()
            shortest = min(len(self._running[slots[row]].prompt) for row in changed) - len(self._prefix)
            self.cache.copy(source[moved], seqs[moved], num_blocks(shortest + 1) - 1)

    def _begin(self, slots: list[int], sources: list[int], logits: torch.Tensor) -> None:
        """The first token of requests that begin; requests with the same prompt, and all beams, get a copy of it.

        Args:
            slots: the slots.
            sources: for each the slot whose prompt has been computed.
            logits: what follows each prompt that has been computed, (prompts, vocabulary).
        """
        requests = [self._running[slot] for slot in slots]
        copies = [(source, slot) for source, slot in zip(sources, slots, strict=True) if source != slot]
        if copies:
            rows = {slot: row for row, slot in enumerate(dict.fromkeys(sources))}
            logits = logits[torch.tensor([rows[source] for source in sources], device=self._device)]
            for _, slot in copies:
                self.cache.reserve(self._seqs(slot)[0], len(self._running[slot].prompt) - len(self._prefix))
            source_seqs, seqs = torch.tensor(copies, device=self._device).mul(self._strategy.num_beams).unbind(1)
            self.cache.copy(source_seqs, seqs)
        limits, sampling = [r.max_new_tokens for r in requests], [r.sampling for r in requests]
        self._strategy.begin(slots, limits, sampling, logits)
        first = torch.tensor([self._seqs(slot)[0] for slot in slots], device=self._device)
        for beam in range(1, self._strategy.num_beams):
            for slot, request in zip(slots, requests, strict=True):
                self.cache.reserve(self._seqs(slot)[beam], len(request.prompt) - len(self._prefix))
            self.cache.copy(first, first + beam)

    # --- 5. retire

    def _retire(self) -> list[RequestOutput]:
        """The new tokens of all running requests; those that have ended leave."""
        outputs, slots = [], list(self._running)
        for slot, (tokens, ended) in zip(slots, self._strategy.take(slots), strict=True):
            request = self._running[slot]
            reason: FinishReason | None = None
            if ended:
                reason = "stop" if tokens and tokens[-1] in self._stops else "length"
                self._release(slot)
            if tokens or ended:
                outputs.append(RequestOutput(request.request_id, tokens, reason))
        return outputs

    def _release(self, slot: int) -> None:
        del self._running[slot]
        for seq in self._seqs(slot):
            self.cache.release(seq)
