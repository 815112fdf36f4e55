"""The metrics that a report shows: what each is called, its unit, and which direction is better."""

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
    """A sentence below the figure."""
    shape: str = "{:.3f}"
    better: Better | None = None
    """Where a best value means something."""
    logarithmic: bool = False


ANSWER_LENGTH = "tokens per answer, stop token included"
CORRELATION = "correlation within a prompt"
SECTIONS: dict[str, tuple[Measure, ...]] = {
    "Held-out problems": (
        Measure(
            "eval/accuracy", "held-out accuracy", "mean reward of sampled answers",
            "One sampled answer or more to each problem that was never trained on.", better="high",
        ),
        Measure(
            "eval/greedy_accuracy", "greedy accuracy", "mean reward by likeliest token",
            "The same problems, answered without chance.", better="high",
        ),
        Measure(
            "eval/kl", "KL to the start", "nats per held-out token",
            "How far OPO has moved the policy from the weights that it began with.", "{:.4f}",
        ),
        Measure(
            "eval/kl_per_response", "KL to the start, per answer", "nats per held-out answer",
            "The same, summed over an answer.",
        ),
        Measure(
            "eval/response_length/mean", "held-out answer length", ANSWER_LENGTH,
            "Of sampled answers to held-out problems.", "{:.1f}",
        ),
        Measure(
            "eval/response_length/truncated", "held-out answers cut", "share of answers",
            "Answers that reached the limit and have no stop token.", "{:.3f}",
        ),
    ),
    "Training batches": (
        Measure(
            "reward/mean", "reward", "mean over a training batch",
            "Rewards of the samples that the step was trained on.", better="high",
        ),
        Measure(
            "entropy", "entropy", "nats per token",
            "How many ways of answering are left.",
        ),
        Measure(
            "response_length/mean", "response length", ANSWER_LENGTH,
            "Of the samples that the step was trained on.", "{:.1f}",
        ),
        Measure(
            "grad_norm", "gradient norm", "L2, before clipping",
            "Norm of the gradient of all parameters.",
        ),
        Measure(
            "groups/without_signal", "groups without signal", "share of prompts",
            "Prompts whose samples all have one reward: their gradient is exactly 0.",
        ),
        Measure(
            "response_length/truncated", "responses cut", "share of responses",
            "Samples that reached the limit and have no stop token.",
        ),
    ),
    "On-policyness": (
        Measure(
            "on_policy/logprob_diff_max", "largest |Δ log π|", "nats, over a step's tokens",
            "Gap between the log-probability of a token when it was drawn and when it was trained on.",
            "{:.1e}", logarithmic=True,
        ),
        Measure(
            "on_policy/logprob_diff_mean", "mean |Δ log π|", "nats per token",
            "The same gap, on average.",
            "{:.1e}", logarithmic=True,
        ),
        Measure(
            "on_policy/k3", "KL engine to policy", "nats per token (k3)",
            "Estimated on the sampled tokens; rounding alone keeps it from 0.",
            "{:.1e}", logarithmic=True,
        ),
    ),
    "Noise of the gradient": (
        Measure(
            "variance/this_run", "gradient variance", "trace, of the estimator in use",
            "tr Cov of one prompt's gradient.  Not comparable as it is with an arm whose baselines hold a "
            "sample's own reward (opo, group_mean, grpo): that makes variance and signal smaller.",
            "{:.3g}", logarithmic=True,
        ),
        Measure(
            "variance/correlation_length", "‖∇log π‖² and length", CORRELATION,
            "The paper's baseline assumes that ‖∇log π‖² grows with the length of a response.", "{:+.2f}",
        ),
        Measure(
            "variance/correlation_energy", "‖∇log π‖² and energy", CORRELATION,
            "Energy, Σ ‖onehot − π‖² over the tokens, stands for ‖∇log π‖².", "{:+.2f}",
        ),
    ),
}  # fmt: skip
"""By headings of the page; metrics that no run has are left out."""

_NOT_SHOWN = ("eval/problems",)
"""Settings of an evaluation rather than findings."""


def sections_of(arms: Sequence[Arm]) -> dict[str, list[Measure]]:
    """What these arms have, in the page's order; evaluations that are not known here by their key."""
    present = dict.fromkeys(
        name for arm in arms for run in arm.runs for name in run.metrics() if run.series(name)
    )
    found = {
        heading: [measure for measure in measures if measure.metric in present]
        for heading, measures in SECTIONS.items()
    }
    known = {measure.metric for measures in SECTIONS.values() for measure in measures}
    for name in present:
        if name.startswith("eval/") and name not in known and name not in _NOT_SHOWN:
            measure = Measure(name, name, "as logged", "As the run has logged it.", "{:.4g}")
            found["Held-out problems"].append(measure)
    return {heading: measures for heading, measures in found.items() if measures}
