"""Unbiased pass@k from n ≥ k samples per problem, and its confidence interval.

With c of n samples correct, k chosen without replacement are all wrong with probability
C(n − c, k)/C(n, k), so pass@k = 1 − Π_{i=n−c+1}^{n} (1 − k/i) (Chen et al. 2021, arXiv 2107.03374).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES = 2000


def pass_at_k(correct: Tensor, samples: int, k: int) -> Tensor:
    """[problems] float64: the probability that k of `samples` samples include a correct one, where
    correct [problems] of them are correct."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, not {samples}")
    factors = 1 - k / torch.arange(1, samples + 1, dtype=torch.float64)
    # With c correct: the product over i = n − c + 1 … n; the factor of i = k is 0.
    table = torch.cat((torch.ones(1, dtype=torch.float64), factors.flip(0).cumprod(0)))
    return 1 - table[correct.long()]


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, … below `samples`, and `samples` itself."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples]


def bootstrap_interval(values: Sequence[float] | Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over problems, which are resampled."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[chosen].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
