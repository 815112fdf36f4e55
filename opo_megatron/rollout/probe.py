"""The probe after each weight sync: does every engine copy compute the same log-probabilities as the policy?

Every copy continues the same few prompts greedily and returns the log-probability of each token; the policy
runs over the same sequences, and the two must agree.  The prompts never change, so an engine whose KV cache
was not flushed answers from the old cache and is detected.  The weight version is what an engine reports; the
probe tests what it computes.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.schema import Config, ModelConfig
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects, all_reduce
from opo_megatron.errors import OnPolicyError
from opo_megatron.rollout.engine import GenerationRequest, Sampling

if TYPE_CHECKING:
    from opo_megatron.policy.policy import Policy

PROBE_PROMPTS = 4
PROBE_SAMPLING = Sampling(max_tokens=4, stop_tokens=(), seed=(0,), greedy=True)


def probe_sampling(config: Config) -> Sampling:
    """How the probe is generated: with the experts, where training replays them."""
    return replace(PROBE_SAMPLING, routed_experts=bool(config.rollout.routing_replay))


def probe_requests(model: ModelConfig, vocab_size: int) -> list[GenerationRequest]:
    """Random prompts of different lengths, the same in every run of a model."""
    rng = random.Random(0)
    longest = max(1, min(16, model.max_sequence_length - PROBE_SAMPLING.max_tokens))
    lengths = [max(1, longest - 3 * i) for i in range(PROBE_PROMPTS)]
    prompts = [tuple(rng.randrange(vocab_size) for _ in range(length)) for length in lengths]
    return [GenerationRequest(prompt_id=i, group=i, sample_index=0, tokens=p) for i, p in enumerate(prompts)]


def largest_difference(policy: Policy, parallel: Parallel, probes: dict[str, Rollouts]) -> tuple[float, str]:
    """max |log π_policy − log π_engine| over the tokens of all probes, and that copy's name; a collective.

    Args:
        probes: responses of the copies that this rank sends weights to, by name.
    """
    named = [
        (f"{name} (rank {rank})", rollouts)
        for rank, own in enumerate(all_gather_objects(parallel, probes))
        for name, rollouts in own.items()
    ]
    all_rollouts = Rollouts.concatenate([rollouts for _, rollouts in named])
    owners = [name for name, rollouts in named for _ in range(len(rollouts))]
    schedule = policy.schedule(all_rollouts.sequence_lengths)
    samples = schedule.samples_of(parallel.dp_rank)
    own_rollouts = all_rollouts.select(samples)
    log_prob = policy.log_probs(own_rollouts, schedule, PROBE_SAMPLING.temperature)
    assert own_rollouts.engine_log_prob is not None
    differences = (log_prob.double() - own_rollouts.engine_log_prob.double()).abs()
    maxima = torch.zeros(len(owners), dtype=torch.float64)
    for sample, values in zip(
        samples, differences.split(own_rollouts.response_lengths.tolist()), strict=True
    ):
        maxima[sample] = values.max()
    all_reduce(parallel, maxima, dist.ReduceOp.MAX)
    worst = int(maxima.nan_to_num(nan=torch.inf).argmax())
    return float(maxima[worst]), owners[worst]


def check_sync(difference: float, owner: str, tolerance: float, version: int) -> None:
    """Raise where an engine's weights are not the policy's.

    Raises:
        OnPolicyError: naming the copy and the difference.
    """
    if not difference <= tolerance:
        raise OnPolicyError(
            f"after the sync of version {version}, {owner} differs from the policy by {difference:.3g} in a "
            f"token's log-probability, more than on_policy.tolerance={tolerance:g}: it holds other weights, "
            "answers from an old cache, or computes in another precision"
        )
