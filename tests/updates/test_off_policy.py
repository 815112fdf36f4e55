"""The clipped objective: against autograd of its definition, and equal to the policy gradient at ratio 1."""

from __future__ import annotations

import pytest
import torch

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.algorithm.objectives.clipped import Clipped
from opo_megatron.updates.off_policy import split_prompts

N = 400


def columns() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    policy, old, reference = -torch.rand(3, N, dtype=torch.float64, generator=generator) * 2
    advantages = torch.randn(N, dtype=torch.float64, generator=generator)
    advantages[::7] = 0
    return policy, {"old_log_prob": old, "reference_log_prob": reference, "advantages": advantages}


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_are_those_of_the_definition(beta: float) -> None:
    policy, batch = columns()
    policy.requires_grad_()
    ratio = (policy - batch["old_log_prob"]).exp()
    advantages, delta = batch["advantages"], batch["reference_log_prob"] - policy
    objective = torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    expected = (-objective + beta * (delta.exp() - 1 - delta)) / 7.0
    (gradient,) = torch.autograd.grad(expected.sum(), policy)
    loss, coefficient = Clipped(7.0, 1.0, 0.2, 0.3, beta)(policy.detach(), batch)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(coefficient, gradient)
    clipped = ((ratio > 1.3) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert int(clipped.sum()) > 50 and (beta > 0 or not coefficient[clipped].any())


def test_at_the_sampling_policy_it_is_the_policy_gradient() -> None:
    policy, batch = columns()
    batch["old_log_prob"] = policy
    _, clipped = Clipped(7.0, 1.0, 0.2, 0.2)(policy, batch)
    _, plain = PolicyGradient(7.0, 1.0)(policy, batch)
    assert torch.equal(clipped, plain)


def test_reference_log_probs_are_required_only_with_a_kl() -> None:
    assert "reference_log_prob" not in Clipped(1.0, 1.0, 0.2, 0.2).columns
    assert "reference_log_prob" in Clipped(1.0, 1.0, 0.2, 0.2, 0.1).columns


def test_mini_batches_are_whole_prompts_and_a_function_of_the_seed() -> None:
    groups = torch.tensor([2, 2, 0, 0, 1, 1, 3, 3])
    parts = split_prompts(groups, 2, "1/5")
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert all(len(part) == 4 and len(set(groups[part].tolist())) == 2 for part in parts)
    assert parts == split_prompts(groups, 2, "1/5")
    assert len({str(split_prompts(groups, 2, f"1/{step}")) for step in range(20)}) > 1
    assert split_prompts(groups, 1, "1/5") == [list(range(8))]
