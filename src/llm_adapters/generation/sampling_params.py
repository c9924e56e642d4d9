"""What a request says about sampling, in vLLM's words."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_adapters.errors import RequestError

MAX_SAMPLES = 16_384
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen.

    Attributes:
        temperature: what logits are divided by; 0 is greedy decoding, always the most probable token.
        top_p: only the most probable tokens that together have this probability may be drawn; 1 for all.
        top_k: only so many most probable tokens may be drawn; 0 for all.
        n: answers to each prompt.
        seed: of the random numbers.

    Raises:
        RequestError: a value that makes no sense, or several answers of greedy decoding, which would all be the same.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.temperature < math.inf:
            raise RequestError(
                f"temperature={self.temperature} is no temperature: give 0 (greedy) or a number above it, such as 0.7."
            )
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p} is no probability above 0: give up to 1, which keeps all tokens.")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise RequestError(f"top_k={self.top_k} is out of range: give 1 to 2^31 - 1, or 0, which keeps all tokens.")
        if not 1 <= self.n <= MAX_SAMPLES:
            raise RequestError(f"{self.n} samples cannot be asked for: give 1 to {MAX_SAMPLES:,}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed={self.seed} is out of range: give 0 to 2^63 - 1.")
        if self.greedy and self.n > 1:
            raise RequestError(f"{self.n} samples at temperature 0 would all be the same: give a temperature above 0.")
        if self.greedy and (self.filters or self.seed):
            raise RequestError("top_p, top_k and seed do nothing at temperature 0: give a temperature above 0.")

    @property
    def greedy(self) -> bool:
        """True where nothing is random."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """True where some tokens may not be drawn."""
        return self.top_p < 1 or self.top_k > 0

    def sample(self, prompt: Sequence[int], number: int) -> "SamplingParams":
        """Parameters of one of the `n` answers to `prompt`, with a seed that depends on nothing but these and `seed`.

        Args:
            prompt: token ids.
            number: of the answer, from 0.
        """
        words = ",".join(map(str, (self.seed, number, *prompt)))
        digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
        return dataclasses.replace(self, n=1, seed=int.from_bytes(digest, "big") >> 1)
