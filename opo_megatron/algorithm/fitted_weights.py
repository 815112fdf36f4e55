"""Weights of the baseline that learn which of them has least noise: `algorithm.baseline=auto`.

With infinitely many responses the best weight is ‖∇log π(y)‖².  With K of them the baseline is itself an
estimate, and weights that vary much make it a noisy one; which of the two counts for more depends on the
model.  So mixtures of what is known of every sample are tried on earlier steps' measured gradients,

    w = Σ_k c_k x_k / m_k,    x = (1, length, Σ energy),    c on a grid over the simplex,

m the features' means, and the one with least Σ_p ‖ĝ_p‖² is taken: leave-one-out estimators share their
expectation, so that is the one of least variance.  c and m are fixed before a step's responses are
drawn; the weights are then functions of the samples alone and the estimator stays unbiased.  Reports
(`updates/variance_report.py`) fade by `DECAY` each.  Until the first one w is the length.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums

FEATURES = ("one", "length", "energy")
STATE = "fitted_weights"
"""Name of `FittedWeights.state` in what a run remembers."""
DECAY = 0.9
PARTS = 4
CANDIDATES = torch.tensor(
    [c for c in product(range(PARTS + 1), repeat=len(FEATURES)) if sum(c) == PARTS], dtype=torch.float64
).div(PARTS)
"""[15, 3] every c in quarters."""


class FittedWeights:
    """What earlier reports say of every candidate, and the mixture that follows."""

    def __init__(self) -> None:
        self._means = torch.ones(len(FEATURES), dtype=torch.float64)
        self._noise = torch.zeros(len(CANDIDATES), dtype=torch.float64)
        self.coefficients = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        """c, of `FEATURES`."""

    def __call__(self, lengths: Tensor, energies: EnergySums) -> Tensor:
        """[n] float64: w of samples with `lengths` [n]."""
        return _features(lengths, energies) @ (self.coefficients / self._means)

    def candidates(self, lengths: Tensor, energies: EnergySums) -> Tensor:
        """[candidates, n] float64: w under every one, with this report's own means."""
        features = _features(lengths, energies)
        return (CANDIDATES / _scales(features)) @ features.T

    def learn(self, lengths: Tensor, energies: EnergySums, noise: Tensor) -> None:
        """Take in a report.

        Args:
            noise: [candidates] Σ_p ‖ĝ_p‖² under each one's weights.
        """
        self._means = _scales(_features(lengths, energies))
        self._noise = DECAY * self._noise + noise
        self.coefficients = CANDIDATES[int(self._noise.argmin())]

    def state(self) -> dict[str, Any]:
        """All there is to it, for a checkpoint: exact, since JSON keeps every digit of a float64."""
        parts = {"means": self._means, "noise": self._noise, "coefficients": self.coefficients}
        return {name: tensor.tolist() for name, tensor in parts.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._means, self._noise, self.coefficients = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("means", "noise", "coefficients")
        )


def _features(lengths: Tensor, energies: EnergySums) -> Tensor:
    """[n, 3] x."""
    lengths = lengths.double()
    return torch.stack((torch.ones_like(lengths), lengths, energies.energy), 1)


def _scales(features: Tensor) -> Tensor:
    """[3] means; 1 for a feature that is 0 everywhere."""
    means = features.mean(0)
    return torch.where(means > 0, means, 1.0)
