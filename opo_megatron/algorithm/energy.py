"""How much a sample's gradient is going to be, from its probabilities alone.

The gradient of log π_T(y) with respect to the logits is (onehot(y) − π)/T.  Its squared length is,
but for 1/T², the token's *energy*

    e = ‖onehot(y) − π‖² = 1 − 2π(y) + Σ_v π(v)²         0 where the token was certain, below 2

and with respect to the output matrix it is (onehot(y) − π) hᵀ / T, of squared length e·‖h‖²/T².  Summed
over a response's tokens they stand for ‖∇log π‖² as weights of the baseline, as the length does in OPO:
every token's energy is taken for the same there.  Weights matter up to a factor, so T is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.algorithm.config import AlgorithmConfig, Weight


@dataclass(frozen=True)
class EnergySums:
    """Of n responses, over their tokens: [n] float64 each."""

    energy: Tensor
    """Σ e."""
    energy_hidden: Tensor
    """Σ e·‖h‖²."""

    def select(self, index: Tensor) -> EnergySums:
        return EnergySums(self.energy[index], self.energy_hidden[index])


def energy(log_prob: Tensor, sum_squares: Tensor) -> Tensor:
    """[n] e of tokens with log π(y) [n] and Σπ² [n]; never below 0, where rounding would put it."""
    return (1 - 2 * log_prob.exp() + sum_squares).clamp_(min=0)


def needs_energies(algorithm: AlgorithmConfig) -> bool:
    """Whether the baseline's weights are made of energies."""
    return algorithm.weight in (Weight.energy, Weight.energy_hidden, Weight.fitted)


def sums_over(values: Tensor, lengths: Tensor) -> Tensor:
    """[n] float64: Σ over the tokens of each response, for values [Σl] and lengths [n]."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owner, values.double().cpu())
