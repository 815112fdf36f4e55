"""The closing table of a run."""

from __future__ import annotations

from collections.abc import Sequence

from opo_megatron.config import Config
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.off_policy import off_policy_words

Line = tuple[str, str, str, str]


def summary_table(config: Config, rows: Sequence[MetricsRow], seconds: float) -> tuple[str, list[Line]]:
    """(title, lines of (name, value at the start, at the end, meaning)), from all rows of metrics.jsonl."""
    evaluated = [row for row in rows if "eval/accuracy" in row]
    first, last = evaluated[0], evaluated[-1]
    updates, stale = [row for row in rows if "reward/mean" in row], config.rollout.staleness
    off_policy = off_policy_words(stale, config.rollout.replay.method.value)
    samples = config.eval.samples_per_problem
    responses = "one sampled response" if samples == 1 else f"{samples} sampled responses"
    lines: list[Line] = [
        (
            "held-out accuracy",
            *_pair(first, last, "eval/accuracy", "{:.1%}"),
            f"{responses} to each of {last['eval/problems']} held-out problems",
        )
    ]
    if config.eval.greedy:
        pair = _pair(first, last, "eval/greedy_accuracy", "{:.1%}")
        lines.append(("   greedy", *pair, "the same problems, with greedy decoding"))
    pair = _pair(first, last, "eval/response_length/mean", "{:.1f}")
    lines.append(("response length", *pair, "tokens per held-out response, stop token included"))
    if "eval/kl" in last:
        pair = _pair(first, last, "eval/kl", "{:.3f}")
        lines.append(("KL to the reference", *pair, "nats per held-out token, to the weights of step 0"))
    if updates:
        begin, end = updates[0], updates[-1]
        entropy = _pair(begin, end, "entropy", "{:.3f}")
        lines.append(("entropy", *entropy, "nats per token, in the first and in the last training batch"))
        reward = _pair(begin, end, "reward/mean", "{:.3f}")
        lines.append(("reward", *reward, "mean over the first and the last training batch"))
        worst = max(row["on_policy/logprob_diff_max"] for row in updates)
        rounding = " up to rounding" if worst else ""
        agreement = "the same when sampled" if off_policy else "exactly on-policy"
        meaning = (
            "largest difference, over all steps and tokens, between a token's log-probability in the engine "
            f"and in the policy: {agreement}{rounding}"
        )
        lines.append(("largest |Δ log π|", "", f"{worst:.1e}", meaning))
        if stale and "off_policy/k3" in end:
            pair = _pair(begin, end, "off_policy/k3", "{:.1e}")
            lines.append(("KL sampler to policy", *pair, "nats per token (k3) when trained on: OFF-POLICY"))
    steps = rows[-1]["step"]
    of_attempt = sum(row.get("run/attempt") == rows[-1].get("run/attempt") for row in updates)
    done = f"{steps} OPO steps" if of_attempt == steps else f"{of_attempt} more OPO steps, {steps} in total"
    each = f", {off_policy}" if off_policy else ", one optimizer step each"
    title = f"{done}{each}; {seconds:.0f} s since the start; files in {config.run.dir}"
    return title, lines


def _pair(first: MetricsRow, last: MetricsRow, name: str, spec: str) -> tuple[str, str]:
    before, after = (spec.format(row[name]) if row.get(name) is not None else "" for row in (first, last))
    return before, after
