"""Sampling: the choice of the next tokens by temperature, top-k and top-p, each request with a seed of its own."""

from collections.abc import Sequence

import torch

from llm_adapters.generation.decoding import Greedy
from llm_adapters.generation.sampling_params import SamplingParams
from llm_adapters.ops.sampling import sampled_scores


class Sampling(Greedy):
    """Greedy decoding of scores to which noise is added, where a request asks for it (`ops.sampling`).

    What a token is drawn with depends on the request's seed and on the token's place in the answer alone. So drafts are
    verified as in greedy decoding, and an answer is the same in any company.
    """

    def __init__(self, stop_token_ids: Sequence[int], device: torch.device) -> None:
        super().__init__(stop_token_ids, device)
        self._params: list[SamplingParams | None] = []  # of each slot; None for greedy decoding

    def grow(self, num_slots: int, max_new_tokens: int) -> None:
        """See `DecodingStrategy`."""
        super().grow(num_slots, max_new_tokens)
        self._params += [None] * (num_slots - len(self._params))

    def begin(
        self, slots: list[int], limits: list[int], sampling: Sequence[SamplingParams | None], logits: torch.Tensor
    ) -> None:
        """See `DecodingStrategy`."""
        for slot, params in zip(slots, sampling, strict=True):
            self._params[slot] = params
        super().begin(slots, limits, sampling, logits)

    def _scores(self, slots: list[int], counts: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return with_noise([self._params[slot] for slot in slots], counts, logits)


def with_noise(sampling: Sequence[SamplingParams | None], counts: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Scores whose largest is the next token; where nothing is sampled, the logits themselves.

    Args:
        sampling: of each request; None for greedy decoding.
        counts: tokens of each answer, (requests, 1), int64.
        logits: (requests, query tokens, vocabulary), what follows each of neighbouring tokens.
    """
    rows = [row for row, params in enumerate(sampling) if params is not None]
    steps = counts + torch.arange(logits.shape[1], device=logits.device)
    if len(rows) == len(sampling):
        return _drawn([params for params in sampling if params is not None], steps, logits)
    if not rows:
        return logits
    scores = logits.to(torch.float32, copy=True)
    scores[rows] = _drawn([params for params in sampling if params is not None], steps[rows], logits[rows])
    return scores


def _drawn(sampling: Sequence[SamplingParams], steps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    device = logits.device
    # A seed does not fit in a float, nor a probability in an integer.
    seeds, top_k = torch.tensor([(p.seed, p.top_k) for p in sampling], device=device).view(-1, 2, 1, 1).unbind(1)
    pairs = torch.tensor([(p.temperature, p.top_p) for p in sampling], dtype=torch.float64, device=device)
    temperature, top_p = pairs.view(-1, 2, 1, 1).unbind(1)
    filters = (top_k, top_p) if any(p.filters for p in sampling) else (None, None)
    return sampled_scores(logits, seeds, steps[..., None], temperature.float(), *filters)
