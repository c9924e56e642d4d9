"""Sampling: which tokens may be drawn (temperature, top-k, top-p), and the draw, without any state.

A draw is the maximum of the logits and Gumbel noise (the Gumbel-max trick): token i is the largest with probability
softmax(logits)[i]. The noise is a function of a seed, of the token's place in the answer and of the token: a draw
depends on nothing else, neither on the neighbours in the batch nor on what was drawn before.
"""

import torch

from llm_adapters.ops.hashing import hash32, split_seed


def sampled_scores(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores whose largest is the token that is drawn; float32, the shape of `logits`.

    Args:
        logits: (..., vocabulary), of any floating type.
        seeds: int64, and like the others of a shape that broadcasts against (..., 1).
        steps: int64, the number of tokens in the answer before the one that is drawn.
        temperature: float32, above 0.
        top_k: as of `filtered`; None where neither it nor `top_p` leaves any token out.
        top_p: likewise.
    """
    scores = scaled(logits, temperature)
    if top_k is not None and top_p is not None:
        scores = filtered(scores, top_k, top_p)
    return scores + gumbel(seeds, steps, logits.shape[-1])


def scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logits divided by the temperature, less the largest, so that no temperature is too small or large; float32."""
    logits, limits = logits.float(), torch.finfo(torch.float32)
    return (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(limits.tiny, limits.max)


def filtered(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Scores with -inf for what may not be drawn.

    First all but the `top_k` largest (what is as large as the smallest of these is kept too); then, of those that are
    left, all but the most probable that together reach `top_p` (nucleus sampling, Holtzman et al. 2020). The most
    probable token is kept in any case.

    Args:
        scores: (..., vocabulary).
        top_k: int64; 0 keeps all.
        top_p: float64, above 0; 1 keeps all.
    """
    ordered, places = scores.sort(-1)  # the least probable first: their sums are exact
    vocabulary = scores.shape[-1]
    first = torch.where((top_k > 0) & (top_k < vocabulary), vocabulary - top_k, 0)
    least = ordered.gather(-1, first.expand(*scores.shape[:-1], 1))
    probabilities = ordered.masked_fill(ordered < least, -torch.inf).softmax(-1)
    dropped = probabilities.cumsum(-1) <= (1 - top_p).float()
    dropped[..., -1] = False
    return scores.masked_fill(torch.empty_like(dropped).scatter_(-1, places, dropped), -torch.inf)


def gumbel(seeds: torch.Tensor, steps: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise for each token, float32: -log of what an exponential distribution gives.

    Args:
        seeds: int64, (..., 1).
        steps: int64, of a shape that broadcasts against it.
        vocabulary: the number of tokens.

    Returns:
        (..., vocabulary).
    """
    bits = hash32(torch.arange(vocabulary, dtype=torch.int32, device=seeds.device), split_seed(seeds, steps))
    # 31 bits are a probability; float32 is finest near 0, where the exponential is small and the token likely to win.
    u = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
