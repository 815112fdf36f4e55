"""The gradient of conversations against a dense float64 reference with a mask over sampled tokens."""

from __future__ import annotations

import pytest
import torch

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.distributed.process_groups import Parallel
from tests.support import dense_reference
from tests.support.conversations import merged, ragged_conversations
from tests.support.policies import gradients_of, make_policy, weights_of
from tests.support.policies import parallel as parallel

TEMPERATURE = 0.7


@pytest.mark.parametrize(
    "form", ["policy.packing=padded", "policy.packing=thd", "rollout.local.exact=true"]
)  # fmt: skip
def test_gradient_of_conversations_equals_the_masked_float64_gradient(parallel: Parallel, form: str) -> None:
    policy, config = make_policy(parallel, form)
    rollouts = ragged_conversations()
    assert rollouts.turns is not None and rollouts.turns.unique().numel() == 4
    lengths = rollouts.response_lengths
    rollouts.advantages = compute_advantages(config.algorithm, rollouts.rewards, lengths, rollouts.groups)
    schedule = policy.schedule(rollouts.sequence_lengths)
    assert schedule.count >= 3
    objective = PolicyGradient(float(lengths.sum()), TEMPERATURE)
    metrics = policy.checked_gradients(rollouts.select(schedule.samples_of(0)), schedule, objective)

    reference = {name: t.double().requires_grad_() for name, t in weights_of(policy).items()}
    loss = torch.zeros((), dtype=torch.float64)
    for i, sequence in enumerate(merged(rollouts)):
        tokens = [token for token, _ in sequence]
        of_all = dense_reference.log_probs(
            config.policy.model, reference, tokens[:1], tokens[1:], TEMPERATURE
        )
        mask = torch.tensor([sampled for _, sampled in sequence[1:]])
        assert int(mask.sum()) == int(lengths[i])
        group = rollouts.groups == rollouts.groups[i]
        baseline = (lengths * rollouts.rewards)[group].sum() / lengths[group].sum()
        loss = loss - (rollouts.rewards[i] - baseline) * of_all[mask].sum() / lengths.sum()
    loss.backward()
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-6)
    for name, gradient in gradients_of(policy).items():
        error = (gradient.double() - reference[name].grad).norm() / reference[name].grad.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
