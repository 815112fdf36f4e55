"""What is measured of responses: pass@k, length, diversity, repetition, entropy.

Evaluations during training and `opo eval` both measure here.  Every rank holds the responses that it
generated.  What belongs to one response is computed on its rank; Self-BLEU on the rank that has the group's
first response, to which the others send theirs, because a group may be split over ranks.  Every rank gets the
results, the same numbers under any layout that generates the same responses.

Entropy is −Σ log π / Σ l over the sampled tokens, by the log-probabilities of the engine: unbiased
for the entropy per token of softmax(z/T), the sampled distribution, unless top_p or top_k truncate it.
At T = 1 it is the policy's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.algorithm.diversity import repetition, self_bleu
from opo_megatron.algorithm.pass_at_k import pass_at_k, powers_of_two
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    all_to_all_objects,
    rank_range,
)
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.rollout.engine import Sampling

CORRECT = 1.0
"""Minimum reward of a correct response, for pass@k."""
REPETITION_ORDER = 4


@dataclass(frozen=True)
class ResponseMetrics:
    """Of `samples` responses to each problem, the same on every rank."""

    rewards: Tensor
    """[problems, samples] float64."""
    length_mean: float
    """Tokens of a response, stop token included."""
    truncation_rate: float
    """Share of truncated responses."""
    rep_4: float
    """Mean over responses of the share of 4-grams that occurred in the response before."""
    self_bleu: float | None
    """Mean over problems; None with one sample each."""
    entropy: float | None
    """Nats per token; None where top_p or top_k truncate the distribution, or nothing was recorded."""

    @property
    def problems(self) -> int:
        return self.rewards.shape[0]

    @property
    def samples(self) -> int:
        return self.rewards.shape[1]

    @property
    def accuracy(self) -> float:
        """Mean reward."""
        return float(self.rewards.mean())

    def pass_at_k(self) -> dict[int, Tensor]:
        """k = 1, 2, 4, … and all samples → [problems] float64, whose mean is pass@k."""
        correct = (self.rewards >= CORRECT).sum(1)
        return {k: pass_at_k(correct, self.samples, k) for k in powers_of_two(self.samples)}

    def row(self) -> MetricsRow:
        """The `eval/*` metrics of a step; what was not measured is absent."""
        row: MetricsRow = {
            "eval/problems": self.problems,
            "eval/accuracy": self.accuracy,
            "eval/response_length/mean": self.length_mean,
            "eval/response_length/truncated": self.truncation_rate,
            "eval/rep_4": self.rep_4,
        }
        if self.entropy is not None:
            row["eval/entropy"] = self.entropy
        if self.self_bleu is not None:
            row |= {f"eval/pass@{k}": float(values.mean()) for k, values in self.pass_at_k().items()}
            row["eval/self_bleu"] = self.self_bleu
        return row


def measure_responses(
    parallel: Parallel, rollouts: Rollouts, stats: BatchStats, samples: int, sampling: Sampling
) -> ResponseMetrics:
    """Of all ranks' responses; a collective.

    Args:
        rollouts: this rank's block of the responses, ordered by problem.
        stats: of all of them.
        sampling: how they were sampled.
    """
    responses = rollouts.responses()
    repetitions = torch.tensor([repetition(r, REPETITION_ORDER) for r in responses], dtype=torch.float64)
    is_whole = sampling.top_p == 1 and sampling.top_k == 0 and not sampling.greedy
    nll = _nll(rollouts) if is_whole else None
    gathered = all_gather_objects(parallel, (repetitions, nll))
    entropy = None
    parts = [part for _, part in gathered if part is not None]
    if len(parts) == parallel.world_size:
        entropy = float(torch.cat(parts).sum() / stats.response_lengths.sum())
    return ResponseMetrics(
        rewards=stats.rewards.view(-1, samples),
        length_mean=float(stats.response_lengths.double().mean()),
        truncation_rate=stats.truncated,
        rep_4=float(torch.cat([part for part, _ in gathered]).mean()),
        self_bleu=_self_bleu(parallel, responses, len(stats.groups), samples) if samples > 1 else None,
        entropy=entropy,
    )


def _nll(rollouts: Rollouts) -> Tensor | None:
    """[n] float64: −Σ log π of each response; None where none was recorded."""
    if rollouts.engine_log_prob is None:
        return None
    parts = rollouts.engine_log_prob.double().split(rollouts.response_lengths.tolist())
    return torch.tensor([-float(part.sum()) for part in parts], dtype=torch.float64)


def _self_bleu(parallel: Parallel, responses: Sequence[list[int]], total: int, samples: int) -> float:
    """Mean over problems, each computed by the rank that has the problem's first response."""
    blocks = [rank_range(total, rank, parallel.world_size) for rank in range(parallel.world_size)]
    own_indices = blocks[parallel.rank]
    send_chunks: list[list[list[int]]] = [[] for _ in blocks]
    for index, response in zip(own_indices, responses, strict=True):
        first = index - index % samples
        send_chunks[next(rank for rank, block in enumerate(blocks) if first in block)].append(response)
    # Blocks are contiguous, so concatenation by rank is in order.
    received = [response for part in all_to_all_objects(parallel, send_chunks) for response in part]
    groups = [received[i : i + samples] for i in range(0, len(received), samples)]
    own = torch.tensor([self_bleu(group) for group in groups], dtype=torch.float64)
    return float(torch.cat(all_gather_objects(parallel, own)).mean())
