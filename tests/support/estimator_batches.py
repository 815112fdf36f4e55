"""Random batches for advantage estimators, the same in every process: ragged lengths, ties, K = 1, 2, 8."""

from __future__ import annotations

import random
from dataclasses import dataclass

BATCHES = 200
SIZES = (1, 2, 8)


@dataclass(frozen=True)
class EstimatorBatch:
    """Samples group by group."""

    rewards: list[float]
    """Multiples of 1/8, with many ties."""
    lengths: list[int]
    groups: list[int]
    greedy_rewards: list[float]
    """Of the greedy response to the sample's prompt."""
    probabilities: list[list[float]]
    """[n][length] π of each token."""
    sum_squares: list[list[float]]
    """[n][length] Σ π² at each token."""

    @property
    def energies(self) -> list[list[float]]:
        pairs = zip(self.probabilities, self.sum_squares, strict=True)
        return [[1 - 2 * p + s for p, s in zip(*pair, strict=True)] for pair in pairs]


def ragged_batch(seed: int) -> EstimatorBatch:
    """Three groups of 1, 2 or 8 samples."""
    rng = random.Random(f"ragged {seed}")
    return _batch(rng, [rng.choice(SIZES) for _ in range(3)])


def equal_batch(seed: int) -> EstimatorBatch:
    """Two to four groups of the same size, 2 or 8."""
    rng = random.Random(f"equal {seed}")
    return _batch(rng, [SIZES[1 + seed % 2]] * rng.randint(2, 4))


def _batch(rng: random.Random, sizes: list[int]) -> EstimatorBatch:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    levels = rng.choice([(0, 8), (0, 4, 8), (-8, 0, 8), tuple(range(-8, 9))])
    rewards = [rng.choice(levels) / 8 for _ in groups]
    if rng.random() < 0.3:
        agreeing = rng.randrange(len(sizes))
        rewards = [0.625 if g == agreeing else r for r, g in zip(rewards, groups, strict=True)]
    greedy = [rng.choice(levels) / 8 for _ in sizes]
    lengths = [rng.randint(1, 6) for _ in groups]
    probabilities = [[rng.uniform(0.01, 0.99) for _ in range(length)] for length in lengths]
    sum_squares = [[p * p + (1 - p) ** 2 * rng.uniform(0.1, 1) for p in row] for row in probabilities]
    return EstimatorBatch(rewards, lengths, groups, [greedy[g] for g in groups], probabilities, sum_squares)
