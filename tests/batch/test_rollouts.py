"""Rollouts: ragged columns survive select, concatenate, redistribution, save and load."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from opo_megatron.batch.micro_batch import schedule_micro_batches
from opo_megatron.batch.redistribute import gather_to_rank0, local_slice, redistribute_to_dp
from opo_megatron.batch.rollouts import FINISH_LENGTH, FINISH_STOP, Rollouts
from opo_megatron.batch.stats import gather_stats
from opo_megatron.distributed.process_groups import rank_range
from opo_megatron.errors import NonFiniteError
from opo_megatron.rollout.requests import compute_rewards, requests_for
from opo_megatron.tasks import Prompt
from opo_megatron.tasks.base import PerResponseTask
from tests.support.rollout_batches import alone, assert_same, random_rollouts

Sample = dict[str, object]


def samples_of(rollouts: Rollouts) -> list[Sample]:
    """Reference implementation: one dictionary of lists per sample."""
    samples, prompt, response, inputs = [], 0, 0, 0
    for i in range(len(rollouts)):
        p, r = int(rollouts.prompt_lengths[i]), int(rollouts.response_lengths[i])
        sample: Sample = {}
        for field in fields(rollouts):
            value = getattr(rollouts, field.name)
            if not isinstance(value, torch.Tensor):
                continue
            if field.name == "prompt_tokens":
                sample[field.name] = value[prompt : prompt + p].tolist()
            elif field.name in ("response_tokens", "weight_versions", "engine_log_prob"):
                sample[field.name] = value[response : response + r].tolist()
            elif field.name == "routed_experts":
                sample[field.name] = value[inputs : inputs + p + r - 1].tolist()
            else:
                sample[field.name] = value[i].item()
        prompt, response, inputs = prompt + p, response + r, inputs + p + r - 1
        samples.append(sample)
    assert prompt == rollouts.prompt_tokens.numel() and response == rollouts.response_tokens.numel()
    return samples


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_select_returns_whole_samples_in_the_given_order(seed: int, optional: bool) -> None:
    rollouts, rng = random_rollouts(20, seed, optional), random.Random(seed)
    samples = samples_of(rollouts)
    for count in (0, 1, 7, 20, 40):
        indices = [rng.randrange(20) for _ in range(count)]
        selected = rollouts.select(indices)
        assert len(selected) == count
        assert samples_of(selected) == [samples[i] for i in indices]
        assert (selected.rewards is None) is not optional


def test_select_takes_a_tensor_and_keeps_the_demonstration_flag() -> None:
    demonstrations = Rollouts.from_demonstrations([[1], [2], [3]], [[4], [], [5, 6]])
    selected = demonstrations.select(torch.tensor([2, 1]))
    assert selected.is_demonstration and selected.responses() == [[5, 6], []]


@pytest.mark.parametrize("optional", [True, False])
def test_concatenate_keeps_the_samples_in_order(optional: bool) -> None:
    parts = [random_rollouts(n, seed, optional) for seed, n in enumerate((5, 0, 1, 8))]
    joined = Rollouts.concatenate(parts)
    assert samples_of(joined) == [sample for part in parts for sample in samples_of(part)]


def test_concatenate_inverts_a_split() -> None:
    whole = random_rollouts(20)
    assert_same(Rollouts.concatenate([whole.select(range(6)), whole.select(range(6, 20))]), whole)


def test_concatenate_refuses_parts_with_different_columns() -> None:
    with pytest.raises(ValueError, match="different columns"):
        Rollouts.concatenate([random_rollouts(2), random_rollouts(2, optional=False)])


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("count", [0, 1, 33])
def test_load_returns_what_was_saved(tmp_path: Path, count: int, optional: bool) -> None:
    rollouts = random_rollouts(count, optional=optional)
    path = tmp_path / "deep" / "step-1.safetensors"
    rollouts.save(path)
    assert_same(Rollouts.load(path), rollouts)
    assert [file.name for file in path.parent.iterdir()] == ["step-1.safetensors"]


def test_non_contiguous_columns_and_the_demonstration_flag_are_saved(tmp_path: Path) -> None:
    demonstrations = Rollouts.from_demonstrations([[1, 2], [3]], [[4], [5, 6]])
    demonstrations.rewards = torch.arange(4, dtype=torch.float64)[::2]
    demonstrations.save(tmp_path / "d.safetensors")
    assert_same(Rollouts.load(tmp_path / "d.safetensors"), demonstrations)


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    for seed in range(2):
        random_rollouts(4, seed).save(tmp_path / "r.safetensors")
    assert_same(Rollouts.load(tmp_path / "r.safetensors"), random_rollouts(4, 1))


def test_demonstrations_are_groups_of_one_without_optional_columns() -> None:
    prompts, responses = [[1, 2], [3], [4, 5, 6]], [[7], [], [8, 9]]
    got = Rollouts.from_demonstrations(prompts, responses)
    assert got.is_demonstration and len(got) == 3
    assert [s.tolist() for s in got.sequences()] == [[1, 2, 7], [3], [4, 5, 6, 8, 9]]
    assert got.responses() == responses
    assert got.sequence_lengths.tolist() == [3, 1, 5]
    assert got.groups.tolist() == got.prompt_ids.tolist() == [0, 1, 2]
    assert got.finish_reasons.tolist() == [FINISH_STOP] * 3
    assert got.weight_versions is got.engine_log_prob is got.rewards is got.advantages is None
    with pytest.raises(ValueError, match="3 prompts but 2 responses"):
        Rollouts.from_demonstrations(prompts, responses[:2])


# ---------------------------------------------------------------------- from prompts to a batch


def test_redistribution_on_one_rank_reorders_to_the_schedule() -> None:
    rollouts = random_rollouts(30)
    schedule = schedule_micro_batches(rollouts.sequence_lengths.tolist(), 1, 20)
    received = redistribute_to_dp(alone(), rollouts, schedule, total=30)
    samples = samples_of(rollouts)
    assert samples_of(received) == [samples[i] for i in schedule.samples_of(0)]


def test_gather_on_one_rank_returns_its_rollouts() -> None:
    rollouts = random_rollouts(6)
    gathered = gather_to_rank0(alone(), rollouts)
    assert gathered is not None
    assert_same(gathered, rollouts)
    stats = gather_stats(alone(), rollouts)
    assert torch.equal(stats.sequence_lengths, rollouts.prompt_lengths + rollouts.response_lengths)
    truncated = rollouts.finish_reasons.tolist().count(FINISH_LENGTH)
    assert stats.truncated == truncated / 6


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (2, 5), (0, 2), (384, 7)])
def test_rank_ranges_are_contiguous_complete_and_even(count: int, world: int) -> None:
    ranges = [rank_range(count, rank, world) for rank in range(world)]
    assert [i for range_ in ranges for i in range_] == list(range(count))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_every_prompt_is_requested_once_per_sample_of_its_group() -> None:
    prompts = [Prompt(100 + i, "", (i, i + 1), "") for i in range(3)]
    requests = requests_for(prompts, 2, alone())
    assert [(r.prompt_id, r.group, r.sample_index, r.tokens) for r in requests] == [
        (100 + g, g, s, (g, g + 1)) for g in range(3) for s in range(2)
    ]
    assert local_slice(alone(), 6) == slice(0, 6)


class LengthTask(PerResponseTask):
    """Rewards prompt id + response length / 8, or a fixed value."""

    def __init__(self, fixed: float | None = None) -> None:
        self.fixed = fixed

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        return prompt.id + len(response) / 8 if self.fixed is None else self.fixed


def test_each_sample_is_rewarded_for_its_own_prompt() -> None:
    rollouts = random_rollouts(8)
    prompts = [Prompt(100 * g, "", (0,), "") for g in range(2)]
    expected = [100 * (i // 4) + int(n) / 8 for i, n in enumerate(rollouts.response_lengths)]
    rewards = compute_rewards(LengthTask(), prompts, rollouts)  # type: ignore[arg-type]
    assert rewards.dtype == torch.float64 and rewards.tolist() == expected


@pytest.mark.parametrize("fixed", [float("nan"), float("inf")])
def test_a_non_finite_reward_is_refused(fixed: float) -> None:
    rollouts = random_rollouts(8)
    rollouts.rewards = compute_rewards(LengthTask(fixed), [Prompt(0, "", (0,), "")] * 2, rollouts)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="must return a finite number"):
        gather_stats(alone(), rollouts)
