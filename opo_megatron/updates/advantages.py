"""The advantages of a step's samples, by the recipe's estimator, in the columns of the rollouts."""

from __future__ import annotations

from torch import Tensor

from opo_megatron.algorithm.config import needs_token_energies
from opo_megatron.algorithm.energy import sums_over
from opo_megatron.algorithm.token_baselines import token_advantages
from opo_megatron.batch.redistribute import local_slice
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.kernels.advantages import compute_advantages
from opo_megatron.run import Run


def set_advantages(run: Run, rollouts: Rollouts, stats: BatchStats) -> Tensor:
    """Set the advantages of this rank's samples.

    Returns:
        [N] of all samples; with a baseline for each token, the mean over the tokens of a response.
    """
    algorithm, parallel = run.config.algorithm, run.parallel
    own = local_slice(parallel, len(stats.groups))
    lengths = stats.response_lengths
    if run.estimator is not None:
        advantages = run.estimator(parallel, stats.rewards, lengths, stats.groups)
    elif needs_token_energies(algorithm):
        assert stats.token_energies is not None
        of_tokens = token_advantages(algorithm, stats.rewards, lengths, stats.groups, stats.token_energies)
        first = int(lengths[: own.start].sum())
        rollouts.token_advantages = of_tokens[first : first + int(lengths[own].sum())]
        advantages = sums_over(of_tokens, lengths) / lengths.clamp(min=1)
    else:
        advantages = compute_advantages(
            algorithm, stats.rewards, lengths, stats.groups, parallel.device,
            stats.energies, run.fitted_weights, stats.greedy_rewards,
        )  # fmt: skip
    rollouts.advantages = advantages[own]
    return advantages
