"""Packed micro-batches: whole sequences, balanced bins within the token budget, no cross-attention."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.micro_batch import MicroBatchPlan, build_micro_batches, schedule_micro_batches
from opo_megatron.batch.packing import bin_pack, context_positions
from opo_megatron.distributed.process_groups import initialize, shutdown
from tests.support.fixtures import ragged_rollouts, small_config, small_policy

CPU = torch.device("cpu")


def some_lengths(count: int, seed: int = 0) -> list[int]:
    """Long-tailed, like responses."""
    rng = random.Random(seed)
    return [min(2048, 20 + int(rng.lognormvariate(4.5, 0.8))) for _ in range(count)]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 64, 383])
def test_every_sequence_is_in_one_bin_within_the_token_budget(count: int, dp_size: int) -> None:
    lengths = some_lengths(count, seed=count)
    for multiple, budget in product((1, 2, 3), (100, 1000, 4096)):
        bins, fullest = bin_pack(lengths, dp_size, budget, multiple)
        assert sorted(i for per_rank in bins for packed in per_rank for i in packed) == list(range(count))
        assert {len(per_rank) for per_rank in bins} == {len(bins[0])} and len(bins) == dp_size
        assert len(bins[0]) % multiple == 0 and bins[0]
        loads = [sum(lengths[i] for i in packed) for per_rank in bins for packed in per_rank]
        assert max([1, *loads]) == fullest
        for per_rank in bins:
            for packed in per_rank:
                assert sum(lengths[i] for i in packed) <= budget or len(packed) == 1


@pytest.mark.parametrize("seed", range(4))
def test_bins_are_as_few_as_possible_and_nearly_equal(seed: int) -> None:
    lengths = some_lengths(384, seed)
    bins, fullest = bin_pack(lengths, 2, 4096, 1)
    least = -(-sum(lengths) // 4096)
    assert len(bins[0]) == -(-least // 2)  # no packing has fewer
    assert fullest * 2 * len(bins[0]) < 1.01 * sum(lengths)


def test_packing_wastes_little_where_few_sequences_fit_a_bin() -> None:
    """As in the 70B recipe: the budget is one longest sequence, the mean length about half of it."""
    rng = random.Random(0)
    lengths = [512 + min(8192, max(1, int(rng.expovariate(1 / 6000)))) for _ in range(1024)]
    padded, packed = (
        schedule_micro_batches(lengths, 2, 9216, fixed_shape=True, multiple=4, packed=packed)
        for packed in (False, True)
    )
    needed = sum(lengths) - len(lengths)
    padding = [1 - needed / sum(schedule.padded_tokens(lengths)) for schedule in (padded, packed)]
    assert padding[0] > 0.3 and padding[1] < 0.05


def test_a_longest_sequence_above_the_budget_sets_the_fixed_shape() -> None:
    lengths = [5000, 10, 10, 10, 4000]
    schedule = schedule_micro_batches(lengths, 1, 100, fixed_shape=True, packed=True)
    assert schedule.shape == (1, 4999) and schedule.count == 2
    variable = schedule_micro_batches(lengths, 1, 100, packed=True)
    assert variable.shape is None and sorted(map(sorted, variable.assignment[0])) == [[0], [1, 2, 3], [4]]


def test_padded_tokens_are_those_of_the_built_micro_batches() -> None:
    batch = ragged_rollouts(24)
    lengths = batch.sequence_lengths.tolist()
    for fixed_shape, packed in product((False, True), repeat=2):
        schedule = schedule_micro_batches(lengths, 2, 100, fixed_shape, packed=packed)
        for rank in range(2):
            built = build_micro_batches(batch.select(schedule.samples_of(rank)), schedule, rank, {}, 1, CPU)
            assert sum(micro.tokens.numel() for micro in built) == schedule.padded_tokens(lengths)[rank]


@pytest.mark.parametrize(("fixed_shape", "multiple", "tokens"), [(False, 1, 1), (True, 4, 1), (False, 2, 32)])
def test_sequences_are_concatenated_and_padding_is_its_own_segment(
    fixed_shape: bool, multiple: int, tokens: int
) -> None:
    batch = ragged_rollouts(24)
    schedule = schedule_micro_batches(batch.sequence_lengths.tolist(), 2, 60, fixed_shape, packed=True)
    widths = set()
    for rank in range(2):
        own = batch.select(schedule.samples_of(rank))
        sequences, prompts = own.sequences(), own.prompt_lengths.tolist()
        columns = {"number": torch.arange(own.response_tokens.numel()).float()}
        built = build_micro_batches(own, schedule, rank, columns, multiple, CPU, tokens)
        assert torch.equal(torch.cat([micro.targets for micro in built]), own.response_tokens)
        assert torch.equal(torch.cat([micro.columns["number"] for micro in built]), columns["number"])
        i = 0
        for rows, micro in zip(schedule.assignment[rank], built, strict=True):
            assert micro.packed is not None and micro.packed.qkv_format == "thd"
            ends = micro.packed.cu_seqlens_q.tolist()
            assert micro.packed.cu_seqlens_q.dtype == torch.int32 and torch.equal(
                micro.packed.cu_seqlens_q, micro.packed.cu_seqlens_kv
            )
            assert micro.tokens.shape == (1, ends[-1]) and ends[-1] % multiple == 0 == ends[-1] % tokens
            segments = list(pairwise(ends))
            assert micro.packed.max_seqlen_q == max(end - start for start, end in segments)
            expected = []
            for (start, end), _ in zip(segments, rows, strict=False):
                assert torch.equal(micro.tokens[0, start:end], sequences[i][:-1])
                expected += range(start + prompts[i] - 1, end)
                i += 1
            for start, end in segments:
                assert micro.position_ids[0, start:end].tolist() == list(range(end - start))
            assert micro.loss_positions.tolist() == expected
            for start, end in segments[len(rows) :]:
                assert not micro.tokens[0, start:end].any()
            widths.add(ends[-1])
    assert not fixed_shape or len(widths) == 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_context_parallel_positions_match_megatrons_rotary_frequencies(size: int) -> None:
    segments = [2 * size * count for count in (1, 5, 2, 7)]
    positions_by_rank = [context_positions(segments, rank, size) for rank in range(size)]
    assert sorted(torch.cat(positions_by_rank).tolist()) == list(range(sum(segments)))
    starts = torch.tensor([0, *segments]).cumsum(0)
    positions = torch.arange(max(segments))
    for rank, positions_of_rank in enumerate(positions_by_rank):
        parts = zip(positions_of_rank.split([length // size for length in segments]), starts, strict=False)
        for part, start in parts:
            expected = _get_thd_freqs_on_this_cp_rank(rank, size, part, positions)
            assert torch.equal(part - start, expected)


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_attend_to_equally_many_keys(size: int) -> None:
    keys = {int((context_positions([240], rank, size) + 1).sum()) for rank in range(size)}
    assert keys == {240 * 241 // 2 // size}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("fixed_shape", "multiple", "tokens"), [(False, 1, 1), (True, 4, 1), (False, 2, 32)])
def test_context_parallel_ranks_partition_rows_and_response_tokens(
    size: int, fixed_shape: bool, multiple: int, tokens: int
) -> None:
    batch = ragged_rollouts(24)
    lengths = batch.sequence_lengths.tolist()
    schedule = schedule_micro_batches(lengths, 1, 60, fixed_shape, packed=True, alignment=2 * size)
    own = batch.select(schedule.samples_of(0))
    columns = {"number": torch.arange(own.response_tokens.numel()).float()}
    built = [
        build_micro_batches(own, schedule, 0, columns, multiple * size, CPU, tokens * size, (rank, size))
        for rank in range(size)
    ]
    whole = build_micro_batches(own, schedule, 0, columns, multiple * size, CPU, tokens * size)
    assert (
        sum(micro.tokens.numel() for micro in whole)
        == schedule.padded_tokens(lengths, multiple * size, tokens * size)[0]
    )
    for row, *parts in zip(whole, *built, strict=True):
        assert row.packed is not None
        segments = row.packed.cu_seqlens_q.diff().tolist()
        assert not any(length % (2 * size) for length in segments)
        token_indices = torch.cat([part.token_indices for part in parts])
        assert torch.equal(token_indices.sort().values, row.token_indices)
        for rank, part in enumerate(parts):
            own_positions = context_positions(segments, rank, size)
            assert part.packed is not None
            assert torch.equal(part.packed.cu_seqlens_q, row.packed.cu_seqlens_q)
            assert torch.equal(part.packed.cu_seqlens_q_padded, row.packed.cu_seqlens_q)
            assert part.tokens.shape[1] % multiple == 0 == part.tokens.shape[1] % tokens
            assert torch.equal(part.tokens[0], row.tokens[0, own_positions])
            assert torch.equal(part.position_ids[0], row.position_ids[0, own_positions])
            assert torch.equal(part.targets, own.response_tokens[part.token_indices])
            assert torch.equal(part.columns["number"].long(), part.token_indices)
            in_row = dict(zip(row.token_indices.tolist(), row.loss_positions.tolist(), strict=True))
            assert own_positions[part.loss_positions].tolist() == [
                in_row[number] for number in part.token_indices.tolist()
            ]


def test_an_empty_packed_micro_batch_has_one_row() -> None:
    schedule = MicroBatchPlan([[[]]], packed=True)
    (micro,) = build_micro_batches(ragged_rollouts(4).select([]), schedule, 0, {}, 4, CPU)
    assert micro.tokens.shape == (1, 4) and micro.targets.numel() == 0
    assert micro.packed is not None and micro.packed.cu_seqlens_q.tolist() == [0, 4]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_packed_step_equals_a_padded_step(recompute: str) -> None:
    parallel = initialize(small_config())
    try:
        results = []
        for packing in ("padded", "thd"):
            config = small_config(f"policy.packing={packing}", f"policy.recompute={recompute}")
            policy = small_policy(config, parallel)
            batch = ragged_rollouts()
            batch.advantages = torch.linspace(-1, 1, len(batch), dtype=torch.float64)
            schedule = policy.schedule(batch.sequence_lengths)
            assert schedule.packed is (packing == "thd")
            order = schedule.samples_of(0)
            batch = batch.select(order)
            policy.checked_gradients(batch, schedule, PolicyGradient(100.0, 0.7))
            gradient = torch.cat([b.grad_data for c in policy.ddp_chunks for b in c.buffers])
            parts = policy.log_probs(batch, schedule, 0.7).split(batch.response_lengths.tolist())
            by_sample = dict(zip(order, parts, strict=True))
            results.append((gradient.clone(), torch.cat([by_sample[i] for i in sorted(by_sample)])))
        # Changing the first sequence of a packed row leaves the others' log-probabilities unchanged.
        first = schedule.assignment[0][0]
        assert len(first) > 1
        changed = batch.select(range(len(batch)))
        changed.prompt_tokens = changed.prompt_tokens.clone()
        changed.prompt_tokens[0] = (changed.prompt_tokens[0] + 1) % 17
        after = policy.log_probs(changed, schedule, 0.7).split(batch.response_lengths.tolist())
        assert not torch.equal(after[0], parts[0])
        assert all(torch.equal(a, b) for a, b in zip(after[1:], parts[1:], strict=True))
    finally:
        shutdown()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
