"""Engine against policy, from log-probabilities that a forward pass has measured beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from opo_megatron.algorithm.on_policy import Mismatch, MismatchSums
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import Parallel, all_reduce


def engine_mismatch(parallel: Parallel, parts: Sequence[Rollouts], counts: bool = True) -> Mismatch | None:
    """Δ = old − engine log-probability over the tokens of all ranks' parts; a collective.

    Args:
        counts: whether this rank's tokens count: once for samples that several ranks have.

    Returns:
        None where either was not measured, or there are no tokens.
    """
    sums, tokens = MismatchSums(torch.device("cpu")), 0
    for part in parts:
        if part.engine_log_prob is None or part.old_log_prob is None:
            return None
        if part.old_log_prob.numel():
            sums.add(part.old_log_prob - part.engine_log_prob)
        tokens += part.old_log_prob.numel()
    mine = torch.cat((sums.values, torch.tensor([float(tokens)], dtype=torch.float64)))
    *values, count = all_reduce(parallel, mine * float(counts)).tolist()
    highest = all_reduce(parallel, sums.highest, dist.ReduceOp.MAX)
    return MismatchSums.result(values, float(highest), count) if count else None
