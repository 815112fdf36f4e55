"""Exact mode is checked at startup: are engine and policy bitwise equal on this machine?

The engine gets the policy's weights and generates responses to random prompts, batched in different ways:
with one, few and many rows, and in all other ways that an engine puts requests together.  Some prompts fill
the model's context.  Every recorded log-probability must equal that of the training pass, with and without
gradients and with two padded lengths, and every response must be the same however it was batched.  The
difference must be exactly 0; otherwise the error names the operation that differs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.config.rules.exact import exact_switch, needs, on_gpus
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import EngineFailure, OnPolicyError, UserError
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import WITHOUT_GRAPHS, Digests, GenerationRequest, Sampling
from opo_megatron.rollout.exact_trace import first_difference, policy_digests
from opo_megatron.weights.stream import NamedTensors

LONGEST_PROMPT = 32
"""Maximum tokens of a prompt that does not fill the context."""
LONGEST_RESPONSE = 16
ATTEMPTS = 2
"""For an engine that dies meanwhile."""
STOP_SHARE = 8
"""One token id in this many is a stop token, so that lengths differ."""


class ExactEngine(Protocol):
    """An engine that can be checked."""

    def update_weights(self, buckets: NamedTensors, version: int) -> None: ...

    def recover(self) -> None: ...

    def batchings(self) -> Sequence[str]:
        """The ways in which requests are put together, such as `with 3 slots`; the same on every rank."""
        ...

    def check_size(self, batching: str) -> tuple[int, int]:
        """How many requests a batching takes, and how many of the first fill the context."""
        ...

    def generate_batched(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, batching: str
    ) -> Rollouts | None:
        """The responses of every copy of the weights that this rank sends to; None where it sends to none."""
        ...

    def trace(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> tuple[Rollouts, list[Digests]] | None:
        """Responses of one copy of the weights, and the digests of their operations; None on other ranks."""
        ...


def check_exact_device(config: Config, parallel: Parallel) -> None:
    """Check what exact mode needs on the device that `policy.device=auto` found.

    Raises:
        UserError: naming the setting.
    """
    switch, device = exact_switch(config), parallel.device.type
    if switch is None or device == "cpu":
        return
    if device != "cuda":
        raise UserError(needs(switch, "policy.device", device, "cpu", "where exactness is not proven"))
    for key, value, needed, reason in on_gpus(config.policy.dtype):
        if value != needed:
            raise UserError(needs(switch, key, value, needed, reason))


def check_exact(config: Config, policy: Policy, engine: ExactEngine, parallel: Parallel) -> int:
    """Compare engine and policy under different batchings; a collective.  Returns the tokens compared.

    Afterwards gradients are zero and the engine holds the policy's weights.

    Raises:
        OnPolicyError: where any log-probability differs in any bit, or a response depends on its batch.
    """
    engine.update_weights(policy.stream_weights(), policy.version)
    compared, sampled = 0, dict[tuple[int, ...], list[int]]()
    try:
        for batching in engine.batchings():
            rollouts = _generate(config, policy, engine, parallel, batching)
            for pad_to_longest in (False, True):
                difference = _largest_difference(config, policy, parallel, rollouts, pad_to_longest)
                if not difference == 0:  # NaN is a difference too
                    raise _not_exact(config, policy, engine, parallel, batching, difference)
            _check_responses(config, rollouts, batching, sampled)
            compared += rollouts.response_tokens.numel()
    finally:
        policy.zero_gradients()
    return compared


def _generate(
    config: Config, policy: Policy, engine: ExactEngine, parallel: Parallel, batching: str
) -> Rollouts:
    """The responses of all ranks' engines.

    Raises:
        UserError: on all ranks, where an engine fails again.
    """
    count, longest = engine.check_size(batching)
    requests = _requests(policy, parallel.rank, count, longest)
    failures: list[str] = []
    for attempt in range(ATTEMPTS):
        if attempt:
            engine.recover()
            engine.update_weights(policy.stream_weights(), policy.version)
        rollouts, failure = None, None
        try:
            rollouts = engine.generate_batched(requests, _sampling(config, policy), batching)
        except (EngineFailure, UserError) as error:
            failure = str(error)
        gathered = all_gather_objects(parallel, (rollouts, failure))
        failures = [text for _, text in gathered if text is not None]
        if not failures:
            return Rollouts.concatenate([one for one, _ in gathered if one is not None])
    raise UserError(f"{exact_switch(config)}=true could not be tested {batching}: {failures[0]}")


def _requests(policy: Policy, rank: int, count: int, longest: int) -> list[GenerationRequest]:
    """Random prompts of different lengths, the first `longest` of which fill the context.

    More requests begin with the same ones.
    """
    rng = random.Random(f"exact/{rank}/{longest}")
    prompt_limit = policy.config.model.max_sequence_length - _response_limit(policy)
    requests = []
    for i in range(count):
        length = rng.randint(1, min(LONGEST_PROMPT, prompt_limit))
        if i < longest:
            length = max(1, prompt_limit - i)
        prompt = tuple(rng.randrange(policy.vocab_size) for _ in range(length))
        requests.append(GenerationRequest(i, i, rank, prompt))
    return requests


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


def _check_responses(
    config: Config, rollouts: Rollouts, batching: str, sampled: dict[tuple[int, ...], list[int]]
) -> None:
    """Compare responses with those to the same requests in other batches.

    Args:
        sampled: the responses so far; updated.

    Raises:
        OnPolicyError: where one differs.
    """
    ends = rollouts.prompt_lengths.cumsum(0).tolist()
    samples = rollouts.sample_indices.tolist()
    for i, response in enumerate(rollouts.responses()):
        begin = ends[i] - int(rollouts.prompt_lengths[i])
        key = (samples[i], int(rollouts.prompt_ids[i]), *rollouts.prompt_tokens[begin : ends[i]].tolist())
        if sampled.setdefault(key, list(response)) != list(response):
            switch = exact_switch(config)
            raise OnPolicyError(
                f"{switch}=true, but {batching} the sampler samples other tokens from the same probabilities "
                f"on this machine, so a resumed run would not sample the same again; set {switch}=false"
            )


def _not_exact(
    config: Config,
    policy: Policy,
    engine: ExactEngine,
    parallel: Parallel,
    batching: str,
    difference: float,
) -> OnPolicyError:
    """The error, with the operation that differs; a collective."""
    switch = exact_switch(config)
    operation = _differing_operation(config, policy, engine, parallel, batching)
    return OnPolicyError(
        f"{switch}=true, but {batching} engine and policy differ by {difference:.2g} in a token's "
        f"log-probability on this machine, first in {operation}, so exactness cannot be claimed; set "
        f"{switch}=false and an on_policy.tolerance above that"
    )


def _differing_operation(
    config: Config, policy: Policy, engine: ExactEngine, parallel: Parallel, batching: str
) -> str:
    """The first operation whose bits differ for a few responses; a collective.

    They are traced without CUDA graphs.
    """
    requests = _requests(policy, 0, 3, longest=0)
    sampling = replace(_sampling(config, policy), stop_tokens=())
    traces = all_gather_objects(parallel, engine.trace(requests, sampling))
    rollouts, engine_digests = next(trace for trace in traces if trace is not None)
    for i, digests in enumerate(engine_digests):
        operation = first_difference(digests, policy_digests(policy, parallel, rollouts.select([i])))
        if operation is not None:
            return operation
    if _largest_difference(config, policy, parallel, rollouts, False) != 0:
        return "the sampler, which records other log-probabilities than those of its logits"
    if batching != WITHOUT_GRAPHS and WITHOUT_GRAPHS in engine.batchings():
        rollouts = _generate(config, policy, engine, parallel, batching)
        if _largest_difference(config, policy, parallel, rollouts, False) != 0:
            rollouts = _generate(config, policy, engine, parallel, WITHOUT_GRAPHS)
            if _largest_difference(config, policy, parallel, rollouts, False) == 0:
                return "the CUDA graphs of decoding, without which they are equal"
    return "an operation whose rows depend on the others of their batch"
