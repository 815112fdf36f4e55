"""Rollouts with given tokens: order, positions, ragged columns, micro-batches, statistics, digests."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opo_megatron.audit.record import PER_SAMPLE, PER_TOKEN, column_digests
from opo_megatron.batch.micro_batch import build_micro_batches, schedule_micro_batches
from opo_megatron.batch.redistribute import gather_to_rank0, redistribute_to_dp
from opo_megatron.batch.rollouts import (
    FINISH_ENVIRONMENT,
    FINISH_LENGTH,
    FINISH_NAMES,
    FINISH_STOP,
    FINISH_TURNS,
    Rollouts,
    is_truncated,
)
from opo_megatron.batch.stats import gather_stats
from opo_megatron.observe.utilization import training_tflop
from tests.support.conversations import conversations, merged, ragged_conversations, with_given_tokens
from tests.support.fixtures import ragged_rollouts, small_config
from tests.support.rollout_batches import alone, assert_same, random_rollouts

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("response", "given", "sequence", "turns"),
    [
        pytest.param([1, 2], [], [9, 1, 2], 1, id="none"),
        pytest.param([1, 2], [(50, 1)], [9, 1, 50, 2], 2, id="one"),
        pytest.param([1, 2], [(50, 1), (51, 1)], [9, 1, 50, 51, 2], 2, id="two at one place"),
        pytest.param([1, 2, 3], [(50, 1), (51, 2)], [9, 1, 50, 2, 51, 3], 3, id="two places"),
        pytest.param([1, 2, 3, 4], [(50, 3), (51, 3)], [9, 1, 2, 3, 50, 51, 4], 2, id="before the last"),
        pytest.param([1], [(50, 0)], [9, 50, 1], 2, id="before the first"),
        pytest.param([], [], [9], 1, id="no response"),
    ],
)
def test_given_tokens_stand_behind_the_response_tokens_they_follow(
    response: list[int], given: list[tuple[int, int]], sequence: list[int], turns: int
) -> None:
    other = [7, 7, 7], [(60, 1), (61, 2)]
    rollouts = conversations([[9], [8, 8], [9]], [response, other[0], response], [given, other[1], given])
    assert [one.tolist() for one in rollouts.sequences()] == [sequence, [8, 8, 7, 60, 7, 61, 7], sequence]
    assert rollouts.sequence_lengths.tolist() == [len(sequence), 7, len(sequence)]
    assert rollouts.input_lengths.tolist() == [len(sequence) - 1, 6, len(sequence) - 1]
    positions = rollouts.response_positions().split(rollouts.response_lengths.tolist())
    assert [sequence[i] for i in positions[2].tolist()] == response
    assert rollouts.turns is not None and rollouts.turns.tolist() == [turns, 3, turns]


@pytest.mark.parametrize("seed", range(5))
def test_sequences_and_positions_equal_a_plain_loop(seed: int) -> None:
    rollouts = ragged_conversations(24, seed)
    expected = merged(rollouts)
    assert [one.tolist() for one in rollouts.sequences()] == [[t for t, _ in one] for one in expected]
    positions = [i for one in expected for i, (_, sampled) in enumerate(one) if sampled]
    assert rollouts.response_positions().tolist() == positions


@pytest.mark.parametrize("indices", [[], [3], [5, 5, 0], list(range(23, -1, -1)), [1, 2, 3, 20]])
def test_select_takes_given_tokens_along(indices: list[int]) -> None:
    rollouts = ragged_conversations()
    expected = merged(rollouts)
    assert merged(rollouts.select(indices)) == [expected[i] for i in indices]


@pytest.mark.parametrize("cuts", [(0,), (24,), (1, 2), (7, 7, 15), (23,)])
def test_concatenate_inverts_a_split_of_conversations(cuts: tuple[int, ...]) -> None:
    whole = ragged_conversations()
    bounds = (0, *cuts, 24)
    parts = [whole.select(range(a, b)) for a, b in pairwise(bounds)]
    assert_same(Rollouts.concatenate(parts), whole)


def test_concatenate_refuses_conversations_beside_single_turns() -> None:
    with pytest.raises(ValueError, match="different columns"):
        Rollouts.concatenate([ragged_rollouts(4), ragged_conversations(4)])


@pytest.mark.parametrize("count", [0, 4, 32])
def test_files_return_the_conversations_that_were_saved(tmp_path: Path, count: int) -> None:
    rollouts = ragged_conversations(count)
    rollouts.save(tmp_path / "c.safetensors")
    assert_same(Rollouts.load(tmp_path / "c.safetensors"), rollouts)


def test_files_of_single_turns_have_no_given_columns_and_read_as_none(tmp_path: Path) -> None:
    rollouts = random_rollouts(9)
    rollouts.save(tmp_path / "r.safetensors")
    assert not [name for name in load_file(tmp_path / "r.safetensors") if name.startswith("given")]
    loaded = Rollouts.load(tmp_path / "r.safetensors")
    assert loaded.given_lengths is loaded.given_tokens is loaded.given_after is loaded.turns is None


def test_exchanges_between_ranks_keep_conversations_whole() -> None:
    rollouts = ragged_conversations()
    expected = merged(rollouts)
    schedule = schedule_micro_batches(rollouts.sequence_lengths.tolist(), 1, 60)
    received = redistribute_to_dp(alone(), rollouts, schedule, total=24)
    assert merged(received) == [expected[i] for i in schedule.samples_of(0)]
    gathered = gather_to_rank0(alone(), rollouts)
    assert gathered is not None
    assert_same(gathered, rollouts)


# ---------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize(("packed", "context_size"), [(False, 1), (True, 1), (True, 2)])
def test_sampled_tokens_alone_are_targets_behind_all_tokens_before_them(
    packed: bool, context_size: int
) -> None:
    rollouts = ragged_conversations()
    alignment = 1 if context_size == 1 else 2 * context_size
    schedule = schedule_micro_batches(
        rollouts.sequence_lengths.tolist(), 1, 90, packed=packed, alignment=alignment
    )
    own = rollouts.select(schedule.samples_of(0))
    whole = build_micro_batches(own, schedule, 0, {}, 1, CPU)
    shards = [
        build_micro_batches(own, schedule, 0, {}, 1, CPU, context=(rank, context_size))
        for rank in range(context_size)
    ]
    sequences = iter(merged(own))
    for index, rows in enumerate(schedule.assignment[0]):
        micro, targets = whole[index], []
        flat, positions = micro.tokens.flatten().tolist(), micro.position_ids.flatten().tolist()
        places = iter(micro.loss_positions.tolist())
        for _ in rows:
            sequence = next(sequences)
            for i, (token, sampled) in enumerate(sequence):
                if not sampled:
                    continue
                place = next(places)
                targets.append(token)
                assert positions[place] == i - 1
                assert flat[place - i + 1 : place + 1] == [t for t, _ in sequence[:i]]
        assert next(places, None) is None
        assert micro.targets.tolist() == targets
        held = torch.cat([shard[index].token_indices for shard in shards])
        assert sorted(held.tolist()) == sorted(micro.token_indices.tolist())
        for shard in shards:
            by_index = dict(zip(micro.token_indices.tolist(), micro.loss_positions.tolist(), strict=True))
            part = shard[index]
            tokens = part.tokens.flatten()[part.loss_positions].tolist()
            assert tokens == [flat[by_index[i]] for i in part.token_indices.tolist()]


def test_micro_batches_without_given_tokens_equal_those_of_single_turns() -> None:
    single = ragged_rollouts()
    empty = replace(
        single,
        given_lengths=torch.zeros(24, dtype=torch.int64),
        given_tokens=torch.empty(0, dtype=torch.int64),
        given_after=torch.empty(0, dtype=torch.int64),
    )
    schedule = schedule_micro_batches(single.sequence_lengths.tolist(), 1, 90)
    pair = [
        build_micro_batches(one.select(schedule.samples_of(0)), schedule, 0, {}, 1, CPU)
        for one in (single, empty)
    ]
    for left, right in zip(*pair, strict=True):
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.loss_positions, right.loss_positions)
        assert torch.equal(left.targets, right.targets)


# ---------------------------------------------------------------------- statistics and digests


def test_statistics_count_sampled_tokens_and_whole_sequences() -> None:
    rollouts = ragged_conversations()
    stats = gather_stats(alone(), rollouts)
    assert torch.equal(stats.response_lengths, rollouts.response_lengths)
    assert stats.sequence_lengths.tolist() == list(map(len, merged(rollouts)))
    assert stats.turns is not None and rollouts.turns is not None
    assert torch.equal(stats.turns, rollouts.turns) and int(stats.turns.max()) > 2
    assert gather_stats(alone(), ragged_rollouts()).given_lengths is None


@pytest.mark.parametrize(
    ("reason", "truncated"),
    [
        (FINISH_STOP, False), (FINISH_LENGTH, True), (FINISH_TURNS, True), (FINISH_ENVIRONMENT, False),
    ],
)  # fmt: skip
def test_a_response_is_truncated_where_a_limit_cut_it(reason: int, truncated: bool) -> None:
    rollouts = ragged_conversations(4)
    rollouts.finish_reasons = torch.tensor([reason, FINISH_STOP, reason, FINISH_STOP])
    assert is_truncated(rollouts.finish_reasons).tolist() == [truncated, False, truncated, False]
    assert gather_stats(alone(), rollouts).truncated == truncated / 2
    assert reason in FINISH_NAMES


def test_flops_count_given_tokens_in_the_layers_and_not_in_the_head() -> None:
    config = small_config()
    one, more = ragged_rollouts(), ragged_conversations()
    longer = replace(one, prompt_lengths=more.sequence_lengths - more.response_lengths)
    tflop = [
        training_tflop(
            config.policy.model, 17, config.algorithm, gather_stats(alone(), rollouts), torch.ones(24)
        )
        for rollouts in (one, more, longer)
    ]
    assert tflop[0] < tflop[1] == tflop[2]


@pytest.mark.parametrize("column", ["given_tokens", "given_after", "given_lengths", "response_tokens"])
def test_digests_tell_a_change_of_any_column_of_a_conversation(column: str) -> None:
    rollouts, changed = ragged_conversations(), ragged_conversations()
    digests = column_digests(rollouts)
    values = getattr(changed, column)
    if column == "given_lengths":  # one token moves to the next sample
        i = int(values.nonzero()[0])
        values[i] -= 1
        values[i + 1] += 1
    else:
        values[5] += 1
    other = column_digests(changed)
    assert other[column] != digests[column]
    parts = [rollouts.select(range(9)), rollouts.select(range(9, 24))]
    sums = [column_digests(part)[column] for part in parts]
    assert (sum(sums) - digests[column]) % 2**64 == 0, "digests are sums over ranks"


def test_digests_of_single_turns_have_the_columns_of_before() -> None:
    assert {*column_digests(ragged_rollouts())} == {*PER_SAMPLE, *PER_TOKEN}
    assert with_given_tokens(ragged_rollouts()).given_lengths is not None
