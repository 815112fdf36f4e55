"""OPO on a bandit of two turns: lengths are those of sampled tokens, whatever an environment gives."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, Baseline
from opo_megatron.algorithm.presets import PRESETS
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, gather_stats
from tests.support.conversations import conversations
from tests.support.rollout_batches import alone

FIRST = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64)
SECOND = torch.tensor([[0.2, -0.1], [1.0, 0.0], [-0.7, 0.3]], dtype=torch.float64)
"""Logits of the action in the first turn, and of that in the second after each first one."""
TRAJECTORIES = list(product(range(3), range(2)))
REWARDS = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.75], dtype=torch.float64)
FIRST_LENGTHS, SECOND_LENGTHS = (2, 9, 4), ((3, 11), (1, 2), (6, 1))
GIVEN_LENGTHS = (40, 1, 7)


def lengths_of(trajectories: list[int]) -> Tensor:
    return torch.tensor(
        [
            FIRST_LENGTHS[a] + SECOND_LENGTHS[a][b]
            for a, b in (TRAJECTORIES[i] for i in trajectories)
        ]
    )  # fmt: skip


def rollouts_of(trajectories: list[int]) -> Rollouts:
    """One group of these trajectories, as conversations."""
    pairs = [TRAJECTORIES[i] for i in trajectories]
    responses = [[1] * (FIRST_LENGTHS[a] + SECOND_LENGTHS[a][b]) for a, b in pairs]
    given = [[(2, FIRST_LENGTHS[a])] * GIVEN_LENGTHS[a] for a, _ in pairs]
    rollouts = conversations([[3]] * len(pairs), responses, given)
    rollouts.groups = torch.zeros(len(pairs), dtype=torch.int64)
    rollouts.rewards = REWARDS[trajectories]
    return rollouts


def stats_of(trajectories: list[int]) -> BatchStats:
    return gather_stats(alone(), rollouts_of(trajectories))


def advantages_of(baseline: Baseline, stats: BatchStats) -> Tensor:
    config = AlgorithmConfig(baseline, **PRESETS[baseline]._asdict())
    return compute_advantages(config, stats.rewards, stats.response_lengths, stats.groups)


def scores() -> tuple[Tensor, Tensor]:
    """Probabilities of the trajectories, and the gradients of their log-probabilities [6, 9]."""
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    log_probs = torch.stack([first.log_softmax(0)[a] + second.log_softmax(1)[a, b] for a, b in TRAJECTORIES])
    rows = []
    for log_prob in log_probs:
        gradients = torch.autograd.grad(log_prob, (first, second), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return log_probs.detach().exp(), torch.stack(rows)


@pytest.mark.parametrize(
    "trajectories", [[0, 1], [1, 2, 5], [0, 1, 2, 3, 4, 5], [1, 1, 3, 4], [5, 2, 2, 0, 0]]
)
def test_the_baseline_minimizes_the_variance_proxy_of_sampled_tokens(trajectories: list[int]) -> None:
    """Σ l (r − b)² with l the sampled tokens; a length with given tokens gives another baseline."""
    stats = stats_of(trajectories)
    lengths, rewards = lengths_of(trajectories).double(), REWARDS[trajectories]
    assert torch.equal(stats.response_lengths.double(), lengths)
    found = rewards - advantages_of(Baseline.opo, stats)
    baseline = float((lengths * rewards).sum() / lengths.sum())
    assert found.tolist() == pytest.approx([baseline] * len(trajectories), abs=1e-12)

    def proxy(b: float) -> float:
        return float((lengths * (rewards - b).square()).sum())

    assert all(proxy(baseline) < proxy(baseline + d) for d in (-0.1, -1e-4, 1e-4, 0.1))
    whole = stats.sequence_lengths.double()
    other = float((whole * rewards).sum() / whole.sum())
    assert abs(other - baseline) > 1e-3 and proxy(baseline) < proxy(other)


@pytest.mark.parametrize("samples", [2, 3])
def test_leave_one_out_of_sampled_lengths_is_unbiased(samples: int) -> None:
    probabilities, gradients = scores()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    true_gradient = (probabilities * REWARDS) @ gradients
    estimate, biased = torch.zeros(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    for batch in product(range(6), repeat=samples):
        chosen, stats = list(batch), stats_of(list(batch))
        weight = probabilities[chosen].prod() / samples
        estimate += weight * (advantages_of(Baseline.opo_loo, stats) @ gradients[chosen])
        biased += weight * (advantages_of(Baseline.opo, stats) @ gradients[chosen])
    assert float((estimate - true_gradient).abs().max()) <= 1e-12
    assert float((biased - true_gradient).abs().max()) > 1e-3, "the enumeration sees a bias"
