"""After a sync: does every copy of the weights compute what the policy computes?

The same few prompts go to every copy, which continues them greedily and says the log-probability of
each token; the policy runs over the same sequences, and the two must agree.  The prompts are always
the same, so an engine that kept keys and values of older weights answers from those and is found out.
The weight version says what an engine believes to hold; this says what it holds.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.schema import ModelConfig
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects, all_reduce
from opo_megatron.errors import OnPolicyError
from opo_megatron.rollout.engine import GenerationRequest, Sampling

if TYPE_CHECKING:
    from opo_megatron.policy.policy import Policy

PROBE_PROMPTS = 4
PROBE_SAMPLING = Sampling(max_tokens=4, stop_tokens=(), seed=(0,), greedy=True)


def probe_requests(model: ModelConfig, vocab_size: int) -> list[GenerationRequest]:
    """Random prompts of different lengths, the same in every run of a model."""
    rng = random.Random(0)
    longest = max(1, min(16, model.max_sequence_length - PROBE_SAMPLING.max_tokens))
    lengths = [max(1, longest - 3 * i) for i in range(PROBE_PROMPTS)]
    prompts = [tuple(rng.randrange(vocab_size) for _ in range(length)) for length in lengths]
    return [GenerationRequest(prompt_id=i, group=i, sample_index=0, tokens=p) for i, p in enumerate(prompts)]


def largest_difference(policy: Policy, parallel: Parallel, probes: dict[str, Rollouts]) -> tuple[float, str]:
    """max |log π_policy − log π_engine| over the tokens of all probes, and which copy it is of; a collective.

    Args:
        probes: answers of the copies that this rank answers for, by name.
    """
    named = [
        (f"{name} (rank {rank})", rollouts)
        for rank, own in enumerate(all_gather_objects(parallel, probes))
        for name, rollouts in own.items()
    ]
    batch = Rollouts.concatenate([rollouts for _, rollouts in named])
    owners = [name for name, rollouts in named for _ in range(len(rollouts))]
    schedule = policy.schedule(batch.sequence_lengths)
    mine = schedule.samples_of(parallel.dp_rank)
    part = batch.select(mine)
    found = policy.log_probs(part, schedule, PROBE_SAMPLING.temperature)
    assert part.engine_log_prob is not None
    sizes = (found.double() - part.engine_log_prob.double()).abs()
    worst = torch.zeros(len(owners), dtype=torch.float64)
    for sample, differences in zip(mine, sizes.split(part.response_lengths.tolist()), strict=True):
        worst[sample] = differences.max()
    all_reduce(parallel, worst, dist.ReduceOp.MAX)
    place = int(worst.nan_to_num(nan=torch.inf).argmax())
    return float(worst[place]), owners[place]


def check_sync(difference: float, owner: str, tolerance: float, version: int) -> None:
    """Refuse to generate from weights that are not the policy's.

    Raises:
        OnPolicyError: naming the copy and the difference.
    """
    if not difference <= tolerance:
        raise OnPolicyError(
            f"after the sync of version {version}, {owner} differs from the policy by {difference:.3g} in a "
            f"token's log-probability, more than on_policy.tolerance={tolerance:g}: it holds other weights, "
            "answers from an old cache, or computes in another precision"
        )
