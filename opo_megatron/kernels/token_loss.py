"""What becomes of every token's log π: loss and coefficient, and how far the engine was from it.

The head knows log π of one chunk of tokens at a time and asks for the coefficient at once; this is what
it asks.  Here is the one place that chooses: on GPUs one kernel makes all of it of a chunk
(`kernels/triton_token_loss.py`) where the objective is OPO's; elsewhere the objective is called chunk by chunk
and the mismatch is summed over the micro-batch when it is complete.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from opo_megatron import kernels
from opo_megatron.algorithm.objective import Objective, PolicyGradient
from opo_megatron.algorithm.on_policy import MismatchSums


class TokenLoss:
    """The tokens of one micro-batch, learned from or only measured."""

    def __init__(
        self, objective: Objective | None, columns: dict[str, Tensor], mismatch: MismatchSums | None
    ) -> None:
        """Take one micro-batch.

        Args:
            objective: None where nothing is learned.
            columns: of the batch at its tokens, [n] each.
            mismatch: to which the difference to the column `engine_log_prob` is added; None measures none.
        """
        self.objective, self._columns, self._mismatch = objective, columns, mismatch

    def __call__(self, log_prob: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """(loss, ∂loss/∂log π) of the tokens `part`, whose log π this is, float32."""
        assert self.objective is not None
        fused = self._fused(log_prob)
        names = self._columns if fused is not None else self.objective.columns
        columns = {name: self._columns[name][part] for name in names}
        return self.objective(log_prob, columns) if fused is None else self._launch(log_prob, fused, columns)

    def finish(self, log_prob: Tensor) -> None:
        """Measure the mismatch of the whole micro-batch, log π [n], unless that is done."""
        if self._mismatch is None or not log_prob.numel() or self._fused(log_prob) is not None:
            return
        if kernels.uses_triton(log_prob.device):
            self._launch(log_prob, None, self._columns)
        else:
            self._mismatch.add(log_prob - self._columns["engine_log_prob"])

    def _fused(self, log_prob: Tensor) -> PolicyGradient | None:
        """The objective, where one launch makes all of a chunk."""
        fits = kernels.uses_triton(log_prob.device) and type(self.objective) is PolicyGradient
        return cast(PolicyGradient, self.objective) if fits else None

    def _launch(
        self, log_prob: Tensor, objective: PolicyGradient | None, columns: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        from opo_megatron.kernels.triton_token_loss import token_loss

        return token_loss(
            log_prob, objective, columns.get("advantages"), columns.get("engine_log_prob"), self._mismatch
        )
