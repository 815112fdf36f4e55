"""Tokens of several responses, from which columns are computed before the gradient, in float64.

Every sum is of one response alone, or of all tokens of the mini-batch in the order of its samples: the
parallel layout does not change the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleTokens:
    """All tokens of n responses, one response after another."""

    columns: dict[str, Tensor]
    """[Σl] float64, by name."""
    lengths: Tensor
    """[n] int64."""
    samples: Tensor
    """[n] int64: their indices in the batch."""
    rewards: Tensor
    """[N] float64, of the whole batch."""
    groups: Tensor
    """[N] int64: the prompt of each."""

    def sums(self, values: Tensor) -> Tensor:
        """[n]: Σ values [Σl] of each response, each on its own."""
        parts = values.split(self.lengths.tolist())
        return torch.stack([part.sum() for part in parts]) if parts else values.new_zeros(0)

    def of_groups(self, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """[n]: `statistic` of the rewards to the same prompt, for each of these responses."""
        result = torch.empty_like(self.rewards)
        for group in self.groups.unique().tolist():
            members = self.groups == group
            result[members] = statistic(self.rewards[members])
        return result[self.samples]

    def spread(self, values: Tensor) -> Tensor:
        """[Σl]: a number of each response [n], at each of its tokens."""
        return torch.repeat_interleave(values, self.lengths)


@runtime_checkable
class Derives(Protocol):
    """An objective with columns that are computed before the gradient."""

    def derive(self, tokens: SampleTokens) -> dict[str, Tensor]:
        """The derived columns [Σl] float64, of all `tokens`."""
        ...
