"""Arms: runs that differ only in their seed, and their means.

Curves show the mean over an arm's runs with a band from the lowest to the highest of them; tables show
the mean ± the half width of its 95 % confidence interval, t·s/√n with Student's t for n − 1 degrees of
freedom and the sample standard deviation s.  A mean covers only the steps that all runs with the metric have,
so that it never jumps where a run ends; the tails of longer runs are plotted separately.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opo_megatron.observe.off_policy import off_policy_words
from opo_megatron.report.runs import Run

SAME_ARM = ("run.seed", "run.dir", "resume")
"""Settings in which the runs of an arm may differ."""

MAX_POINTS = 200
"""Points of a curve; longer curves are binned over consecutive steps."""

_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t at 97.5 % for 1 to 30 degrees of freedom; the last value is used for more."""


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe."""

    name: str
    """The settings that distinguish it from the other arms, such as baseline=rloo."""
    runs: list[Run]

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    @property
    def title(self) -> str:
        count = len(self.runs)
        return f"{self.name} ({count} run{'s' if count > 1 else ''})"


class Band(NamedTuple):
    """An arm's curve: [n] steps, mean, minimum and maximum over its runs."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    runs: int
    """The number of runs that have the metric."""
    tails: list[tuple[NDArray[np.float64], NDArray[np.float64]]]
    """(steps, values) of longer runs, from the last common step on."""


class Mean(NamedTuple):
    """The mean of one number per run."""

    value: float
    half_width: float | None
    """Half width of the 95 % confidence interval; None for a single run."""
    runs: int


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order of their first run."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(repr(sorted(_fixed(run).items())), []).append(run)
    groups = list(by_settings.values())
    return [
        Arm(off_policy_mark(group[0].settings) + name, group)
        for name, group in zip(_names(groups), groups, strict=True)
    ]


def off_policy_mark(settings: dict[str, Any]) -> str:
    """Prefix of the name of an arm that trains on responses of earlier weights."""
    replay = settings.get("rollout.replay.method", "off")
    words = off_policy_words(settings.get("rollout.staleness", 0), replay)
    return f"{words} " if words else ""


def _fixed(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key not in SAME_ARM}


def differing_keys(arms: Sequence[Arm]) -> list[str]:
    """Settings that differ between arms, in the recipe's order."""
    return _differing([arm.settings for arm in arms])


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one if key not in SAME_ARM)
    return [key for key in keys if len({_value(one, key) for one in settings}) > 1]


def _value(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "absent"


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """For each arm, few settings that distinguish it from all others, chosen greedily."""
    settings = [group[0].settings for group in groups]
    if len(groups) == 1:
        baseline = settings[0].get("algorithm.baseline")
        return [groups[0][0].name if baseline is None else f"baseline={baseline}"]
    chosen: list[str] = []

    def distinct(keys: Sequence[str]) -> int:
        return len({tuple(_value(one, key) for key in keys) for one in settings})

    differing = _differing(settings)
    while distinct(chosen) < len(groups):
        # `max` takes the first of equally good keys: presets come before the keys that they set.
        chosen.append(max(differing, key=lambda key: distinct([*chosen, key])))
    ends = [key.rpartition(".")[2] for key in chosen]
    labels = [end if ends.count(end) == 1 else key for end, key in zip(ends, chosen, strict=True)]
    return [
        ", ".join(f"{label}={_text(one, key)}" for label, key in zip(labels, chosen, strict=True))
        for one in settings
    ]


def _text(settings: dict[str, Any], key: str) -> str:
    return setting_text(settings[key]) if key in settings else "absent"


def setting_text(value: Any) -> str:
    """A setting as a recipe writes it (null, true, false)."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def band(arm: Arm, metric: str) -> Band | None:
    """The arm's curve of a metric; None where no run has it."""
    series = [one for run in arm.runs if (one := run.series(metric))]
    if not series:
        return None
    common = sorted(set.intersection(*(set(one) for one in series)))
    values = np.array([[one[step] for step in common] for one in series]).reshape(len(series), len(common))
    last = common[-1] if common else -1
    size = bin_size(max(map(len, series)))
    tails = [
        binned(np.array(beyond, dtype=float), np.array([one[step] for step in beyond]), size, metric)
        for one in series
        if len(beyond := [step for step in sorted(one) if step >= last]) > 1
    ]
    steps = np.array(common, dtype=float)
    if not common:
        return Band(steps, steps, steps, steps, len(series), tails)
    curves = [binned(steps, one, size, metric) for one in values]
    points = np.array([one for _, one in curves])
    return Band(curves[0][0], points.mean(0), points.min(0), points.max(0), len(series), tails)


def bin_size(points: int) -> int:
    """Consecutive points per bin, so that a curve has at most `MAX_POINTS`."""
    return max(1, math.ceil(points / MAX_POINTS))


def binned(
    steps: NDArray[np.float64], values: NDArray[np.float64], size: int, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bins of `size` points: the last step, and the mean of the values (the maximum for `…max` metrics)."""
    if size == 1:
        return steps, values
    edges = np.arange(0, len(steps), size)
    if metric.endswith("max"):
        return steps[np.minimum(edges + size, len(steps)) - 1], np.maximum.reduceat(values, edges)
    counts = np.diff(np.append(edges, len(steps)))
    return steps[np.minimum(edges + size, len(steps)) - 1], np.add.reduceat(values, edges) / counts


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of one value per run, with the half width of its 95 % confidence interval."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Mean(mean, _T[min(count - 1, len(_T)) - 1] * deviation / math.sqrt(count), count)
