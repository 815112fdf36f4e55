"""Exact mode is checked at startup: are engine and policy bitwise equal on this machine?

The engine gets the policy's weights and generates responses to random prompts with 1, 3 and the recipe's
number of slots, so that rows are refilled and batches have one, few and many rows; one prompt fills the
model's context.  Every recorded log-probability must equal that of the training pass, with and without
gradients and with two padded lengths.  The difference must be exactly 0.
"""

from __future__ import annotations

import random

import torch

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.config.rules.exact import needs
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import OnPolicyError, UserError
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine

LONGEST_PROMPT = 32
"""Maximum tokens of a prompt that does not fill the context."""
LONGEST_RESPONSE = 16
STOP_SHARE = 8
"""One token id in this many is a stop token, so that lengths differ."""


def check_exact_device(switch: str, parallel: Parallel) -> None:
    """Check that the device is a CPU.

    Args:
        switch: the key that makes the run exact.

    Raises:
        UserError: naming this rank's device.
    """
    if parallel.device.type != "cpu":
        raise UserError(
            needs(switch, "policy.device", parallel.device.type, "cpu", "where exactness is not proven")
        )


def check_exact(config: Config, policy: Policy, engine: LocalEngine, parallel: Parallel) -> int:
    """Compare engine and policy under different batchings; a collective.  Returns the tokens compared.

    Afterwards gradients are zero and the engine holds the policy's weights.

    Raises:
        OnPolicyError: where any log-probability differs in any bit.
    """
    engine.update_weights(policy.stream_weights(), policy.version)
    configured, compared = engine.slots, 0
    try:
        for slots in sorted({1, 3, configured}):
            engine.slots = slots
            rollouts = engine.generate(
                _requests(policy, parallel.rank, slots, count=slots + slots // 2 + 2),
                _sampling(config, policy),
            )
            all_rollouts = Rollouts.concatenate(all_gather_objects(parallel, rollouts))
            for pad_to_longest in (False, True):
                difference = _largest_difference(config, policy, parallel, all_rollouts, pad_to_longest)
                if not difference == 0:  # NaN is a difference too
                    raise OnPolicyError(
                        f"rollout.local.exact=true, but with {slots} slots engine and policy differ by "
                        f"{difference:.2g} in a token's log-probability on this machine, so exactness cannot "
                        "be claimed; set rollout.local.exact=false and an on_policy.tolerance above that"
                    )
            compared += all_rollouts.response_tokens.numel()
    finally:
        engine.slots = configured
        policy.zero_gradients()
    return compared


def _requests(policy: Policy, rank: int, slots: int, count: int) -> list[GenerationRequest]:
    """Random prompts of different lengths; with 3 slots the first two fill the context."""
    rng = random.Random(f"exact/{rank}/{slots}")
    prompt_limit = policy.config.model.max_sequence_length - _response_limit(policy)
    lengths = [rng.randint(1, min(LONGEST_PROMPT, prompt_limit)) for _ in range(count)]
    if slots == 3:
        lengths[:2] = [prompt_limit, max(1, prompt_limit - 1)]
    prompts = [tuple(rng.randrange(policy.vocab_size) for _ in range(length)) for length in lengths]
    return [GenerationRequest(i, i, rank, prompt) for i, prompt in enumerate(prompts)]


def _response_limit(policy: Policy) -> int:
    return max(1, min(LONGEST_RESPONSE, policy.config.model.max_sequence_length // 2))


def _sampling(config: Config, policy: Policy) -> Sampling:
    return Sampling(
        max_tokens=_response_limit(policy),
        stop_tokens=tuple(range(0, policy.vocab_size, STOP_SHARE)),
        seed=(config.run.seed,),
        temperature=config.rollout.temperature,
    )


def _largest_difference(
    config: Config, policy: Policy, parallel: Parallel, rollouts: Rollouts, pad_to_longest: bool
) -> float:
    """max |Δ log π| of a training pass in which every other sample runs forward-only.

    Args:
        pad_to_longest: schedule micro-batches as if all sequences had the maximum length.
    """
    lengths = rollouts.sequence_lengths
    rollouts.advantages = (torch.arange(len(rollouts)) % 2).double()
    if pad_to_longest:
        lengths = torch.full_like(lengths, int(lengths.max()))
    schedule = policy.schedule(lengths, rollouts.advantages == 0)
    objective = PolicyGradient(float(rollouts.response_tokens.numel()), config.rollout.temperature)
    metrics = policy.checked_gradients(
        rollouts.select(schedule.samples_of(parallel.dp_rank)), schedule, objective
    )
    assert metrics.mismatch is not None
    return metrics.mismatch.max
