"""Verdicts on the paper's claims: intervals against scipy and by hand, every case of the rule."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from paper.claims import (
    BEST_RATE,
    NO_DIFFERENCE,
    NOT_TESTABLE,
    OPPOSITE,
    REPRODUCED,
    SAME_RATE,
    Claim,
    Interval,
    claims,
    judge,
    t_interval,
    verdict_of,
)

from tests.support.requirements import require


def test_the_interval_equals_hand_arithmetic() -> None:
    """1, 2, 3: s = 1, t(2) = 4.303, half width 4.303/√3."""
    result = t_interval([1.0, 2.0, 3.0])
    assert result.mean == 2
    assert math.isclose(result.high - 2, 4.303 / math.sqrt(3)) and math.isclose(result.low, 4 - result.high)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 31])
def test_the_interval_equals_scipys(count: int) -> None:
    special = require("scipy.special", "pip install scipy")
    rng = random.Random(count)
    values = [rng.gauss(0.3, 2.0) for _ in range(count)]
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(count)
    half = special.stdtrit(count - 1, 0.975) * error
    assert t_interval(values) == pytest.approx((mean, mean - half, mean + half), abs=1e-3 * error)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two"):
        t_interval([1.0])


@pytest.mark.parametrize(
    ("low", "high", "if_higher", "if_lower"),
    [
        (0.1, 0.3, REPRODUCED, OPPOSITE),
        (-0.3, -0.1, OPPOSITE, REPRODUCED),
        (-0.1, 0.3, NO_DIFFERENCE, NO_DIFFERENCE),
        (0.0, 0.3, NO_DIFFERENCE, NO_DIFFERENCE),
        (0.0, 0.0, NO_DIFFERENCE, NO_DIFFERENCE),
    ],
)
def test_every_case_of_the_verdict_rule(low: float, high: float, if_higher: str, if_lower: str) -> None:
    interval = Interval((low + high) / 2, low, high)
    assert verdict_of(interval, higher=True) == if_higher
    assert verdict_of(interval, higher=False) == if_lower


def test_seeds_are_paired() -> None:
    """A difference of one tenth, far below the variation over seeds, is still detected."""
    ours = [0.2, 0.5, 0.9, 0.4]
    measures = {"opo": {"kl": [x - 0.1 - 0.001 * i for i, x in enumerate(ours)]}, "grpo": {"kl": ours}}
    result = judge(Claim("", "opo", "grpo", "kl", higher=False), measures)
    assert result.verdict == REPRODUCED and result.difference is not None
    assert math.isclose(result.difference.mean, -0.1015)
    reversed_seeds = {"opo": measures["opo"], "grpo": {"kl": ours[::-1]}}
    assert judge(Claim("", "opo", "grpo", "kl", higher=False), reversed_seeds).verdict == NO_DIFFERENCE


def test_a_claim_without_measurements_is_not_testable() -> None:
    claim = Claim("", "opo", "opo", "noise_opo_loo", False, "noise_rloo")
    measures = {"opo": {"noise_opo_loo": [0.9, None, 0.8], "noise_rloo": [1.0, 1.0, 1.0]}}
    result = judge(claim, measures)
    assert result.difference is None and result.verdict.startswith(NOT_TESTABLE)
    assert judge(Claim("on a 7B model"), {}).verdict == NOT_TESTABLE


def test_the_claims_cover_the_paper() -> None:
    all_claims = claims(16)
    compared = {(one.arm, one.other, one.measure, one.higher) for one in all_claims if one.by_the_paper}
    assert {("opo", "grpo_on_policy", "pass@1", True), ("opo", "grpo_on_policy", "pass@16", True)} <= compared
    for arm in ("opo", "grpo_on_policy"):
        for other in (SAME_RATE, BEST_RATE):
            for measure, higher in (("entropy", True), ("kl", False), ("self_bleu", False), ("rep_4", False)):
                assert (arm, other, measure, higher) in compared
    assert any("AIME" in one.text and not one.is_testable for one in all_claims)
    assert len({one.text for one in all_claims}) == len(all_claims)
