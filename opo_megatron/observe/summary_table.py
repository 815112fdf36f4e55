"""The closing table of a run, in words that need no paper."""

from __future__ import annotations

from collections.abc import Sequence

from opo_megatron.config import Config
from opo_megatron.observe.metrics_file import MetricsRow

Line = tuple[str, str, str, str]


def summary_table(config: Config, rows: Sequence[MetricsRow], seconds: float) -> tuple[str, list[Line]]:
    """(title, lines of (what, at the start, at the end, what it means)) from all rows of metrics.jsonl."""
    evaluated = [row for row in rows if "eval/accuracy" in row]
    first, last = evaluated[0], evaluated[-1]
    updates = [row for row in rows if "reward/mean" in row]
    samples = config.eval.samples_per_problem
    drawn = "one sampled answer" if samples == 1 else f"{samples} sampled answers"
    lines: list[Line] = [
        (
            "held-out accuracy",
            *_pair(first, last, "eval/accuracy", "{:.1%}"),
            f"{drawn} to each of {last['eval/problems']} problems that were never trained on",
        )
    ]
    if config.eval.greedy:
        pair = _pair(first, last, "eval/greedy_accuracy", "{:.1%}")
        lines.append(("   by likeliest token", *pair, "the same problems, answered without chance"))
    pair = _pair(first, last, "eval/response_length/mean", "{:.1f}")
    lines.append(("answer length", *pair, "tokens per held-out answer, stop token included"))
    if "eval/kl" in last:
        pair = _pair(first, last, "eval/kl", "{:.3f}")
        lines.append(("KL to the start", *pair, "nats per held-out token: how far OPO has moved the policy"))
    if updates:
        begin, end = updates[0], updates[-1]
        entropy = _pair(begin, end, "entropy", "{:.3f}")
        lines.append(("entropy", *entropy, "nats per token: how many ways of answering are left"))
        reward = _pair(begin, end, "reward/mean", "{:.3f}")
        lines.append(("reward", *reward, "mean over the first and over the last training batch"))
        worst = max(row["on_policy/logprob_diff_max"] for row in updates)
        lines.append(
            (
                "largest |Δ log π|",
                "",
                f"{worst:.1e}",
                "largest gap, over all steps and tokens, between a token's log-probability when it was "
                f"drawn and when it was trained on: exactly on-policy{' but for rounding' if worst else ''}",
            )
        )
    steps = rows[-1]["step"]
    here = sum(row.get("run/attempt") == rows[-1].get("run/attempt") for row in updates)
    done = f"{steps} OPO steps" if here == steps else f"{here} more OPO steps, {steps} in all"
    title = (
        f"{done}, one optimizer step each; {seconds:.0f} s since the start; everything is in {config.run.dir}"
    )
    return title, lines


def _pair(first: MetricsRow, last: MetricsRow, name: str, shape: str) -> tuple[str, str]:
    before, after = (shape.format(row[name]) if row.get(name) is not None else "" for row in (first, last))
    return before, after
