"""The loss of one micro-batch's tokens, and what a step measures of them.

The LM head knows log π of one chunk of tokens at a time and asks for the coefficient ∂loss/∂log π at once
(`kernels/lm_head.py`).  Here is the one place that chooses how: on GPUs, with OPO's objective, one launch
computes loss, coefficient and mismatch of a chunk (`kernels/triton_token_loss.py`); otherwise the objective
is called chunk by chunk, and the mismatch is summed over the micro-batch once it is complete.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from opo_megatron import kernels
from opo_megatron.algorithm.objective import Objective, PolicyGradient
from opo_megatron.kernels.lm_head import HeadOutput
from opo_megatron.policy.metric_sums import MetricSums


class TokenLoss:
    """Objective, columns and metric sums of one micro-batch."""

    def __init__(self, objective: Objective | None, columns: dict[str, Tensor], sums: MetricSums) -> None:
        """
        Args:
            objective: None where tokens are only measured.
            columns: of the rollouts at these tokens, [n] each.
            sums: of the step, to which `finish` adds.
        """
        self.objective, self._columns, self._sums = objective, columns, sums

    def __call__(self, log_prob: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """(loss, ∂loss/∂log π) of the tokens `part`, float32, from their log π."""
        assert self.objective is not None
        fused = self._fused(log_prob)
        names = self._columns if fused is not None else self.objective.columns
        columns = {name: self._columns[name][part] for name in names}
        return self.objective(log_prob, columns) if fused is None else self._launch(log_prob, fused, columns)

    def finish(self, output: HeadOutput) -> None:
        """Add the whole micro-batch to the step's sums."""
        self._sums.add(output.entropy, output.loss)
        self.add_mismatch(output.log_prob)

    def add_mismatch(self, log_prob: Tensor) -> None:
        """The mismatch of the whole micro-batch, log π [n], unless the launches have added it."""
        mismatch = self._sums.mismatch
        if mismatch is None or not log_prob.numel() or self._fused(log_prob) is not None:
            return
        if kernels.uses_triton(log_prob.device):
            self._launch(log_prob, None, self._columns)
        else:
            mismatch.add(log_prob - self._columns["engine_log_prob"])

    def _fused(self, log_prob: Tensor) -> PolicyGradient | None:
        """The objective, where one launch computes all of a chunk."""
        fits = kernels.uses_triton(log_prob.device) and type(self.objective) is PolicyGradient
        return cast(PolicyGradient, self.objective) if fits else None

    def _launch(
        self, log_prob: Tensor, objective: PolicyGradient | None, columns: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        from opo_megatron.kernels.triton_token_loss import token_loss

        return token_loss(
            log_prob,
            objective,
            columns.get("advantages"),
            columns.get("engine_log_prob"),
            self._sums.mismatch,
        )
