"""The assumed distribution of response lengths: exponential, truncated at the limit M.

    P(l > t) = e^(−t/τ) for t < M,  mean = τ (1 − e^(−M/τ))

Every token is equally likely to be the last.  τ follows from the mean.  It is the distribution that assumes
least once mean and limit are given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Lengths:
    """The lengths of one step's samples, in tokens."""

    samples: int
    """Number of samples."""
    prompt: float
    """Mean."""
    response: float
    """Mean."""
    longest_prompt: int
    longest_response: int

    @property
    def tokens(self) -> float:
        """Tokens of a step, prompts and responses."""
        return self.samples * (self.prompt + self.response)

    @cached_property
    def scale(self) -> float:
        """τ; infinite where every response is truncated."""
        mean, longest = self.response, float(self.longest_response)
        if mean >= 0.999 * longest:
            return math.inf
        low, high = mean, 1e6 * longest
        for _ in range(200):
            middle = math.sqrt(low * high)
            if middle * -math.expm1(-longest / middle) < mean:
                low = middle
            else:
                high = middle
        return low

    def alive(self, token: float) -> float:
        """Fraction of responses that are longer than `token` tokens."""
        return math.exp(-token / self.scale)

    def responses(self) -> list[int]:
        """A step's response lengths: the quantiles of the distribution."""
        return [
            max(1, min(self.longest_response, round(-self.scale * math.log((i + 0.5) / self.samples))))
            if math.isfinite(self.scale)
            else self.longest_response
            for i in range(self.samples)
        ]
