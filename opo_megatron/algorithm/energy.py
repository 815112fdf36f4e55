"""The squared-score proxy ("energy"): the size of a sample's gradient, from its probabilities alone.

The gradient of log π_T(y) with respect to the logits is (onehot(y) − π)/T.  Its squared norm, without
the factor 1/T², is the token's *energy*

    e = ‖onehot(y) − π‖² = 1 − 2π(y) + Σ_v π(v)²         0 ≤ e < 2; 0 for a token of probability 1

With respect to the output matrix the gradient is (onehot(y) − π) hᵀ / T, of squared norm e·‖h‖²/T².
Summed over a response's tokens, energies approximate ‖∇log π‖² as baseline weights; OPO's length weight
is the case of equal energies.  A common factor of the weights cancels, so T is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EnergySums:
    """Sums over the tokens of each of n responses, [n] float64."""

    energy: Tensor
    """Σ e."""
    energy_hidden: Tensor
    """Σ e·‖h‖²."""

    def select(self, index: Tensor) -> EnergySums:
        return EnergySums(self.energy[index], self.energy_hidden[index])


def energy(log_prob: Tensor, sum_squares: Tensor) -> Tensor:
    """[n] e of tokens with log π(y) [n] and Σπ² [n]; clamped at 0 against rounding."""
    return (1 - 2 * log_prob.exp() + sum_squares).clamp_(min=0)


def sums_over(values: Tensor, lengths: Tensor) -> Tensor:
    """[n] float64: Σ over the tokens of each response, for values [Σl] and lengths [n]."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owner, values.double().cpu())
