"""The gradient's variance under every baseline, measured on the run's own policy every few steps.

A bounded number of the step's prompts is measured, before the update, while the policy is still the one that
sampled them.  `variance/*` and `signal/*` of every estimator go to the metrics, one line to the console;
`tools/plot_variance.py` plots them.  With `baseline=auto` the fitted weights are updated from the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, Baseline, Center, VarianceOf, Weight
from opo_megatron.algorithm.fitted_weights import FEATURES, STATE
from opo_megatron.algorithm.presets import PRESETS, config_of
from opo_megatron.algorithm.token_baselines import token_advantages
from opo_megatron.algorithm.variance import (
    GradientGram,
    between_prompts,
    correlation,
    estimates,
    is_over_batch,
    update_fitted,
    variance_and_signal,
    variance_of_shrunken,
)
from opo_megatron.batch.redistribute import redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.config import Config
from opo_megatron.observe.gradient_noise import relative_noise, variance_reports
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.policy import per_sample
from opo_megatron.policy.per_sample import TokenFactors
from opo_megatron.run import Run


def report_is_due(config: Config, step: int) -> bool:
    """Whether OPO step `step` has a report: the first one, and every `algorithm.variance_every` after it."""
    every = config.algorithm.variance_every or 0
    return every > 0 and (step - 1) % every == 0


def variance_report(
    run: Run, step: int, rollouts: Rollouts, stats: BatchStats, advantages: Tensor
) -> MetricsRow:
    """Measure, update the fitted weights where the baseline uses them, and log; a collective of all ranks.

    Args:
        rollouts: this rank's part of the step's samples.
        advantage: [N] of all samples, as the step uses them.
    """
    run.generation.memory.before_training()
    chosen = (stats.groups < run.config.algorithm.variance_prompts).nonzero()[:, 0]
    measured = _measure(run, rollouts, stats, chosen)
    found = estimates(measured, run.fitted_weights)
    for name, over_batch in _over_batch(stats).items():
        found[name] = variance_and_signal(measured, over_batch[chosen])
    if "this_run" not in found:
        shrinks = run.config.algorithm.shrink
        found["this_run"] = (variance_of_shrunken if shrinks else variance_and_signal)(
            measured, advantages[chosen]
        )
    row: MetricsRow = {}
    for name, (variance, signal) in found.items():
        row |= {f"variance/{name}": variance, f"signal/{name}": signal}
    measures = {
        "between_prompts": between_prompts(measured),
        "correlation_length": correlation(measured, measured.lengths),
        "correlation_energy": correlation(measured, measured.energies.energy),
        "correlation_energy_hidden": correlation(measured, measured.energies.energy_hidden),
    }
    row |= {f"variance/{name}": value for name, value in measures.items() if value is not None}
    if run.config.algorithm.weight is Weight.fitted:
        update_fitted(run.fitted_weights, measured)
        run.saver.state[STATE] = run.fitted_weights.state()
        mixture = zip(FEATURES, run.fitted_weights.coefficients.tolist(), strict=True)
        row |= {f"baseline/auto_{name}": value for name, value in mixture}
    if run.files.is_writer:
        run.display.log(_line(step, [*run.files.metrics.read(), row]))
    return row


def _measure(run: Run, rollouts: Rollouts, stats: BatchStats, chosen: Tensor) -> GradientGram:
    """Inner products and energies of the samples `chosen`, in that order."""
    policy, config = run.policy, run.config
    schedule = policy.schedule_replicated(stats.sequence_lengths, chosen.tolist())
    samples = redistribute_to_dp(run.parallel, rollouts, schedule, len(stats.groups))
    whole = config.algorithm.variance_of is VarianceOf.all_parameters
    measure = per_sample.all_parameters if whole else per_sample.output_layer
    scheduled = torch.tensor(schedule.samples_of(run.parallel.dp_rank))
    factors = _token_factors(config.algorithm, stats, scheduled)
    found = measure(policy, samples, schedule, config.rollout.temperature, factors)
    order, size = scheduled.argsort(), config.rollout.samples_per_prompt
    greedy = stats.greedy_rewards
    return GradientGram(
        gram=found.gram[order][:, order],
        rewards=stats.rewards[chosen],
        lengths=stats.response_lengths[chosen].double(),
        groups=stats.groups[chosen],
        energies=found.energies.select(order),
        greedy_rewards=None if greedy is None else greedy[chosen],
        token_products={name: products / size**2 for name, products in found.token_products.items()},
    )


def _token_factors(algorithm: AlgorithmConfig, stats: BatchStats, samples: Tensor) -> TokenFactors:
    """The advantages of the tokens of `samples` under each baseline for tokens, this run's among them."""
    configs = {name.value: config_of(name) for name in (Baseline.otb, Baseline.otb_loo)}
    if algorithm.center is Center.token_mean:
        configs["this_run"] = algorithm
    rewards, lengths = stats.rewards[samples], stats.response_lengths[samples]

    def from_energies(energies: Tensor) -> Tensor:
        arguments = (rewards, lengths, stats.groups[samples], energies)
        return torch.stack([token_advantages(config, *arguments) for config in configs.values()])

    return TokenFactors(tuple(configs), from_energies)


def _over_batch(stats: BatchStats) -> dict[str, Tensor]:
    """[N] advantages of every preset over the whole batch, which the measured samples alone do not give."""
    configs = {baseline.value: config_of(baseline) for baseline in PRESETS}
    return {
        name: compute_advantages(config, stats.rewards, stats.response_lengths, stats.groups)
        for name, config in configs.items()
        if is_over_batch(config)
    }


def _line(step: int, rows: Sequence[MetricsRow]) -> str:
    reports = variance_reports(rows)
    ratios = [f"{name} {ratio:.2f}" for name, ratio in relative_noise(reports).items()]
    keys = {word: f"variance/correlation_{word}" for word in ("length", "energy")}
    assumed = [f"{reports[-1][key]:+.2f} with {word}" for word, key in keys.items() if key in reports[-1]]
    return f"step {step}  gradient's noise: {', '.join(ratios) or 'none yet'} ({len(reports)} reports)" + (
        f"; ‖∇log π‖² correlates {', '.join(assumed)}" if assumed else ""
    )
