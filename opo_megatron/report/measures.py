"""The metrics that a report shows, each with its title, unit, and better direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opo_megatron.report.arms import Arm

Better = Literal["high", "low"]


@dataclass(frozen=True)
class Measure:
    """One metric of metrics.jsonl."""

    metric: str
    title: str
    unit: str
    meaning: str
    """The figure's caption, a sentence."""
    number_format: str = "{:.3f}"
    better: Better | None = None
    """None where no direction is better."""
    logarithmic: bool = False


RESPONSE_LENGTH = "tokens per response, stop token included"
CORRELATION = "correlation within a prompt"
SECTIONS: dict[str, tuple[Measure, ...]] = {
    "Held-out problems": (
        Measure(
            "eval/accuracy", "held-out accuracy", "mean reward of sampled responses",
            "One or more sampled responses to each held-out problem.", better="high",
        ),
        Measure(
            "eval/greedy_accuracy", "greedy accuracy", "mean reward of greedy responses",
            "The same problems, with greedy decoding.", better="high",
        ),
        Measure(
            "eval/kl", "KL to the reference", "nats per held-out token",
            "KL of the policy to the weights of OPO's step 0.", "{:.4f}",
        ),
        Measure(
            "eval/kl_per_response", "KL to the reference, per response", "nats per held-out response",
            "The same, summed over a response.",
        ),
        Measure(
            "eval/response_length/mean", "held-out response length", RESPONSE_LENGTH,
            "Of sampled responses to held-out problems.", "{:.1f}",
        ),
        Measure(
            "eval/response_length/truncated", "truncated held-out responses", "fraction of responses",
            "Responses that reached the limit and have no stop token.", "{:.3f}",
        ),
    ),
    "Training batches": (
        Measure(
            "reward/mean", "reward", "mean over a training batch",
            "Rewards of the samples that the step trains on.", better="high",
        ),
        Measure(
            "entropy", "entropy", "nats per token",
            "Entropy of the policy's next-token distribution.",
        ),
        Measure(
            "response_length/mean", "response length", RESPONSE_LENGTH,
            "Of the samples that the step trains on.", "{:.1f}",
        ),
        Measure(
            "grad_norm", "gradient norm", "L2, before clipping",
            "Norm of the gradient of all parameters.",
        ),
        Measure(
            "groups/without_signal", "zero-variance groups", "fraction of prompts",
            "Prompts whose samples all have the same reward: under most baselines, a gradient of exactly 0.",
        ),
        Measure(
            "response_length/truncated", "truncated responses", "fraction of responses",
            "Samples that reached the limit and have no stop token.",
        ),
    ),
    "On-policyness": (
        Measure(
            "on_policy/logprob_diff_max", "largest |Δ log π|", "nats, over a step's tokens",
            "Difference between a token's log-probability in the engine and in the policy.",
            "{:.1e}", logarithmic=True,
        ),
        Measure(
            "on_policy/logprob_diff_mean", "mean |Δ log π|", "nats per token",
            "The same difference, on average.",
            "{:.1e}", logarithmic=True,
        ),
        Measure(
            "on_policy/k3", "KL engine to policy", "nats per token (k3)",
            "Estimated on the sampled tokens; 0 where engine and policy agree.",
            "{:.1e}", logarithmic=True,
        ),
    ),
    "Off-policyness": (
        Measure(
            "on_policy/age", "age of the rollouts", "optimizer steps since they were sampled",
            "Of the rollouts that the step trains on.", "{:.0f}",
        ),
        Measure(
            "off_policy/logprob_diff_mean", "mean |Δ log π| to the sampler", "nats per token",
            "Between the policy that trains on a token and the weights that sampled it.",
            "{:.1e}", logarithmic=True,
        ),
        Measure(
            "off_policy/k3", "KL sampler to policy", "nats per token (k3)",
            "The same, as a divergence, estimated on the sampled tokens.",
            "{:.1e}", logarithmic=True,
        ),
        Measure(
            "off_policy/ess", "effective sample size", "fraction of the tokens",
            "(Σw)² / Σw² with w = exp(Δ log π): 1 where the policy has not moved.",
        ),
    ),
    "Replayed responses": (
        Measure(
            "replay/samples", "replayed samples", "per step",
            "Responses of earlier steps that are trained on once more.", "{:.1f}",
        ),
        Measure(
            "replay/reward_mean", "reward of replayed samples", "mean over those of a step",
            "Rewards that they got when they were sampled.",
        ),
        Measure(
            "replay/age_mean", "age of replayed samples", "steps since they were sampled",
            "On average over those of a step.", "{:.1f}",
        ),
    ),
    "Load of the experts": (
        Measure(
            "experts/fullest_share", "fullest expert", "share of a layer's assignments",
            "Of the layer where it is largest; 1 / experts where all are equally full.",
        ),
        Measure(
            "experts/dead", "dead experts", "fraction of all layers' experts",
            "Experts that no token of the step took.",
        ),
    ),
    "Noise of the gradient": (
        Measure(
            "variance/this_run", "gradient variance", "trace, of the run's estimator",
            "tr Cov of one prompt's gradient.  Not directly comparable with an arm whose baseline includes a "
            "sample's own reward, as opo, group_mean and grpo do: that shrinks both variance and signal.",
            "{:.3g}", logarithmic=True,
        ),
        Measure(
            "variance/correlation_length", "‖∇log π‖² and length", CORRELATION,
            "The paper's baseline assumes that ‖∇log π‖² grows with the length of a response.", "{:+.2f}",
        ),
        Measure(
            "variance/correlation_energy", "‖∇log π‖² and energy", CORRELATION,
            "Energy, Σ ‖onehot − π‖² over the tokens, is a proxy of ‖∇log π‖².", "{:+.2f}",
        ),
    ),
}  # fmt: skip
"""By heading of the page; metrics that no run has are left out."""

_NOT_SHOWN = ("eval/problems",)
"""Settings of an evaluation, not results."""


def sections_of(arms: Sequence[Arm]) -> dict[str, list[Measure]]:
    """The metrics of these arms, in the page's order; evaluation metrics not in `SECTIONS` by their key."""
    present = dict.fromkeys(
        name for arm in arms for run in arm.runs for name in run.metrics() if run.series(name)
    )
    sections = {
        heading: [measure for measure in measures if measure.metric in present]
        for heading, measures in SECTIONS.items()
    }
    known = {measure.metric for measures in SECTIONS.values() for measure in measures}
    for name in present:
        if name.startswith("eval/") and name not in known and name not in _NOT_SHOWN:
            measure = Measure(name, name, "as logged", "As the run logged it.", "{:.4g}")
            sections["Held-out problems"].append(measure)
    return {heading: measures for heading, measures in sections.items() if measures}
