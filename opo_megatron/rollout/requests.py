"""From prompts to generation requests, and from responses to rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opo_megatron.algorithm.config import corrects_token_energies, needs_energies, needs_token_energies
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, rank_range
from opo_megatron.errors import UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.tasks import Prompt, Task
from opo_megatron.tasks.base import STREAM_GREEDY, STREAM_TRAIN


def requests_for(
    prompts: Sequence[Prompt], samples_per_prompt: int, parallel: Parallel, groups: range | None = None
) -> list[GenerationRequest]:
    """This rank's share of prompts × samples.

    Sample indices of a prompt that occurs more than once in the batch continue, so that no sample repeats.

    Args:
        groups: the prompts to sample, by their index; default all.

    Raises:
        UserError: for a prompt without tokens.
    """
    groups = range(len(prompts)) if groups is None else groups
    share = rank_range(len(groups) * samples_per_prompt, parallel.rank, parallel.world_size)
    seen: Counter[int] = Counter()
    requests = []
    for group, prompt in enumerate(prompts):
        if not prompt.tokens:
            raise UserError(
                f"prompt {prompt.id} ({prompt.text!r}) has no tokens; give it some text or drop it"
            )
        first = seen[prompt.id] * samples_per_prompt
        seen[prompt.id] += 1
        for sample in range(samples_per_prompt):
            if group in groups and (group - groups.start) * samples_per_prompt + sample in share:
                requests.append(GenerationRequest(prompt.id, group, first + sample, prompt.tokens))
    return requests


def training_sampling(config: Config, task: Task, step: int) -> Sampling:
    """How the responses of an OPO step are sampled."""
    settings = config.rollout
    return Sampling(
        max_tokens=settings.max_response_tokens,
        stop_tokens=task.stop_tokens,
        seed=(config.run.seed, STREAM_TRAIN, step),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        routed_experts=bool(settings.routing_replay),
        energies=needs_energies(config.algorithm),
        token_energies=needs_token_energies(config.algorithm)
        and not corrects_token_energies(config.algorithm, config.on_policy),
    )


def greedy_sampling(config: Config, task: Task, step: int) -> Sampling:
    """How the greedy response to a prompt is generated, which a baseline takes the reward of."""
    return replace(
        training_sampling(config, task, step),
        seed=(config.run.seed, STREAM_GREEDY, step),
        greedy=True,
        routed_experts=False,
        energies=False,
        token_energies=False,
    )


def compute_rewards(task: Task, prompts: Sequence[Prompt], rollouts: Rollouts) -> Tensor:
    """[n] float64: the reward of each response by the task, or by its conversation; `gather_stats` checks
    them on all ranks."""
    if rollouts.given_lengths is not None:
        assert rollouts.rewards is not None
        return rollouts.rewards
    prompt_of = [prompts[group] for group in rollouts.groups.tolist()]
    return torch.tensor(task.rewards(prompt_of, rollouts.responses()), dtype=torch.float64)
