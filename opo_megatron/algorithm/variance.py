"""Unbiased estimates of the gradient variance under each baseline, from one step's rollouts.

For prompt p with K responses, gradients g_i = ∇log π(y_i) and advantages A_i, the step's gradient is the
mean over prompts of ĝ_p = (1/K) Σ A_i g_i.  Prompts are i.i.d., so over P of them

    variance = 1/(P − 1) Σ_p ‖ĝ_p − mean‖²              estimates tr Cov ĝ_p
    signal   = 1/(P(P − 1)) Σ_{p≠q} ⟨ĝ_p, ĝ_q⟩          estimates ‖E ĝ_p‖²

without bias, whether or not the estimator is biased.  A single signal may be negative; average over
steps.  Compare estimators by variance / signal only: a baseline that includes the sample's own reward
shrinks both.  The variance between prompts does not depend on the baseline:

    between = variance of RLOO − mean_p ( ‖ĝ_p‖² − 1/(K(K−1)) Σ_{i≠j} (r_i − b)(r_j − b) ⟨g_i, g_j⟩ )

where b is the mean reward without samples i and j, so that the product's expectation is ‖E ĝ_p‖² exactly.
The inputs are rewards, weights and the Gram matrix ⟨g_i, g_j⟩; where every token has an advantage of its own,
the products ⟨ĝ_p, ĝ_q⟩ themselves.

A shrunken baseline (`shrinkage.py`) is a function of other prompts, so its ĝ_p are not independent.  It has
the expectation of RLOO, whose signal estimates ‖E ĝ_p‖², and P times the variance of the step's gradient is

    variance = P (‖mean_p ĝ_p‖² − signal of RLOO)

which for independent ĝ_p is the variance above.  Baselines over the whole batch are reported as if their ĝ_p
were independent, an error of O(1/P).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages, group_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, Baseline, Center, Scale, Scope, Weight
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.fitted_weights import FittedWeights
from opo_megatron.algorithm.presets import PRESETS, config_of


@dataclass(frozen=True)
class GradientGram:
    """n samples of P prompts and the Gram matrix of their gradients; float64 except `groups`."""

    gram: Tensor
    """[n, n] ⟨g_i, g_j⟩."""
    rewards: Tensor
    """[n]."""
    lengths: Tensor
    """[n]."""
    groups: Tensor
    """[n] int64: prompt index, 0 to P − 1; every prompt has the same number of samples."""
    energies: EnergySums
    greedy_rewards: Tensor | None = None
    """[n] reward of the greedy response to each sample's prompt, where the run samples one."""
    token_products: dict[str, Tensor] = field(default_factory=dict)
    """[P, P] ⟨ĝ_p, ĝ_q⟩ of estimators with an advantage per token, by name."""

    @property
    def squared_norms(self) -> Tensor:
        """[n] ‖g_i‖²."""
        return self.gram.diagonal()


def is_over_batch(algorithm: AlgorithmConfig) -> bool:
    """Whether a sample's advantage has the rewards of all samples of the batch in it."""
    return algorithm.scope is Scope.batch or algorithm.scale is Scale.token_std


def estimates(samples: GradientGram, fitted: FittedWeights) -> dict[str, tuple[float, float]]:
    """(variance, signal) of every estimator, by name."""
    result = {
        name: variance_and_signal(samples, advantages)
        for name, advantages in estimators(samples, fitted).items()
    }
    for name, advantages in shrunken_estimators(samples, fitted).items():
        result[name] = variance_of_shrunken(samples, advantages)
    for name, products in samples.token_products.items():
        result[name] = _moments(products)
    return result


def variance_and_signal(samples: GradientGram, advantages: Tensor) -> tuple[float, float]:
    """Variance and signal, as defined above, of the estimator with these advantages [n]."""
    return _moments(_products(samples, advantages))


def variance_of_shrunken(samples: GradientGram, advantages: Tensor) -> tuple[float, float]:
    """The same of an unbiased estimator whose baselines are functions of other prompts."""
    rloo = compute_advantages(config_of(Baseline.rloo), samples.rewards, samples.lengths, samples.groups)
    _, signal = variance_and_signal(samples, rloo)
    products = _products(samples, advantages)
    prompts = len(products)
    return prompts * (float(products.sum()) / prompts**2 - signal), signal


