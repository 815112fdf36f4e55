"""Learning-rate schedules against closed forms."""

from __future__ import annotations

import math

import pytest

from opo_megatron.config.choices import Schedule
from opo_megatron.config.schema import OptimizerConfig
from opo_megatron.policy.lr_schedule import learning_rate

TOTAL, WARMUP, PEAK, MIN_RATIO = 50, 10, 3e-4, 0.1


def lrs(
    schedule: Schedule, warmup: int = WARMUP, total: int = TOTAL, min_ratio: float = MIN_RATIO
) -> list[float]:
    """Learning rates of steps 1 … total."""
    config = OptimizerConfig(lr=PEAK, schedule=schedule, warmup_steps=warmup, min_lr_ratio=min_ratio)
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", Schedule)
def test_warm_up_rises_linearly_from_peak_over_warmup_steps_to_the_peak(schedule: Schedule) -> None:
    assert lrs(schedule)[:WARMUP] == pytest.approx([PEAK * k / WARMUP for k in range(1, WARMUP + 1)])


def test_without_warm_up_the_decay_starts_at_the_first_step() -> None:
    decrement = (1 - MIN_RATIO) * PEAK / TOTAL
    wave = (1 - math.cos(math.pi / TOTAL)) / 2
    assert lrs(Schedule.constant, warmup=0)[0] == PEAK
    assert lrs(Schedule.linear, warmup=0)[0] == pytest.approx(PEAK - decrement)
    assert lrs(Schedule.cosine, warmup=0)[0] == pytest.approx(PEAK - (1 - MIN_RATIO) * PEAK * wave)


def test_constant_stays_at_the_peak() -> None:
    assert lrs(Schedule.constant)[WARMUP:] == [PEAK] * (TOTAL - WARMUP)


def test_linear_decays_to_the_minimum_lr_at_the_last_step() -> None:
    actual = lrs(Schedule.linear)
    decrement = PEAK * (1 - MIN_RATIO) / (TOTAL - WARMUP)
    assert actual[WARMUP - 1 :] == pytest.approx([PEAK - decrement * k for k in range(TOTAL - WARMUP + 1)])
    assert actual[-1] == pytest.approx(MIN_RATIO * PEAK)


def test_cosine_is_half_a_wave_from_the_peak_to_the_minimum_lr() -> None:
    actual = lrs(Schedule.cosine)
    for k, lr in enumerate(actual[WARMUP - 1 :]):
        wave = math.cos(math.pi * k / (TOTAL - WARMUP))
        assert lr == pytest.approx(PEAK * ((1 + MIN_RATIO) / 2 + (1 - MIN_RATIO) / 2 * wave))
    assert actual[-1] == pytest.approx(MIN_RATIO * PEAK)
    assert actual[WARMUP + 19] == pytest.approx((1 + MIN_RATIO) / 2 * PEAK)


@pytest.mark.parametrize("schedule", [Schedule.linear, Schedule.cosine])
def test_the_lr_stays_at_its_minimum_beyond_the_last_step(schedule: Schedule) -> None:
    config = OptimizerConfig(lr=PEAK, schedule=schedule, warmup_steps=WARMUP, min_lr_ratio=MIN_RATIO)
    assert learning_rate(config, TOTAL + 7, TOTAL) == pytest.approx(MIN_RATIO * PEAK)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("total", [1, 5, 10])
def test_the_lr_of_a_run_shorter_than_its_warm_up_keeps_rising(schedule: Schedule, total: int) -> None:
    assert lrs(schedule, total=total) == pytest.approx([PEAK * k / WARMUP for k in range(1, total + 1)])
