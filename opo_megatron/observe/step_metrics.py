"""The metrics of a step, by their public names."""

from __future__ import annotations

import resource

from torch import Tensor

from opo_megatron.algorithm.advantages import zero_variance
from opo_megatron.algorithm.on_policy import HISTOGRAM
from opo_megatron.batch.rollouts import FINISH_NAMES
from opo_megatron.batch.stats import BatchStats
from opo_megatron.config import Config
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.utilization import training_tflop
from opo_megatron.policy.metric_sums import StepMetrics


def step_row(
    config: Config,
    vocab_size: int,
    step: int,
    stats: BatchStats,
    advantages: Tensor,
    metrics: StepMetrics,
    lr: float,
) -> MetricsRow:
    """The row of an OPO step, without its times."""
    model, algorithm = config.policy.model, config.algorithm
    zero_advantage = zero_variance(config.algorithm, stats.rewards, stats.groups)
    lengths = stats.response_lengths.double()
    row: MetricsRow = {
        "step": step,
        "reward/mean": float(stats.rewards.mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": int(lengths.max()),
        "response_length/truncated": stats.truncated,
        "advantage/mean": float(advantages.mean()),
        "advantage/rms": float(advantages.square().mean().sqrt()),
        "groups/without_signal": float(zero_advantage.double().mean()),
        "tokens/response": metrics.tokens,
        "tokens/processed": int(stats.sequence_lengths.sum()),
        "compute/train_tflop": training_tflop(model, vocab_size, algorithm, stats, advantages),
        "loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "lr": lr,
    }
    if stats.sampled_groups is not None:
        row["fill/rounds"] = stats.rounds
        row["fill/groups_sampled"] = stats.sampled_groups
        row["fill/reward_mean"] = stats.sampled_reward
    if stats.given_lengths is not None and stats.turns is not None:
        row["conversation/turns_mean"] = float(stats.turns.double().mean())
        row["conversation/turns_max"] = int(stats.turns.max())
        row["conversation/given_tokens"] = int(stats.given_lengths.sum())
        for reason, name in FINISH_NAMES.items():
            row[f"conversation/ended_by_{name}"] = float((stats.finish_reasons == reason).double().mean())
    if metrics.entropy is not None:
        row["entropy"] = metrics.entropy
    if metrics.mismatch is not None:
        row |= {
            "on_policy/logprob_diff_max": metrics.mismatch.max,
            "on_policy/logprob_diff_mean": metrics.mismatch.mean,
            "on_policy/k3": metrics.mismatch.k3,
            "on_policy/ess": metrics.mismatch.ess,
        }
        for edge, fraction in zip(HISTOGRAM, metrics.mismatch.above, strict=True):
            row[f"on_policy/share_above_{edge:.0e}"] = fraction
    return row


def memory_metrics() -> MetricsRow:
    """Peak host memory of this process so far; GPU memory is measured by phase."""
    return {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def throughput_metrics(row: MetricsRow, peak: float | None) -> MetricsRow:
    """Tokens per second of all ranks, and on GPUs the model FLOPs utilization of the training phase.

    Args:
        peak: of all GPUs, in 10¹² operations per second; None where it is not known.
    """
    throughput = {
        f"throughput/{phase}_tokens_per_second": row["tokens/response"] / row[f"time/{phase}"]
        for phase in ("rollout", "train", "step")
        if row.get("tokens/response") and row.get(f"time/{phase}")
    }
    if seconds := row.get("time/train"):
        throughput["throughput/train_tokens_processed_per_second"] = row["tokens/processed"] / seconds
        if peak is not None:
            throughput["throughput/mfu"] = row["compute/train_tflop"] / (seconds * peak)
    return throughput
