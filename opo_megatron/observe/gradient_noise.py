"""What the responses to a prompt add to the gradient's variance, from a run's variance reports."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from opo_megatron.observe.metrics_file import MetricsRow

UNBIASED = (
    "none", "rloo", "opo_loo", "energy_loo", "auto", "otb_loo", "james_stein", "james_stein_auto", "remax",
    "true_norm_loo",
)  # fmt: skip
"""Unbiased estimators, whose variances can be compared directly."""
RESAMPLES = 500


class Noise(NamedTuple):
    """Relative to RLOO's, with a 95 % bootstrap interval over reports."""

    value: float
    low: float
    high: float


def variance_reports(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The rows that have a report."""
    return [row for row in rows if "variance/rloo" in row]


def relative_noise(reports: Sequence[MetricsRow]) -> dict[str, float]:
    """What the responses to a prompt add to the variance, under each unbiased estimator, RLOO's being 1.

    Sums over reports, because single ones are noisy; the part that prompts make is taken off where known.
    """
    names = [name for name in UNBIASED if reports and all(f"variance/{name}" in row for row in reports)]
    noise = {
        name: sum(row[f"variance/{name}"] - row.get("variance/between_prompts", 0.0) for row in reports)
        for name in names
    }
    return {name: value / noise["rloo"] for name, value in noise.items()} if noise.get("rloo", 0) > 0 else {}


def noise_intervals(reports: Sequence[MetricsRow], seed: int = 0) -> dict[str, Noise]:
    """`relative_noise` with intervals, by resampling reports."""
    rng, samples = random.Random(seed), []
    for _ in range(RESAMPLES):
        resampled = relative_noise([rng.choice(reports) for _ in reports])
        if resampled:
            samples.append(resampled)
    result: dict[str, Noise] = {}
    for name, value in relative_noise(reports).items() if samples else ():
        ordered = sorted(sample[name] for sample in samples)
        low, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.025, 0.975))
        result[name] = Noise(value, low, high)
    return result
