"""A step in flight: training on complete groups while the engines still sample the others.

A batch's gradient is a sum over groups, and OPO's baseline is a group's own:

    ∇L = −(1/N) Σ_groups Σ_i A_i ∇log π(y_i),    A_i from the group's rewards and lengths alone

So the policy adds up the gradients of groups that are complete, undivided, while the engines sample the rest
with the same weights.  When the last group is in, the sum is reduced over ranks once and divided by N, the
mismatch of the whole batch is judged, and there is one optimizer step.  Every token was sampled by the policy
that is updated, as without overlap; a step takes about max(generation, training) instead of their sum.

All ranks run the loop of `_attempt` in lockstep: each tells the others what has ended on it, and all derive
the same parts (`GroupLedger`) from that.  A failure or a stop on any rank ends the attempt on all of them.
Where the engines of all ranks continue what they had received, the next attempt keeps the same sums and
asks for the samples that are missing; otherwise it starts over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from opo_megatron.algorithm.config import keeps_zero_variance
from opo_megatron.algorithm.objective import loss_normalizer, opo_objective
from opo_megatron.algorithm.on_policy import check_versions
from opo_megatron.batch.group_ledger import Ended, GroupLedger
from opo_megatron.batch.redistribute import send_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.distributed.process_groups import all_gather_objects
from opo_megatron.errors import EngineFailure, NonFiniteError, OnPolicyError, Preempted
from opo_megatron.kernels.advantages import compute_advantages
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.step_timeline import RankTimeline
from opo_megatron.policy.metric_sums import MetricSums, StepMetrics
from opo_megatron.rollout.arrivals import Arrivals
from opo_megatron.rollout.engine import Sampling, StreamingEngine
from opo_megatron.rollout.requests import compute_rewards, requests_for, training_sampling
from opo_megatron.run import Run
from opo_megatron.tasks import Prompt

POLL_SECONDS = 0.1
"""Longest wait for new responses before the ranks compare what they have."""


@dataclass
class StepInFlight:
    """What an attempt has added so far."""

    sums: MetricSums
    ledger: GroupLedger
    own_numbers: dict[tuple[int, int], int]
    """(group, sample index) → number, of the samples that this rank generates."""
    empty: Rollouts
    """No samples, with all columns: the part of a rank that has none of a cut."""
    advantages: Tensor
    """[N] float64, of the groups that are trained on."""
    parts: dict[int, Rollouts] = field(default_factory=dict)
    """This rank's samples that have ended, by number."""
    trained_lengths: list[Tensor] = field(default_factory=list)
    """Response lengths of the samples that this data-parallel rank has trained on."""
    wrong_version: str | None = None
    """The first tokens, of any rank, that other weights sampled."""
    cuts: int = 0

    def rollouts(self, numbers: Sequence[int]) -> Rollouts:
        """Those of this rank's samples, in this order."""
        return Rollouts.concatenate([self.parts[i] for i in numbers]) if numbers else self.empty


def overlapped_update(
    run: Run, step: int, lr: float, timeline: RankTimeline
) -> tuple[Rollouts, BatchStats, Tensor, StepMetrics, MetricsRow]:
    """Sample and train one step; a collective.  Where it raises, no gradients are left.

    Args:
        timeline: takes what this rank does.

    Returns:
        This rank's samples, the statistics and advantages of all, the step's metrics, and the times.
    """
    try:
        return _update(run, step, lr, timeline)
    except Exception:
        run.policy.zero_gradients()
        raise