def _products(samples: GradientGram, advantages: Tensor) -> Tensor:
    """[P, P] ⟨ĝ_p, ĝ_q⟩."""
    prompts = int(samples.groups.max()) + 1
    size = len(samples.groups) / prompts
    mixing = torch.zeros(prompts, len(advantages), dtype=torch.float64)
    mixing[samples.groups, torch.arange(len(advantages))] = advantages.double() / size
    return mixing @ samples.gram @ mixing.T


def _moments(products: Tensor) -> tuple[float, float]:
    """(variance, signal) of independent ĝ_p, from their inner products [P, P]."""
    prompts = len(products)
    own, all_pairs = float(products.trace()), float(products.sum())
    return (own - all_pairs / prompts) / (prompts - 1), (all_pairs - own) / (prompts * (prompts - 1))


def estimators(samples: GradientGram, fitted: FittedWeights) -> dict[str, Tensor]:
    """Advantages [n] of every preset whose scope is a prompt's group, and with the true squared norms."""
    result = {}
    for baseline in PRESETS:
        config = config_of(baseline)
        needs_greedy = config.center is Center.greedy and samples.greedy_rewards is None
        if is_over_batch(config) or config.shrink or needs_greedy or config.center is Center.token_mean:
            continue
        result[baseline.value] = _advantages(config, samples, samples.energies, fitted)
    # The weight that all others approximate: the best achievable.
    true = EnergySums(samples.squared_norms, samples.squared_norms)
    result["true_norm_loo"] = _advantages(config_of(Baseline.energy_loo), samples, true, fitted)
    return result


def shrunken_estimators(samples: GradientGram, fitted: FittedWeights) -> dict[str, Tensor]:
    """Advantages [n] with James–Stein baselines, of equal and of fitted weights."""
    weights = {"james_stein": Weight.one, "james_stein_auto": Weight.fitted}
    return {
        name: _advantages(config_of(Baseline.james_stein, weight=weight), samples, samples.energies, fitted)
        for name, weight in weights.items()
    }


def _advantages(
    config: AlgorithmConfig, samples: GradientGram, energies: EnergySums, fitted: FittedWeights
) -> Tensor:
    return compute_advantages(
        config, samples.rewards, samples.lengths, samples.groups,
        energies=energies, fitted=fitted, greedy_rewards=samples.greedy_rewards,
    )  # fmt: skip


def between_prompts(samples: GradientGram) -> float | None:
    """The variance between prompts, which no baseline changes; None with fewer than 3 samples per prompt."""
    size = len(samples.groups) // (int(samples.groups.max()) + 1)
    if size < 3:
        return None
    rloo = compute_advantages(config_of(Baseline.rloo), samples.rewards, samples.lengths, samples.groups)
    within = []
    for group in range(int(samples.groups.max()) + 1):
        inside = (samples.groups == group).nonzero()[:, 0]
        r, gram, a = samples.rewards[inside], samples.gram[inside][:, inside], rloo[inside] / size
        others = (r.sum() - r.unsqueeze(0) - r.unsqueeze(1)) / (size - 2)
        pairs = (r.unsqueeze(1) - others) * (r.unsqueeze(0) - others) * gram
        pairs.fill_diagonal_(0)
        within.append(float(a @ gram @ a) - float(pairs.sum()) / (size * (size - 1)))
    return variance_and_signal(samples, rloo)[0] - sum(within) / len(within)


def update_fitted(fitted: FittedWeights, samples: GradientGram) -> None:
    """Update `fitted` with the gradient noise of each of its candidates."""
    offsets = torch.nn.functional.pad(torch.bincount(samples.groups).cumsum(0), (1, 0))
    order = torch.argsort(samples.groups, stable=True)
    size = float(offsets[1])
    noise = []
    for weights in fitted.candidates(samples.lengths, samples.energies):
        _, advantages = group_advantages(samples.rewards[order], weights[order], offsets, True, None)
        mixing = torch.zeros(len(offsets) - 1, len(order), dtype=torch.float64)
        mixing[samples.groups[order], order] = advantages / size
        noise.append((mixing @ samples.gram * mixing).sum())
    fitted.update(samples.lengths, samples.energies, torch.stack(noise))


def correlation(samples: GradientGram, values: Tensor) -> float | None:
    """Correlation of ‖g‖² and `values` [n] within prompts; None where one of them is constant."""
    x, y = _centred(values.double(), samples.groups), _centred(samples.squared_norms, samples.groups)
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else None


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    count = torch.bincount(groups).double()
    means = torch.zeros_like(count).index_add_(0, groups, values) / count
    return values - means[groups]
