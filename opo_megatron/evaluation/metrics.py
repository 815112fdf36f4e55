"""What answers to problems show: how often one of k is right, how long, alike and repetitive they are.

Evaluations during training and `opo eval` both measure here.  Every rank holds the answers that it drew;
what belongs to one answer is computed where the answer is, Self-BLEU on the rank that has the group's first
answer, to which others send theirs, because a group may be split over ranks.  Every rank learns the results,
which are the same numbers under any layout that draws the same answers.

Entropy is −Σ log π / Σ l over the sampled tokens, by the log-probabilities that the engine recorded: unbiased
for the entropy per token of softmax(z/T), the distribution that was drawn from, as long as neither top_p nor
top_k cut it.  At T = 1 it is the policy's own.
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

RIGHT = 1.0
"""Reward from which on an answer is right, for pass@k."""
REPETITION_ORDER = 4


@dataclass(frozen=True)
class ResponseMetrics:
    """Of `samples` answers to each of the problems, the same on every rank."""

    rewards: Tensor
    """[problems, samples] float64."""
    length_mean: float
    """Tokens of an answer, stop token included."""
    truncation_rate: float
    """Share of answers that were cut."""
    rep_4: float
    """Mean over answers of the share of 4-grams that stood in the answer before."""
    self_bleu: float | None
    """Mean over problems; None with one sample each."""
    entropy: float | None
    """Nats per token; None where top_p or top_k cut the distribution, or nothing was recorded."""

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
        right = (self.rewards >= RIGHT).sum(1)
        return {k: pass_at_k(right, self.samples, k) for k in powers_of_two(self.samples)}

    def row(self) -> MetricsRow:
        """As `eval/*` metrics of a step; what was not measured is absent."""
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
    parallel: Parallel, rollouts: Rollouts, summary: BatchStats, samples: int, sampling: Sampling
) -> ResponseMetrics:
    """Of all ranks' answers; a collective.

    Args:
        rollouts: this rank's block of the answers, ordered by problem.
        summary: of all of them.
        sampling: how they were drawn.
    """
    responses = rollouts.responses()
    repetitions = torch.tensor([repetition(r, REPETITION_ORDER) for r in responses], dtype=torch.float64)
    is_whole = sampling.top_p == 1 and sampling.top_k == 0 and not sampling.greedy
    nll = _sums(rollouts) if is_whole else None
    gathered = all_gather_objects(parallel, (repetitions, nll))
    entropy = None
    parts = [part for _, part in gathered if part is not None]
    if len(parts) == parallel.world_size:
        entropy = float(torch.cat(parts).sum() / summary.response_lengths.sum())
    return ResponseMetrics(
        rewards=summary.rewards.view(-1, samples),
        length_mean=float(summary.response_lengths.double().mean()),
        truncation_rate=summary.truncated,
        rep_4=float(torch.cat([part for part, _ in gathered]).mean()),
        self_bleu=_self_bleu(parallel, responses, len(summary.groups), samples) if samples > 1 else None,
        entropy=entropy,
    )


def _sums(rollouts: Rollouts) -> Tensor | None:
    """[n] float64: −Σ log π of each answer; None where none was recorded."""
    if rollouts.engine_log_prob is None:
        return None
    parts = rollouts.engine_log_prob.double().split(rollouts.response_lengths.tolist())
    return torch.tensor([-float(part.sum()) for part in parts], dtype=torch.float64)


def _self_bleu(parallel: Parallel, responses: Sequence[list[int]], total: int, samples: int) -> float:
    """Mean over problems, each computed by the rank that has the problem's first answer."""
    blocks = [rank_range(total, rank, parallel.world_size) for rank in range(parallel.world_size)]
    mine = blocks[parallel.rank]
    send_chunks: list[list[list[int]]] = [[] for _ in blocks]
    for place, response in zip(mine, responses, strict=True):
        first = place - place % samples
        send_chunks[next(rank for rank, block in enumerate(blocks) if first in block)].append(response)
    # Blocks are contiguous, so what comes from rank after rank is in order.
    answers = [answer for part in all_to_all_objects(parallel, send_chunks) for answer in part]
    groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    own = torch.tensor([self_bleu(group) for group in groups], dtype=torch.float64)
    return float(torch.cat(all_gather_objects(parallel, own)).mean())
