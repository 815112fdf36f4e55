"""One Megatron policy in this process against a dense float64 reference of the objective."""

from __future__ import annotations

import copy

import pytest
import torch

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.objective import PolicyGradient, Supervised
from opo_megatron.algorithm.on_policy import check_mismatch
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.errors import OnPolicyError
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from tests.support import dense_reference
from tests.support.fixtures import VOCAB_SIZE, ragged_rollouts
from tests.support.policies import gradients_of, make_policy
from tests.support.policies import parallel as parallel

TEMPERATURE = 0.7
PACKED = "policy.packing=thd"


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in policy.stream_weights() for name, tensor in bucket}


@pytest.mark.parametrize("form", ["rollout.local.exact=true", "rollout.local.exact=false", PACKED])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_gradient_equals_float64_gradient_of_the_objective(parallel: Parallel, tied: str, form: str) -> None:
    policy, config = make_policy(parallel, f"policy.model.tie_embeddings={tied}", form)
    rollouts = ragged_rollouts()
    lengths = rollouts.response_lengths
    rollouts.advantages = compute_advantages(config.algorithm, rollouts.rewards, lengths, rollouts.groups)
    schedule = policy.schedule(rollouts.sequence_lengths)
    assert schedule.count >= 3
    objective = PolicyGradient(float(lengths.sum()), TEMPERATURE)
    metrics = policy.checked_gradients(rollouts.select(schedule.samples_of(0)), schedule, objective)

    reference = {name: t.double().requires_grad_() for name, t in weights_of(policy).items()}
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(rollouts)):
        one = rollouts.select([i])
        per_token = dense_reference.log_probs(
            config.policy.model,
            reference,
            one.prompt_tokens.tolist(),
            one.response_tokens.tolist(),
            TEMPERATURE,
        )
        # DESIGN: b = Σ l r / Σ l over the group, A = r − b, loss = −(1/N) Σ A Σ log π.
        group = rollouts.groups == rollouts.groups[i]
        baseline = (lengths * rollouts.rewards)[group].sum() / lengths[group].sum()
        loss = loss - (rollouts.rewards[i] - baseline) * per_token.sum() / lengths.sum()
    loss.backward()
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-6)
    gradients = gradients_of(policy)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        error = (gradient.double() - reference[name].grad).norm() / reference[name].grad.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("fraction", [0.25, 0.75, 1.0])
