"""The samples of earlier steps that may be replayed: what is kept, and which are chosen.

All on rank 0, oldest first; `sampled_in` says of which step a sample is.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from opo_megatron.algorithm.experience_replay import highest, of_most_variance, power_of_two_up_to
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.choices import ReplayChoice
from opo_megatron.config.rollout import ReplayConfig

_OF_THEIR_STEP = (
    "advantages", "token_advantages", "energy", "energy_hidden", "token_energy", "old_log_prob",
    "reference_log_prob",
)  # fmt: skip
"""Columns that a replayed sample gets anew, or does not need."""


def added(buffer: Rollouts | None, new: Rollouts, step: int) -> Rollouts:
    """The buffer with the samples of `step` at its end."""
    kept = replace(new, sampled_in=torch.full((len(new),), step), **dict.fromkeys(_OF_THEIR_STEP))  # type: ignore[arg-type]
    return kept if buffer is None else Rollouts.concatenate([buffer, kept])


def without_older(buffer: Rollouts, step: int, max_age: int | None) -> Rollouts:
    """Without samples of more than `max_age` steps before `step`."""
    assert buffer.sampled_in is not None
    if max_age is None:
        return buffer
    return buffer.select((buffer.sampled_in >= step - max_age).nonzero()[:, 0])


def newest_per_prompt(buffer: Rollouts, size: int) -> Rollouts:
    """The `size` newest samples of every prompt."""
    seen: Counter[int] = Counter()
    kept = []
    for index in range(len(buffer) - 1, -1, -1):
        prompt = int(buffer.prompt_ids[index])
        seen[prompt] += 1
        if seen[prompt] <= size:
            kept.append(index)
    return buffer.select(kept[::-1])


def choose_per_prompt(
    buffer: Rollouts, prompts: Sequence[int], replay: ReplayConfig, seed: str
) -> list[list[int]]:
    """Indices of `per_prompt` samples of every prompt that has `min_size`, prompt by prompt."""
    assert buffer.rewards is not None and replay.min_size is not None
    of_prompt: dict[int, list[int]] = {prompt: [] for prompt in prompts}
    for index, prompt in enumerate(buffer.prompt_ids.tolist()):
        if prompt in of_prompt:
            of_prompt[prompt].append(index)
    rewards, count = buffer.rewards.tolist(), replay.per_prompt
    chosen = []
    for prompt, own in of_prompt.items():
        if len(own) < max(count, replay.min_size):
            continue
        scores = [rewards[i] for i in own]
        if replay.choose is ReplayChoice.highest:
            picked = highest(scores, count)
        elif replay.choose is ReplayChoice.recent:
            picked = list(range(len(own) - count, len(own)))
        elif replay.choose is ReplayChoice.random:
            picked = sorted(random.Random(f"{seed}/{prompt}").sample(range(len(own)), count))
        else:
            picked = of_most_variance(scores, count)
        chosen.append([own[i] for i in picked])
    return chosen


def choose_at_random(candidates: Sequence[int], size: int, seed: str) -> list[int]:
    """A random subset of `candidates`, of the largest power of two up to `size`, in their order."""
    count = min(power_of_two_up_to(len(candidates)), size)
    return sorted(random.Random(seed).sample(list(candidates), count))