def _update(
    run: Run, step: int, lr: float, timeline: RankTimeline
) -> tuple[Rollouts, BatchStats, Tensor, StepMetrics, MetricsRow]:
    flight: StepInFlight | None = None

    def attempt(continues: bool) -> StepInFlight:
        nonlocal flight
        timeline.begin_attempt(continues)
        if flight is None or not continues:
            flight = _begin(run, step, sampling)
        _attempt(run, step, flight, sampling, timeline)
        return flight

    sampling = training_sampling(run.config, run.task, step)
    flight = run.generation.retry(attempt, sampling)
    sampled = timeline.now()
    own = flight.ledger.blocks[run.parallel.rank]
    rollouts = run.last_rollouts = flight.rollouts(own)
    run.watchdog.enter("train")
    while groups := _next_part(run, flight):
        with timeline.interval("train"):
            _add_gradients(run, flight, groups)
    rollouts.advantages = flight.advantages[own.start : own.stop]

    def check(metrics: StepMetrics) -> None:
        if flight.wrong_version is not None:
            raise OnPolicyError(flight.wrong_version)
        run.check_on_policy(metrics)

    stats = flight.ledger.stats()
    normalizer = loss_normalizer(run.config.algorithm, stats.response_lengths)
    lengths = torch.cat(flight.trained_lengths)
    with timeline.interval("update"):
        metrics = run.policy.finish_streamed_step(flight.sums, normalizer, lengths, lr, check)
    return rollouts, stats, flight.advantages, metrics, _times(timeline, flight.cuts, sampled)


def _begin(run: Run, step: int, sampling: Sampling) -> StepInFlight:
    """No sample has ended; what was added before is discarded."""
    prompts, samples = run.prompts(step), run.config.rollout.samples_per_prompt
    requests = requests_for(prompts, samples, run.parallel)
    ledger = GroupLedger(len(prompts), samples, run.parallel.world_size)
    first = ledger.blocks[run.parallel.rank].start
    empty = run.generation.engine.generate([], sampling)
    empty.rewards = torch.zeros(0, dtype=torch.float64)
    return StepInFlight(
        run.policy.begin_gradients(measures_mismatch=True),
        ledger,
        {(one.group, one.sample_index): first + i for i, one in enumerate(requests)},
        empty,
        torch.zeros(len(prompts) * samples, dtype=torch.float64),
    )


def _attempt(run: Run, step: int, flight: StepInFlight, sampling: Sampling, timeline: RankTimeline) -> None:
    """Sample the responses that are missing, training on complete groups meanwhile."""
    prompts, ledger = run.prompts(step), flight.ledger
    requests = requests_for(prompts, run.config.rollout.samples_per_prompt, run.parallel)
    missing = [one for one in requests if flight.own_numbers[one.group, one.sample_index] not in flight.parts]
    ended = len(requests) - len(missing)
    tokens = sum(int(part.response_lengths.sum()) for part in flight.parts.values())
    show = run.generation.progress(f"step {step}  generating and training")
    run.watchdog.enter("rollout")
    arrivals = Arrivals(cast(StreamingEngine, run.generation.engine), missing, sampling)
    try:
        while not ledger.is_complete:
            _exchange(run, flight, arrivals, prompts, timeline)
            show(ended + arrivals.finished, len(requests), tokens + arrivals.tokens)
            if not ledger.is_complete and (groups := _next_part(run, flight)):
                run.watchdog.enter("train")
                with timeline.interval("train"):
                    _add_gradients(run, flight, groups)
                run.watchdog.enter("rollout")
        arrivals.finish()
    finally:
        arrivals.close()
        timeline.note_engine(arrivals.began, arrivals.ended, arrivals.finished == len(missing))


