"""Baseline weights fitted to the measured gradient variance: `algorithm.baseline=auto`.

With infinitely many responses the best weight is ‖∇log π(y)‖².  With K of them the baseline is itself an
estimate, and widely spread weights make it noisy; which effect dominates depends on the model.  So
mixtures of sample features are evaluated on the measured gradients of earlier steps,

    w = Σ_k c_k x_k / m_k,    x = (1, length, Σ energy),    c on a grid over the simplex,

with m the features' means, and the mixture with the least Σ_p ‖ĝ_p‖² is used: leave-one-out estimators
have equal expectations, so it has the least variance.  c and m are fixed before a step's responses are
sampled, so the weights depend on the samples alone and the estimator stays unbiased.  Each new report
(`updates/variance_report.py`) discounts the earlier ones by `DECAY`.  Before the first one, w = length.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums

FEATURES = ("one", "length", "energy")
STATE = "fitted_weights"
"""Key of `FittedWeights.state` in the run's state."""
DECAY = 0.9
PARTS = 4
CANDIDATES = torch.tensor(
    [c for c in product(range(PARTS + 1), repeat=len(FEATURES)) if sum(c) == PARTS], dtype=torch.float64
).div(PARTS)
"""[15, 3]: all c in steps of 1/4."""


class FittedWeights:
    """The discounted score of every candidate, and the best mixture."""

    def __init__(self) -> None:
        self._means = torch.ones(len(FEATURES), dtype=torch.float64)
        self._noise = torch.zeros(len(CANDIDATES), dtype=torch.float64)
        self.coefficients = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        """c, of `FEATURES`."""

    def __call__(self, lengths: Tensor, energies: EnergySums) -> Tensor:
        """[n] float64: w of samples with `lengths` [n]."""
        return _features(lengths, energies) @ (self.coefficients / self._means)

    def candidates(self, lengths: Tensor, energies: EnergySums) -> Tensor:
        """[candidates, n] float64: w of every candidate, with the means of these samples."""
        features = _features(lengths, energies)
        return (CANDIDATES / _scales(features)) @ features.T

    def update(self, lengths: Tensor, energies: EnergySums, noise: Tensor) -> None:
        """Add one report.

        Args:
            noise: [candidates] Σ_p ‖ĝ_p‖² with each candidate's weights.
        """
        self._means = _scales(_features(lengths, energies))
        self._noise = DECAY * self._noise + noise
        self.coefficients = CANDIDATES[int(self._noise.argmin())]

    def state(self) -> dict[str, Any]:
        """The complete state, for a checkpoint; JSON keeps a float64 exactly."""
        parts = {"means": self._means, "noise": self._noise, "coefficients": self.coefficients}
        return {name: tensor.tolist() for name, tensor in parts.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self._means, self._noise, self.coefficients = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("means", "noise", "coefficients")
        )


def _features(lengths: Tensor, energies: EnergySums) -> Tensor:
    """x [n, 3]."""
    lengths = lengths.double()
    return torch.stack((torch.ones_like(lengths), lengths, energies.energy), 1)


def _scales(features: Tensor) -> Tensor:
    """[3] means; 1 for a feature that is 0 everywhere."""
    means = features.mean(0)
    return torch.where(means > 0, means, 1.0)
