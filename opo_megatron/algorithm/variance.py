"""How noisy is the gradient under each baseline?  Unbiased answers from one step's own rollouts.

For prompt p with K responses, gradients g_i = ∇log π(y_i) and advantages A_i the step's gradient is the
mean over prompts of ĝ_p = (1/K) Σ A_i g_i.  Prompts are drawn alike, so over P of them

    variance = 1/(P − 1) Σ_p ‖ĝ_p − mean‖²              estimates tr Cov ĝ_p
    signal   = 1/(P(P − 1)) Σ_{p≠q} ⟨ĝ_p, ĝ_q⟩          estimates ‖E ĝ_p‖²

without bias for every estimator, biased or not; single signals may be negative, their means over steps
settle.  Only variance / signal compares estimators: with its own reward in its baseline an estimator
is smaller in both.  Part of the variance is that prompts differ, which no baseline changes:

    between = variance of RLOO − mean_p ( ‖ĝ_p‖² − 1/(K(K−1)) Σ_{i≠j} (r_i − b)(r_j − b) ⟨g_i, g_j⟩ )

where b is the mean reward without samples i and j, so that the product's expectation is ‖E ĝ_p‖² exactly.
Everything follows from rewards, weights and the matrix of inner products ⟨g_i, g_j⟩.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages, group_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, Baseline, Scope, Weight
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.fitted_weights import FittedWeights
from opo_megatron.algorithm.presets import PRESETS


@dataclass(frozen=True)
class Measured:
    """n samples of P prompts, all float64 but `groups`."""

    gram: Tensor
    """[n, n] ⟨g_i, g_j⟩."""
    rewards: Tensor
    """[n]."""
    lengths: Tensor
    """[n]."""
    groups: Tensor
    """[n] int64: which prompt, 0 to P − 1, each with as many samples."""
    energies: EnergySums

    @property
    def squared_norms(self) -> Tensor:
        """[n] ‖g_i‖²."""
        return self.gram.diagonal()


def variance_and_signal(measured: Measured, advantage: Tensor) -> tuple[float, float]:
    """Of the estimator with these advantages [n], as the module's docstring defines them."""
    prompts = int(measured.groups.max()) + 1
    size = len(measured.groups) / prompts
    mixing = torch.zeros(prompts, len(advantage), dtype=torch.float64)
    mixing[measured.groups, torch.arange(len(advantage))] = advantage.double() / size
    products = mixing @ measured.gram @ mixing.T
    own, all_pairs = float(products.trace()), float(products.sum())
    return (own - all_pairs / prompts) / (prompts - 1), (all_pairs - own) / (prompts * (prompts - 1))


def estimators(measured: Measured, fitted: FittedWeights) -> dict[str, Tensor]:
    """Advantages [n] under every preset of a prompt's baseline, under none, and under the true norms."""
    found = {"none": measured.rewards}
    for baseline, preset in PRESETS.items():
        if preset.scope is Scope.group:
            config = AlgorithmConfig(baseline, **preset._asdict())
            found[baseline.value] = compute_advantages(
                config, measured.rewards, measured.lengths, measured.groups,
                energies=measured.energies, fitted=fitted,
            )  # fmt: skip
    # The weight that the others stand for: what is left to gain.
    true = EnergySums(measured.squared_norms, measured.squared_norms)
    config = AlgorithmConfig(Baseline.energy_loo, **PRESETS[Baseline.energy_loo]._asdict())
    assert config.weight is Weight.energy
    found["true_norm_loo"] = compute_advantages(
        config, measured.rewards, measured.lengths, measured.groups, energies=true
    )
    return found


def between_prompts(measured: Measured) -> float | None:
    """The part of the variance that no baseline changes; None with fewer than three samples a prompt."""
    size = len(measured.groups) // (int(measured.groups.max()) + 1)
    if size < 3:
        return None
    config = AlgorithmConfig(Baseline.rloo, **PRESETS[Baseline.rloo]._asdict())
    rloo = compute_advantages(config, measured.rewards, measured.lengths, measured.groups)
    within = []
    for group in range(int(measured.groups.max()) + 1):
        inside = (measured.groups == group).nonzero()[:, 0]
        r, gram, a = measured.rewards[inside], measured.gram[inside][:, inside], rloo[inside] / size
        others = (r.sum() - r.unsqueeze(0) - r.unsqueeze(1)) / (size - 2)
        pairs = (r.unsqueeze(1) - others) * (r.unsqueeze(0) - others) * gram
        pairs.fill_diagonal_(0)
        within.append(float(a @ gram @ a) - float(pairs.sum()) / (size * (size - 1)))
    return variance_and_signal(measured, rloo)[0] - sum(within) / len(within)


def learn(fitted: FittedWeights, measured: Measured) -> None:
    """Let `fitted` take in how noisy the gradient is under each of its candidates."""
    offsets = torch.nn.functional.pad(torch.bincount(measured.groups).cumsum(0), (1, 0))
    order = torch.argsort(measured.groups, stable=True)
    size = float(offsets[1])
    noise = []
    for weights in fitted.candidates(measured.lengths, measured.energies):
        _, found = group_advantages(measured.rewards[order], weights[order], offsets, True, None)
        mixing = torch.zeros(len(offsets) - 1, len(order), dtype=torch.float64)
        mixing[measured.groups[order], order] = found / size
        noise.append((mixing @ measured.gram * mixing).sum())
    fitted.learn(measured.lengths, measured.energies, torch.stack(noise))


def correlation(measured: Measured, values: Tensor) -> float | None:
    """Of ‖g‖² with `values` [n] among responses to the same prompt; None where one of them is constant."""
    x, y = _centred(values.double(), measured.groups), _centred(measured.squared_norms, measured.groups)
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else None


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    count = torch.bincount(groups).double()
    means = torch.zeros_like(count).index_add_(0, groups, values) / count
    return values - means[groups]