def _exchange(
    run: Run, flight: StepInFlight, arrivals: Arrivals, prompts: Sequence[Prompt], timeline: RankTimeline
) -> None:
    """Enter what has ended on any rank into the ledger.

    Raises:
        EngineFailure, Preempted: on all ranks, where one has it.
        NonFiniteError: on all ranks, for a reward that is NaN or infinite.
    """
    failure = stop = wrong = None
    ended: list[Ended] = []
    try:
        if run.generation.stop is not None:
            run.generation.stop.raise_if_stopping()
        for part in arrivals.take(POLL_SECONDS):
            with timeline.interval("reward"):
                part.rewards = compute_rewards(run.task, prompts, part)
            wrong = wrong or _wrong_version(part, run.policy.version)
            keys = zip(part.groups.tolist(), part.sample_indices.tolist(), strict=True)
            numbers = [flight.own_numbers[key] for key in keys]
            flight.parts |= {number: part.select([i]) for i, number in enumerate(numbers)}
            ended.append(Ended.of(numbers, part))
    except EngineFailure as error:
        failure = str(error)
    except Preempted as error:
        stop = str(error)
    events = all_gather_objects(run.parallel, (ended, failure, stop, wrong))
    for of_rank, _, _, wrong_there in events:  # first, because they stay where the step is continued
        flight.wrong_version = flight.wrong_version or wrong_there
        for one in of_rank:
            flight.ledger.enter(one)
    for _, failed, stopped, _ in events:
        if stopped is not None:
            raise Preempted(stopped)
        if failed is not None:
            raise EngineFailure(failed)
    try:
        flight.ledger.check_rewards()
    except NonFiniteError:
        run.last_rollouts = flight.rollouts(sorted(flight.parts))  # what is saved of the batch
        raise


def _wrong_version(rollouts: Rollouts, expected: int) -> str | None:
    """Why these tokens are not the current policy's; judged with the whole batch."""
    try:
        check_versions(rollouts.weight_versions, expected)
    except OnPolicyError as error:
        return str(error)
    return None


def _next_part(run: Run, flight: StepInFlight) -> list[int]:
    rollout, policy = run.config.rollout, run.config.policy
    assert rollout.overlap_micro_batches is not None
    least = rollout.overlap_micro_batches * policy.max_tokens_per_micro_batch * run.parallel.dp_size
    return flight.ledger.next_part(rollout.overlap_order, least)


def _add_gradients(run: Run, flight: StepInFlight, groups: Sequence[int]) -> None:
    """Forward and backward of whole groups; their samples are numbered from 0 here."""
    config, parallel, ledger = run.config, run.parallel, flight.ledger
    stats, numbers = ledger.stats(groups), ledger.samples_of(groups)
    advantages = compute_advantages(
        config.algorithm, stats.rewards, stats.response_lengths, stats.groups, parallel.device
    )
    flight.advantages[torch.tensor(numbers)] = advantages
    held = [[i for i, number in enumerate(numbers) if number in block] for block in ledger.blocks]
    own = held[parallel.rank]
    rollouts = flight.rollouts([numbers[i] for i in own])
    rollouts.advantages = advantages[torch.tensor(own, dtype=torch.int64)]
    skips = not keeps_zero_variance(config.algorithm)
    schedule = run.policy.schedule(stats.sequence_lengths, zero_advantage=advantages == 0 if skips else None)
    samples = send_to_dp(parallel, rollouts, schedule, held)
    objective = opo_objective(
        config.algorithm, config.on_policy, stats.response_lengths, config.rollout.temperature
    )
    run.policy.add_gradients(samples, schedule, replace(objective, normalizer=1.0), flight.sums)
    flight.trained_lengths.append(samples.response_lengths)
    flight.cuts += 1


def _times(timeline: RankTimeline, cuts: int, sampled: float) -> MetricsRow:
    """`time/rollout` ends with the last response; `time/train` is all training, `time/tail` what follows."""
    rollout, tail = sampled, timeline.now() - sampled
    hidden = timeline.seconds("train", until=sampled)
    train = timeline.seconds("train") + timeline.seconds("update")
    return {
        "time/rollout": rollout,
        "time/train": train,
        "time/tail": tail,
        "overlap/cuts": cuts,
        "overlap/hidden": hidden / train,
        "overlap/engine_idle": tail / (rollout + tail),
        "overlap/trainer_idle": (rollout - hidden) / (rollout + tail),
    }
