"""Micro-batches: every sample once, within the token budget, balanced over ranks; loss positions."""

from __future__ import annotations

import math
import random
from itertools import combinations, product

import pytest
import torch

from opo_megatron.batch.micro_batch import (
    MICRO_BATCH_TOKENS,
    MicroBatch,
    MicroBatchPlan,
    build_micro_batches,
    schedule_micro_batches,
)
from opo_megatron.batch.rollouts import Rollouts

CPU = torch.device("cpu")


def some_lengths(count: int, seed: int = 0) -> list[int]:
    """Long-tailed, like responses."""
    rng = random.Random(seed)
    return [min(2048, 20 + int(rng.lognormvariate(4.5, 0.8))) for _ in range(count)]


def assert_complete(schedule: MicroBatchPlan, count: int, dp_size: int) -> None:
    assigned = [sample for rank in range(dp_size) for sample in schedule.samples_of(rank)]
    assert sorted(assigned) == list(range(count))
    assert [len(micro_batches) for micro_batches in schedule.assignment] == [schedule.count] * dp_size


def assert_within(schedule: MicroBatchPlan, lengths: list[int], budget: int) -> None:
    for micro_batches in schedule.assignment:
        for samples in micro_batches:
            padded = len(samples) * max((lengths[i] for i in samples), default=0)
            assert padded <= budget or len(samples) == 1


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 64, 383])
def test_every_sample_is_assigned_once_within_the_token_budget(count: int, dp_size: int) -> None:
    lengths = some_lengths(count, seed=count)
    for multiple, fixed_shape in product((1, 2, 3), (False, True)):
        schedule = schedule_micro_batches(lengths, dp_size, 1000, fixed_shape, multiple)
        assert_complete(schedule, count, dp_size)
        assert_within(schedule, lengths, 1000)
        assert schedule.count % multiple == 0
        if not fixed_shape:
            assert schedule.shape is None
            continue
        assert schedule.shape is not None
        rows, tokens = schedule.shape
        assert tokens == max(lengths) - 1 and rows == max(1, 1000 // max(lengths))
        assert all(len(batch) <= rows for micro_batches in schedule.assignment for batch in micro_batches)


@pytest.mark.parametrize("dp_size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_data_parallel_ranks_get_nearly_equal_token_counts(dp_size: int, seed: int) -> None:
    lengths = some_lengths(384, seed)
    schedule = schedule_micro_batches(lengths, dp_size, 4096)
    tokens = [sum(lengths[i] for i in schedule.samples_of(rank)) for rank in range(dp_size)]
    assert max(tokens) / min(tokens) < 1.02


def test_sorting_saves_most_of_the_padding_of_unsorted_samples() -> None:
    lengths = some_lengths(384)
    schedule = schedule_micro_batches(lengths, 2, 4096)
    padded = sum(
        len(rows) * max(lengths[i] for i in rows) for batches in schedule.assignment for rows in batches
    )
    unsorted_batches: list[list[int]] = [[]]
    for length in lengths:
        if max([*unsorted_batches[-1], length]) * (len(unsorted_batches[-1]) + 1) > 4096:
            unsorted_batches.append([])
        unsorted_batches[-1].append(length)
    unsorted = sum(len(batch) * max(batch) for batch in unsorted_batches)
    assert padded - sum(lengths) < 0.2 * (unsorted - sum(lengths))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_partition_of_the_sorted_samples_costs_less(seed: int) -> None:
    rng = random.Random(seed)
    lengths = sorted((rng.choice((30, 35, 90, 200, 260)) for _ in range(9)), reverse=True)

    def cost(bounds: tuple[int, ...]) -> float:
        batches = [lengths[a:b] for a, b in zip((0, *bounds), (*bounds, len(lengths)), strict=True)]
        if any(len(batch) * batch[0] > 600 for batch in batches):
            return math.inf
        return sum(len(batch) * batch[0] + MICRO_BATCH_TOKENS for batch in batches)

    positions = range(1, len(lengths))
    least = min(cost(bounds) for k in range(len(lengths)) for bounds in combinations(positions, k))
    micro_batches = schedule_micro_batches(lengths, 1, 600).assignment[0]
    assert sum(len(batch) * lengths[batch[0]] + MICRO_BATCH_TOKENS for batch in micro_batches) == least


def test_fewer_samples_than_ranks_leave_empty_micro_batches() -> None:
    schedule = schedule_micro_batches([5, 9], 4, 100)
    assert_complete(schedule, 2, 4)
    assert schedule.assignment == [[[1]], [[0]], [[]], [[]]]


def test_without_samples_every_rank_gets_empty_micro_batches() -> None:
    assert schedule_micro_batches([], 2, 100, multiple=3).assignment == [[[]] * 3] * 2


def test_a_sequence_above_the_budget_gets_its_own_micro_batch() -> None:
    lengths = [10] * 20 + [5000]
    schedule = schedule_micro_batches(lengths, 2, 100)
    assert_complete(schedule, 21, 2)
    assert_within(schedule, lengths, 100)
    assert [20] in schedule.assignment[0] + schedule.assignment[1]


def test_the_schedule_depends_only_on_the_lengths() -> None:
    lengths = some_lengths(100)
    assert schedule_micro_batches(lengths, 3, 1000) == schedule_micro_batches(list(lengths), 3, 1000)


# ---------------------------------------------------------------------- building


def batch_of(count: int, seed: int = 0, empty: bool = False) -> Rollouts:
    """Every token id is unique, so that each token can be traced."""
    rng = random.Random(seed)
    token_ids = iter(range(1, 100_000))
    prompts = [[next(token_ids) for _ in range(rng.randint(1, 6))] for _ in range(count)]
    shortest = 0 if empty else 1
    responses = [[next(token_ids) for _ in range(rng.randint(shortest, 9))] for _ in range(count)]
    return Rollouts.from_demonstrations(prompts, responses)


def build(
    batch: Rollouts, schedule: MicroBatchPlan, rank: int, multiple: int
) -> tuple[Rollouts, list[MicroBatch]]:
    own = batch.select(schedule.samples_of(rank))
    columns = {"number": own.response_tokens.float(), "half": own.response_tokens / 2}
    return own, build_micro_batches(own, schedule, rank, columns, multiple, CPU)


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_loss_positions_precede_each_response_token(seed: int, multiple: int, fixed_shape: bool) -> None:
    batch = batch_of(23, seed, empty=seed == 1)
    sequences = batch.sequences()
    schedule = schedule_micro_batches(batch.sequence_lengths.tolist(), 2, 40, fixed_shape)
    for rank in range(2):
        _, micro_batches = build(batch, schedule, rank, multiple)
        assert len(micro_batches) == schedule.count
        for rows, micro in zip(schedule.assignment[rank], micro_batches, strict=True):
            height, width = micro.tokens.shape
            assert width % multiple == 0
            expected_positions, expected_targets = [], []
            for row, i in enumerate(rows):
                inputs = sequences[i][:-1].tolist()
                assert micro.tokens[row].tolist() == inputs + [0] * (width - len(inputs))
                for position in range(int(batch.prompt_lengths[i]) - 1, len(inputs)):
                    expected_positions.append(row * width + position)
                    expected_targets.append(int(sequences[i][position + 1]))
            assert micro.loss_positions.tolist() == expected_positions
            assert micro.targets.tolist() == expected_targets
            assert micro.columns["number"].tolist() == expected_targets
            assert micro.columns["half"].tolist() == [target / 2 for target in expected_targets]
            assert micro.position_ids.tolist() == [list(range(width))] * height
            assert not micro.tokens[len(rows) :].any()


def test_every_response_token_of_a_batch_is_a_target_once() -> None:
    batch = batch_of(50)
    schedule = schedule_micro_batches(batch.sequence_lengths.tolist(), 3, 60)
    built = [micro for rank in range(3) for micro in build(batch, schedule, rank, 2)[1]]
    targets = [token for micro in built for token in micro.targets.tolist()]
    assert sorted(targets) == batch.response_tokens.tolist()


def test_padded_lengths_are_minimal() -> None:
    """The last token of a sequence is not an input: 9 tokens need 8 positions, with multiple 4 as with 1."""
    batch = Rollouts.from_demonstrations([[1, 2, 3], [1]], [[4, 5, 6, 7, 8, 9], [2]])
    schedule = schedule_micro_batches([9, 2], 1, 100)
    for multiple, width in ((1, 8), (4, 8), (5, 10)):
        assert build(batch, schedule, 0, multiple)[1][0].tokens.shape == (2, width)


def test_with_fixed_shape_all_micro_batches_have_the_same_shape() -> None:
    batch = batch_of(23)
    schedule = schedule_micro_batches(batch.sequence_lengths.tolist(), 3, 45, fixed_shape=True, multiple=2)
    shapes = {tuple(m.tokens.shape) for rank in range(3) for m in build(batch, schedule, rank, 4)[1]}
    assert schedule.shape is not None
    assert shapes == {(schedule.shape[0], schedule.shape[1] + -schedule.shape[1] % 4)}


def test_a_micro_batch_without_rows_has_a_shape_and_no_loss() -> None:
    batch = batch_of(1)
    schedule = schedule_micro_batches(batch.sequence_lengths.tolist(), 2, 100)
    own, (micro,) = build(batch, schedule, 1, 4)
    assert len(own) == 0
    assert micro.tokens.shape == (1, 4)
    assert micro.loss_positions.numel() == micro.targets.numel() == micro.columns["number"].numel() == 0


def test_empty_responses_have_no_loss_positions() -> None:
    batch = Rollouts.from_demonstrations([[1, 2], [3], [4, 5]], [[], [6, 7], []])
    schedule = schedule_micro_batches([2, 3, 2], 1, 100)
    _, (micro,) = build(batch, schedule, 0, 1)
    assert schedule.assignment == [[[1, 0, 2]]]
    assert micro.targets.tolist() == [6, 7] and micro.loss_positions.tolist() == [0, 1]


def test_with_fixed_shape_ranks_get_equally_many_samples() -> None:
    """A micro-batch of a fixed shape costs the same whatever it holds."""
    schedule = schedule_micro_batches([1000] + [10] * 40, 2, 2000, fixed_shape=True)
    assert sorted(len(schedule.samples_of(rank)) for rank in range(2)) == [20, 21]