def test_forward_only_for_zero_advantage_changes_nothing_but_the_time(
    parallel: Parallel, fraction: float
) -> None:
    policy, _ = make_policy(parallel)
    rollouts = ragged_rollouts()
    generator = torch.Generator().manual_seed(1)
    rollouts.advantages = torch.randn(len(rollouts), generator=generator, dtype=torch.float64)
    rollouts.advantages[: round(fraction * len(rollouts))] = 0
    rollouts.engine_log_prob = torch.randn(rollouts.response_tokens.numel(), generator=generator)
    zero_advantage = rollouts.advantages == 0
    objective = PolicyGradient(100.0, TEMPERATURE)
    results = []
    for schedule in (
        policy.schedule(rollouts.sequence_lengths),
        policy.schedule(rollouts.sequence_lengths, zero_advantage),
    ):
        batch = rollouts.select(schedule.samples_of(0))
        metrics = policy.checked_gradients(batch, schedule, objective)
        results.append((metrics, {name: gradient.clone() for name, gradient in gradients_of(policy).items()}))
    (full, gradients), (skipped, others) = results
    assert schedule.forward_only is not None
    assert sorted(schedule.forward_only.samples_of(0)) == zero_advantage.nonzero()[:, 0].tolist()
    assert skipped.tokens == full.tokens and skipped.mismatch is not None and full.mismatch is not None
    assert skipped.loss == pytest.approx(full.loss, abs=1e-6)
    assert skipped.entropy == pytest.approx(full.entropy, rel=1e-6)
    assert skipped.mismatch.max == pytest.approx(full.mismatch.max, rel=1e-5)
    assert skipped.mismatch.mean == pytest.approx(full.mismatch.mean, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
        assert fraction < 1 or not others[name].any()


def test_zero_advantage_samples_run_no_backward(parallel: Parallel) -> None:
    policy, _ = make_policy(parallel)
    rollouts = ragged_rollouts()
    rollouts.advantages = torch.ones(len(rollouts), dtype=torch.float64)
    rollouts.advantages[4:] = 0
    schedule = policy.schedule(rollouts.sequence_lengths, rollouts.advantages == 0)
    backward: list[int] = []
    handle = policy.chunks[0].embedding.register_full_backward_hook(
        lambda module, gradients, outputs: backward.append(outputs[0].shape[1])
    )
    policy.checked_gradients(
        rollouts.select(schedule.samples_of(0)), schedule, PolicyGradient(100.0, TEMPERATURE)
    )
    handle.remove()
    assert sum(backward) == 4


@pytest.mark.parametrize("form", ["policy.packing=padded", PACKED])
def test_log_probs_equal_the_dense_reference(parallel: Parallel, form: str) -> None:
    policy, config = make_policy(parallel, form)
    rollouts = ragged_rollouts(8)
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    reference = {name: tensor.double() for name, tensor in weights_of(policy).items()}
    expected = [
        dense_reference.log_probs(config.policy.model, reference, s[:p].tolist(), s[p:].tolist(), TEMPERATURE)
        for s, p in zip(batch.sequences(), batch.prompt_lengths.tolist(), strict=True)
    ]
    measured = policy.log_probs(batch, schedule, TEMPERATURE)
    assert (measured - torch.cat(expected)).abs().max() < 2e-5


def test_supervised_gradient_is_the_policy_gradient_with_advantage_one(parallel: Parallel) -> None:
    policy, _ = make_policy(parallel)
    rollouts = ragged_rollouts()
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    batch.advantages = torch.ones(len(batch), dtype=torch.float64)
    policy.checked_gradients(batch, schedule, PolicyGradient(100.0, temperature=1.0))
    expected = {name: gradient.clone() for name, gradient in gradients_of(policy).items()}
    batch.is_demonstration, batch.advantages = True, None
    policy.checked_gradients(batch, schedule, Supervised(100.0))
    for name, gradient in gradients_of(policy).items():
        assert torch.equal(gradient, expected[name]), name


def test_the_policy_gradient_rejects_demonstrations(parallel: Parallel) -> None:
    policy, _ = make_policy(parallel)
    rollouts = ragged_rollouts(4)
    rollouts.is_demonstration = True
    schedule = policy.schedule(rollouts.sequence_lengths)
    with pytest.raises(ValueError, match="cannot learn from these rollouts"):
        policy.train_step(rollouts, schedule, PolicyGradient(1.0, 1.0), lr=1e-3)


def generate(policy: Policy, config: Config, parallel: Parallel) -> Rollouts:
    """Rollouts sampled by the local engine from the policy's weights."""
    dtype = policy.megatron_config.params_dtype
    engine = LocalEngine(config.policy.model, VOCAB_SIZE, dtype, parallel.device, slots=5)
    engine.update_weights(policy.stream_weights(), policy.version)
    requests = [GenerationRequest(i // 3, i // 3, i % 3, tuple(range(1, 2 + i // 3 % 7))) for i in range(24)]
    sampling = Sampling(max_tokens=12, stop_tokens=(0,), seed=(1,), temperature=TEMPERATURE)
    rollouts = engine.generate(requests, sampling)
    rollouts.advantages = torch.linspace(-1, 1, len(rollouts), dtype=torch.float64)
    return rollouts


@pytest.mark.parametrize("form", ["policy.packing=padded", PACKED])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_engine_agrees_with_the_policys_full_forward(parallel: Parallel, tied: str, form: str) -> None:
    policy, config = make_policy(parallel, f"policy.model.tie_embeddings={tied}", form)
    rollouts = generate(policy, config, parallel)
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    assert (policy.log_probs(batch, schedule, TEMPERATURE) - batch.engine_log_prob).abs().max() <= 2e-5


@pytest.mark.parametrize("form", ["policy.packing=padded", PACKED])
def test_mixture_of_experts_engine_agrees_with_the_policys_full_forward(
    parallel: Parallel, form: str
) -> None:
    policy, config = make_policy(
        parallel, "policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=24", form
    )
    rollouts = generate(policy, config, parallel)
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    assert (policy.log_probs(batch, schedule, TEMPERATURE) - batch.engine_log_prob).abs().max() <= 2e-5


def test_bf16_policy_trains_and_agrees_with_its_engine_to_bf16_rounding(parallel: Parallel) -> None:
    policy, config = make_policy(parallel, "policy.dtype=bf16")
    rollouts = generate(policy, config, parallel)
    assert next(iter(weights_of(policy).values())).dtype == torch.bfloat16
    for _ in range(2):
        schedule = policy.schedule(rollouts.sequence_lengths)
        batch = rollouts.select(schedule.samples_of(0))
        metrics = policy.train_step(batch, schedule, PolicyGradient(100.0, TEMPERATURE), lr=1e-2)
        assert metrics.mismatch.max < 0.05 and metrics.grad_norm > 0
        rollouts = generate(policy, config, parallel)


def test_rollouts_of_stale_weights_are_rejected_before_the_optimizer(
    parallel: Parallel,
) -> None:
    policy, config = make_policy(parallel)
    rollouts = generate(policy, config, parallel)
    stale = copy.deepcopy(rollouts)
    before = weights_of(policy)
    schedule = policy.schedule(rollouts.sequence_lengths)
    objective = PolicyGradient(100.0, TEMPERATURE)

    def pre_step_check(metrics) -> None:
        check_mismatch(config.on_policy, metrics.mismatch)

    metrics = policy.train_step(
        rollouts.select(schedule.samples_of(0)), schedule, objective, 1e-2, pre_step_check
    )
    assert metrics.mismatch.max < 2e-5 and policy.version == 1
    after = weights_of(policy)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(OnPolicyError, match="disagree by"):
        policy.train_step(stale.select(schedule.samples_of(0)), schedule, objective, 1e-2, pre_step_check)
    assert policy.version == 1
    for name, tensor in weights_of(policy).items():
        assert torch.equal(tensor, after[name]), name
    assert all(float(g.abs().max()) == 0.0 for g in gradients_of(policy).values())


def test_new_optimizer_starts_from_zero_moments(parallel: Parallel) -> None:
    """AdamW's first step moves every weight that has a gradient by lr, whatever the steps before."""
    policy, config = make_policy(parallel, "optimizer.clip=0")
    rollouts = ragged_rollouts()
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    batch.advantages = torch.ones(len(batch), dtype=torch.float64)
    for _ in range(3):
        policy.train_step(batch, schedule, PolicyGradient(10.0, 1.0), lr=1e-2)
    policy.start_optimizer(config.optimizer)
    before = weights_of(policy)
    policy.train_step(batch, schedule, PolicyGradient(10.0, 1.0), lr=1e-3)
    change = (weights_of(policy)["lm_head.weight"] - before["lm_head.weight"]).abs()
    assert change.median() == pytest.approx(1e-3, rel=1e-3)
