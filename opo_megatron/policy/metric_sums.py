"""What a step is told by: sums over all response tokens, micro-batch by micro-batch, then over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.objective import Objective
from opo_megatron.algorithm.on_policy import Mismatch, MismatchSums
from opo_megatron.batch.micro_batch import MicroBatch
from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.kernels.lm_head import HeadOutput
from opo_megatron.kernels.token_loss import TokenLoss


@dataclass(frozen=True)
class StepMetrics:
    """A step's sums over all response tokens of all ranks."""

    loss: float
    tokens: int
    entropy: float | None
    """Mean over tokens; None where there were none."""
    mismatch: Mismatch | None
    """None for demonstrations, which no engine drew, and where there were no tokens."""
    grad_norm: float = float("nan")
    """Before clipping."""


class MetricSums:
    """This rank's part of a step's sums, on its device until the step is over."""

    def __init__(self, parallel: Parallel, measures_mismatch: bool) -> None:
        self._parallel = parallel
        self._sums = torch.zeros(2, dtype=torch.float64, device=parallel.device)
        self._mismatch = MismatchSums(parallel.device) if measures_mismatch else None

    def tokens(self, micro: MicroBatch, objective: Objective | None) -> TokenLoss:
        """What the head asks for coefficients, and what adds the mismatch; None: only measured."""
        return TokenLoss(objective, micro.columns, self._mismatch)

    def add(self, tokens: TokenLoss, output: HeadOutput) -> None:
        """One micro-batch, learned from or only measured."""
        entropy = output.entropy.double().sum()
        loss = torch.zeros_like(entropy) if output.loss is None else output.loss.double().sum()
        self._sums += torch.stack((entropy, loss))
        tokens.finish(output.log_prob)

    def total(self, response_lengths: Tensor) -> StepMetrics:
        """Over all ranks; a collective.

        Args:
            response_lengths: of this data-parallel rank's samples.
        """
        tokens = torch.tensor([float(response_lengths.sum())], dtype=torch.float64)
        parts = [self._sums.cpu()]
        highest = torch.zeros((), dtype=torch.float64)
        if self._mismatch is not None:
            parts.append(self._mismatch.values.cpu())
            highest = all_reduce(self._parallel, self._mismatch.highest.cpu(), dist.ReduceOp.MAX)
        own = torch.cat(parts) * float(self._parallel.owns_logits)
        totals = torch.cat((tokens * float(self._parallel.is_dp_leader), own))
        count, entropy, loss, *differences = all_reduce(self._parallel, totals).tolist()
        if count == 0:
            return StepMetrics(loss, 0, entropy=None, mismatch=None)
        mismatch = None
        if self._mismatch is not None:
            mismatch = MismatchSums.result(differences, float(highest), count)
        return StepMetrics(loss, int(count), entropy / count, mismatch)
