"""The claims of the OPO paper (arXiv 2505.23585) as differences between arms, and their verdicts.

A claim compares a measure of two arms, paired by seed: both start from that seed's weights.  With the paired
differences d₁ … dₙ over n ≥ 2 seeds, their mean d and sample standard deviation s, the 95 % interval is
d ± t·s/√n with Student's t for n − 1 degrees of freedom.  Oriented so that the claimed side is above 0:

    reproduced                                        the interval excludes 0 on the claimed side
    not reproduced: no difference seen                it contains 0
    not reproduced: the opposite                      it excludes 0 on the other side
    not testable at this scale                        no arm measures it

Intervals are not corrected for multiple comparisons: of twenty true zeros, one is expected to be excluded.
Seeds vary the warm start, the prompts and the sampling; the held-out problems are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opo_megatron.report.arms import mean_of

REPRODUCED = "reproduced"
NO_DIFFERENCE = "not reproduced: no difference seen"
OPPOSITE = "not reproduced: the opposite"
NOT_TESTABLE = "not testable at this scale"

SAME_RATE = "grpo_off_policy"
BEST_RATE = "grpo_off_policy, best learning rate"
"""Off-policy GRPO at its best learning rate."""

Measures = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Arm → measure → one value per seed, in the same order of seeds; None where not measured."""


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Claim:
    """`arm` has a higher or lower `measure` than another arm, or than its own `other_measure`."""

    text: str
    arm: str = ""
    other: str = ""
    measure: str = ""
    higher: bool = True
    """Whether `arm` is claimed to be higher than `other`."""
    other_measure: str | None = None
    """Default `measure`."""
    by_the_paper: bool = True
    """Whether it is the paper's claim; otherwise only the interval is reported, without a verdict."""

    @property
    def is_testable(self) -> bool:
        return bool(self.arm)


class Finding(NamedTuple):
    """The result for a claim."""

    claim: Claim
    difference: Interval | None
    """arm − other; None where not measured."""
    verdict: str


def t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of independent values, at least two."""
    mean = mean_of(values)
    if mean.half_width is None:
        raise ValueError("an interval needs at least two values")
    return Interval(mean.value, mean.value - mean.half_width, mean.value + mean.half_width)


def judge(claim: Claim, measures: Measures) -> Finding:
    """The verdict on one claim."""
    if not claim.is_testable:
        return Finding(claim, None, NOT_TESTABLE)
    values = measures[claim.arm][claim.measure]
    other_values = measures[claim.other][claim.other_measure or claim.measure]
    pairs = [(a, b) for a, b in zip(values, other_values, strict=True) if a is not None and b is not None]
    if len(pairs) < len(values):  # no selection of seeds
        return Finding(claim, None, f"{NOT_TESTABLE}: not measured with every seed")
    difference = t_interval([a - b for a, b in pairs])
    return Finding(claim, difference, verdict_of(difference, claim.higher))


def verdict_of(difference: Interval, higher: bool) -> str:
    """By the rule above; an interval with an endpoint at 0 contains 0."""
    low, high = (difference.low, difference.high) if higher else (-difference.high, -difference.low)
    if low > 0:
        return REPRODUCED
    return OPPOSITE if high < 0 else NO_DIFFERENCE


def off_policy_claims(other: str, when: str, largest: int) -> list[Claim]:
    """Claimed benefits of exact on-policy training, for OPO and for on-policy GRPO."""
    return [
        Claim(f"{name} against off-policy GRPO {when}: {what}", arm, other, measure, higher)
        for name, arm in (("OPO", "opo"), ("on-policy GRPO", "grpo_on_policy"))
        for what, measure, higher in (
            ("higher pass@1", "pass@1", True),
            (f"higher pass@{largest}", f"pass@{largest}", True),
            ("higher entropy in training", "training_entropy", True),
            ("higher entropy at the end", "entropy", True),
            ("lower KL to the initial weights", "kl", False),
            ("more diverse responses (lower Self-BLEU)", "self_bleu", False),
            ("less repetition (lower Rep-4)", "rep_4", False),
        )
    ]


def claims(largest: int) -> list[Claim]:
    """All claims.

    Args:
        largest: the largest k of pass@k that was measured.
    """
    baselines = ("opo_leave_one_out", "energy", "group_mean", "rloo")
    noise = ("noise_opo_loo", "noise_rloo")
    return [
        Claim("OPO against on-policy GRPO: higher pass@1", "opo", "grpo_on_policy", "pass@1"),
        Claim(
            f"OPO against on-policy GRPO: higher pass@{largest}", "opo", "grpo_on_policy", f"pass@{largest}"
        ),
        *off_policy_claims(SAME_RATE, "at the same learning rate", largest),
        *off_policy_claims(BEST_RATE, "at its best learning rate", largest),
        Claim(
            "gradient variance: lower with the length-weighted than the mean baseline (both leave-one-out)",
            "opo", "opo", noise[0], False, noise[1],
        ),
        Claim("better pass@k on MATH-500, AIME 2024 and AIME 2025 with a 7B model"),
        Claim("stable over a long training run of a 7B model"),
        *(
            Claim(f"OPO against {arm}: pass@1", "opo", arm, "pass@1", by_the_paper=False)
            for arm in baselines
        ),
        Claim(
            "gradient variance: energy-weighted baseline against the mean (both leave-one-out)",
            "opo", "opo", "noise_energy_loo", False, noise[1], by_the_paper=False,
        ),
    ]  # fmt: skip
