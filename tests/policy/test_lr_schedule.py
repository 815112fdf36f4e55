"""Learning-rate schedules against closed forms."""

from __future__ import annotations

import math

import pytest

from opo_megatron.config.choices import Schedule
from opo_megatron.config.schema import OptimizerConfig
from opo_megatron.policy.lr_schedule import learning_rate

TOTAL, WARMUP, PEAK, LEAST = 50, 10, 3e-4, 0.1


def rates(schedule: Schedule, warmup: int = WARMUP, total: int = TOTAL, least: float = LEAST) -> list[float]:
    """Learning rates of steps 1 … total."""
    config = OptimizerConfig(lr=PEAK, schedule=schedule, warmup_steps=warmup, min_lr_ratio=least)
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", Schedule)
def test_warm_up_rises_in_equal_steps_from_nearly_nothing_to_the_peak(schedule: Schedule) -> None:
    assert rates(schedule)[:WARMUP] == pytest.approx([PEAK * k / WARMUP for k in range(1, WARMUP + 1)])


def test_without_warm_up_the_first_step_is_already_on_the_way_down() -> None:
    share = (1 - LEAST) * PEAK / TOTAL
    wave = (1 - math.cos(math.pi / TOTAL)) / 2
    assert rates(Schedule.constant, warmup=0)[0] == PEAK
    assert rates(Schedule.linear, warmup=0)[0] == pytest.approx(PEAK - share)
    assert rates(Schedule.cosine, warmup=0)[0] == pytest.approx(PEAK - (1 - LEAST) * PEAK * wave)


def test_constant_stays_at_the_peak() -> None:
    assert rates(Schedule.constant)[WARMUP:] == [PEAK] * (TOTAL - WARMUP)


def test_linear_falls_in_equal_steps_to_the_least_rate_at_the_last_step() -> None:
    got = rates(Schedule.linear)
    fall = PEAK * (1 - LEAST) / (TOTAL - WARMUP)
    assert got[WARMUP - 1 :] == pytest.approx([PEAK - fall * k for k in range(TOTAL - WARMUP + 1)])
    assert got[-1] == pytest.approx(LEAST * PEAK)


def test_cosine_is_half_a_wave_from_the_peak_to_the_least_rate() -> None:
    got = rates(Schedule.cosine)
    for k, rate in enumerate(got[WARMUP - 1 :]):
        wave = math.cos(math.pi * k / (TOTAL - WARMUP))
        assert rate == pytest.approx(PEAK * ((1 + LEAST) / 2 + (1 - LEAST) / 2 * wave))
    assert got[-1] == pytest.approx(LEAST * PEAK)
    assert got[WARMUP + 19] == pytest.approx((1 + LEAST) / 2 * PEAK)


@pytest.mark.parametrize("schedule", [Schedule.linear, Schedule.cosine])
def test_the_rate_stays_at_its_least_beyond_the_last_step(schedule: Schedule) -> None:
    config = OptimizerConfig(lr=PEAK, schedule=schedule, warmup_steps=WARMUP, min_lr_ratio=LEAST)
    assert learning_rate(config, TOTAL + 7, TOTAL) == pytest.approx(LEAST * PEAK)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("total", [1, 5, 10])
def test_a_run_that_ends_within_its_warm_up_keeps_rising(schedule: Schedule, total: int) -> None:
    assert rates(schedule, total=total) == pytest.approx([PEAK * k / WARMUP for k in range(1, total + 1)])
