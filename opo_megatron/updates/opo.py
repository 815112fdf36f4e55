"""What OPO's one optimizer step is computed from: this rank's samples, their schedule, the objective."""

from __future__ import annotations

from torch import Tensor

from opo_megatron.algorithm.config import keeps_zero_variance
from opo_megatron.algorithm.objective import PolicyGradient, opo_objective
from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.redistribute import redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.run import Run


def opo_part(
    run: Run, rollouts: Rollouts, stats: BatchStats, advantages: Tensor
) -> tuple[Rollouts, MicroBatchPlan, PolicyGradient]:
    """Samples of zero-variance groups run forward only."""
    config, policy = run.config, run.policy
    skips = not keeps_zero_variance(config.algorithm)
    schedule = policy.schedule(stats.sequence_lengths, zero_advantage=advantages == 0 if skips else None)
    samples = redistribute_to_dp(run.parallel, rollouts, schedule, len(advantages))
    objective = opo_objective(
        config.algorithm, config.on_policy, stats.response_lengths, config.rollout.temperature
    )
    return samples, schedule, objective
