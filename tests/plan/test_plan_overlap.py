"""Simulated steps: against token by token stepping, and the bounds that any overlap keeps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from opo_megatron.errors import UserError
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.overlap import Timeline, decoded, lengths_of_run, log_normal, simulate


def stepped(responses: list[int], slots: int, cost: list[float]) -> list[float]:
    """When each response ends, one decoding step after the other; a step of n responses takes cost[n]."""
    left, running, waiting, seconds = list(responses), list[int](), list(range(len(responses))), 0.0
    ends = [0.0] * len(responses)
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        seconds += cost[len(running)]
        for i in list(running):
            left[i] -= 1
            if left[i] == 0:
                ends[i] = seconds
                running.remove(i)
    return ends


def test_responses_end_as_in_stepping_through_every_token() -> None:
    rng = random.Random(0)
    for _ in range(50):
        responses = [rng.randint(1, 30) for _ in range(rng.randint(1, 20))]
        slots = rng.randint(1, 12)
        cost = [0.0, *(0.5 + 0.1 * n for n in range(1, slots + 1))]
        found = decoded(responses, 5, slots, lambda rows, cached, cost=cost: cost[rows])
        assert found == pytest.approx(stepped(responses, slots, cost), rel=1e-12)


def test_the_cached_tokens_of_a_decoding_step_are_counted() -> None:
    """Two responses of 4 and 8 tokens to prompts of 10: the steps read 2·10 + 2·2, then 14 + 2 tokens."""
    assert decoded([4, 8], 10, 2, lambda rows, cached: float(cached)) == [4 * 24.0, 4 * 24.0 + 4 * 16.0]


def step_of(overlaps: bool, responses: list[int], per_token: float, least: int = 1) -> Timeline:
    return simulate(
        responses,
        4,
        3,
        2,
        5,
        lambda rows, cached: 1.0,
        lambda tokens: per_token * tokens,
        least,
        0.0,
        overlaps,
    )


def test_an_overlapped_step_takes_less_than_both_and_no_less_than_one() -> None:
    rng = random.Random(1)
    for per_token in (0.01, 0.2, 1.0):
        for _ in range(20):
            responses = [rng.randint(1, 40) for _ in range(48)]
            overlapped, in_turn = step_of(True, responses, per_token), step_of(False, responses, per_token)
            work = per_token * (sum(responses) + 3 * len(responses))
            assert overlapped.training == pytest.approx(work) and in_turn.training == pytest.approx(work)
            assert in_turn.step == pytest.approx(in_turn.generation + work)
            assert max(overlapped.generation, work) <= overlapped.step + 1e-9
            assert overlapped.step < in_turn.step
            groups = [group for part in overlapped.parts for group in part.groups]
            assert sorted(groups) == list(range(12))
            for part in overlapped.parts:
                assert all(part.start >= max(overlapped.ends[4 * g : 4 * g + 4]) for g in part.groups)


def test_one_group_has_nothing_to_overlap_with() -> None:
    responses = [3, 9, 4, 4]
    assert step_of(True, responses, 0.5).step == step_of(False, responses, 0.5).step


def test_log_normal_lengths_have_the_mean_and_the_limit() -> None:
    for mean in (100.0, 400.0, 900.0):
        lengths = log_normal(Lengths(4096, 10.0, mean, 20, 1000), 8)
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=5e-3)
        assert max(lengths) <= 1000 and min(lengths) >= 1
        assert lengths != sorted(lengths)


def test_a_run_without_rollouts_has_no_lengths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no rollouts/step"):
        lengths_of_run(tmp_path)
