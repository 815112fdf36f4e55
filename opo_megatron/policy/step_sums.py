"""What a step is told by: sums over all response tokens, micro-batch by micro-batch, then over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.on_policy import Mismatch, k3
from opo_megatron.kernels.head import HeadOutput
from opo_megatron.policy.microbatch import MicroBatch
from opo_megatron.policy.parallel import Parallel, all_reduce


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


class StepSums:
    """This rank's part of a step's sums, on its device until the step is over."""

    def __init__(self, parallel: Parallel, measures_mismatch: bool) -> None:
        self._parallel, self._measures_mismatch = parallel, measures_mismatch
        self._sums = torch.zeros(4, dtype=torch.float64, device=parallel.device)
        self._highest = torch.zeros((), dtype=torch.float64, device=parallel.device)

    def add(self, micro: MicroBatch, output: HeadOutput) -> None:
        """One micro-batch, learned from or only measured."""
        values = [output.entropy.double().sum()]
        values.append(torch.zeros_like(values[0]) if output.loss is None else output.loss.double().sum())
        if self._measures_mismatch and micro.targets.numel():
            delta = (output.log_prob - micro.columns["engine_log_prob"]).double()
            values += [delta.abs().sum(), k3(delta).sum()]
            torch.maximum(self._highest, delta.abs().max(), out=self._highest)
        self._sums[: len(values)] += torch.stack(values)

    def total(self, response_lengths: Tensor) -> StepMetrics:
        """Over all ranks; a collective.

        Args:
            response_lengths: of this data-parallel rank's samples.
        """
        tokens = torch.tensor([float(response_lengths.sum())], dtype=torch.float64)
        totals = torch.cat((tokens, self._sums.cpu())) * (1.0 if self._parallel.reports else 0.0)
        count, entropy, loss, difference, divergence = all_reduce(self._parallel, totals).tolist()
        highest = all_reduce(self._parallel, self._highest.cpu(), dist.ReduceOp.MAX)
        if count == 0:
            return StepMetrics(loss, 0, entropy=None, mismatch=None)
        mismatch = None
        if self._measures_mismatch:
            mismatch = Mismatch(float(highest), difference / count, divergence / count)
        return StepMetrics(loss, int(count), entropy / count, mismatch)
