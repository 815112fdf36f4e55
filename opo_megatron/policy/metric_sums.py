"""The metrics of a step: sums over all response tokens, per micro-batch, then over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.on_policy import Mismatch, MismatchSums
from opo_megatron.distributed.process_groups import Parallel, all_reduce


@dataclass(frozen=True)
class StepMetrics:
    """A step's sums over all response tokens of all ranks."""

    loss: float
    tokens: int
    entropy: float | None
    """Mean over tokens; None where there were none."""
    mismatch: Mismatch | None
    """None for demonstrations, which no engine sampled, and where there were no tokens."""
    grad_norm: float = float("nan")
    """Before clipping."""


class MetricSums:
    """This rank's part of a step's sums, on its device until the step is over."""

    def __init__(self, device: torch.device, measures_mismatch: bool) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.mismatch = MismatchSums(device) if measures_mismatch else None

    def add(self, entropy: Tensor, loss: Tensor | None) -> None:
        """Some tokens' entropy [n] and loss [n]; None where they are only measured."""
        total = entropy.double().sum()
        self._sums += torch.stack((total, torch.zeros_like(total) if loss is None else loss.double().sum()))

    def divide_loss(self, normalizer: float) -> None:
        """Divide the losses, which were added without their normalizer."""
        self._sums[1] /= normalizer

    def total(self, parallel: Parallel, response_lengths: Tensor) -> StepMetrics:
        """Over all ranks; a collective.

        Args:
            response_lengths: of this data-parallel rank's samples.
        """
        tokens = torch.tensor([float(response_lengths.sum())], dtype=torch.float64)
        parts = [self._sums.cpu()]
        maximum = torch.zeros((), dtype=torch.float64)
        if self.mismatch is not None:
            parts.append(self.mismatch.values.cpu())
            maximum = all_reduce(parallel, self.mismatch.highest.cpu(), dist.ReduceOp.MAX)
        own = torch.cat(parts) * float(parallel.owns_logits)
        totals = torch.cat((tokens * float(parallel.is_dp_leader), own))
        count, entropy, loss, *differences = all_reduce(parallel, totals).tolist()
        if count == 0:
            return StepMetrics(loss, 0, entropy=None, mismatch=None)
        mismatch = None
        if self.mismatch is not None:
            mismatch = MismatchSums.result(differences, float(maximum), count)
        return StepMetrics(loss, int(count), entropy / count, mismatch)
