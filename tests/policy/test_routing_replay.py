"""Replayed experts: gradients against a float64 reference and finite differences, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.schema import ModelConfig
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.policy.policy import Policy
from opo_megatron.policy.routing_replay import check_routed_experts
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from tests.support import dense_reference
from tests.support.fixtures import VOCAB_SIZE, ragged_rollouts
from tests.support.policies import gradients_of, make_policy
from tests.support.policies import parallel as parallel

TEMPERATURE = 0.7
MODEL = "policy.model."
EXPERTS = (
    f"{MODEL}num_layers=2",
    f"{MODEL}num_moe_experts=6",
    f"{MODEL}moe_router_topk=2",
    f"{MODEL}moe_ffn_hidden_size=24",
)
PACKED, FULL = "policy.packing=thd", "policy.recompute=full"
PRE_SOFTMAX = f"{MODEL}moe_router_pre_softmax=true"
FORMS = ((), (PACKED,), (FULL,), (PACKED, FULL), (PRE_SOFTMAX, f"{MODEL}moe_router_topk=1"))


def with_experts(rollouts: Rollouts, model: ModelConfig, seed: int = 0) -> Rollouts:
    """The same samples with experts that no router had a say in, and random advantages."""
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = int(rollouts.input_lengths.sum()), model.num_moe_experts or 0
    order = torch.rand(tokens, model.num_layers, experts, generator=generator).argsort(-1)
    chosen = order[..., : model.moe_router_topk].to(torch.uint8)
    advantages = torch.randn(len(rollouts), generator=generator, dtype=torch.float64)
    return replace(rollouts, routed_experts=chosen, advantages=advantages)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in policy.stream_weights() for name, tensor in bucket}


def reference_loss(model: ModelConfig, weights: dict[str, Tensor], rollouts: Rollouts) -> Tensor:
    """−Σ A log π in float64 with the rollouts' experts."""
    assert rollouts.advantages is not None
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(rollouts)):
        one = rollouts.select([i])
        prompt, response = one.prompt_tokens.tolist(), one.response_tokens.tolist()
        found = dense_reference.log_probs(model, weights, prompt, response, TEMPERATURE, one.routed_experts)
        loss = loss - rollouts.advantages[i] * found.sum()
    return loss


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(form) or "padded")
def test_gradient_equals_float64_gradient_with_the_replayed_experts(
    parallel: Parallel, form: tuple[str, ...]
) -> None:
    policy, config = make_policy(parallel, *EXPERTS, *form)
    rollouts = with_experts(ragged_rollouts(12), config.policy.model)
    schedule = policy.schedule(rollouts.sequence_lengths)
    assert schedule.count >= 2
    own = rollouts.select(schedule.samples_of(0))
    policy.checked_gradients(own, schedule, PolicyGradient(1.0, TEMPERATURE))
    found = {name: gradient.clone() for name, gradient in gradients_of(policy).items()}

    weights = {name: tensor.double().requires_grad_() for name, tensor in weights_of(policy).items()}
    reference_loss(config.policy.model, weights, rollouts).backward()
    assert found.keys() == weights.keys()
    assert all(found[name].norm() > 0 for name in found if name.endswith("mlp.gate.weight"))
    for name, gradient in found.items():
        error = (gradient.double() - weights[name].grad).norm() / weights[name].grad.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


def test_a_routers_gradient_equals_a_finite_difference_of_the_loss(parallel: Parallel) -> None:
    policy, config = make_policy(parallel, *EXPERTS, FULL)
    rollouts = with_experts(ragged_rollouts(12), config.policy.model)
    schedule = policy.schedule(rollouts.sequence_lengths)
    own = rollouts.select(schedule.samples_of(0))
    objective = PolicyGradient(1.0, TEMPERATURE)
    policy.checked_gradients(own, schedule, objective)
    routers = [w for n, w in policy.chunks[0].named_parameters() if n.endswith("mlp.router.weight")]
    gradients = [router.main_grad.clone() for router in routers]
    assert len(routers) == config.policy.model.num_layers
    for router, gradient in zip(routers, gradients, strict=True):
        step, losses = 0.05 * gradient / gradient.norm(), []
        for sign in (1, -2):
            with torch.no_grad():
                router.add_(sign * step)
            losses.append(policy.checked_gradients(own, schedule, objective).loss)
        with torch.no_grad():
            router.add_(step)
        assert (losses[0] - losses[1]) / 0.1 == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_without_replay_the_routers_choose_and_the_result_differs(parallel: Parallel) -> None:
    policy, config = make_policy(parallel, *EXPERTS)
    rollouts = with_experts(ragged_rollouts(12), config.policy.model)
    schedule = policy.schedule(rollouts.sequence_lengths)
    own = rollouts.select(schedule.samples_of(0))
    free = replace(own, routed_experts=None)
    before = policy.log_probs(free, schedule, TEMPERATURE)
    replayed = policy.log_probs(own, schedule, TEMPERATURE)
    assert float((replayed - before).abs().max()) > 0.01
    # Nothing of a replay stays.
    assert torch.equal(policy.log_probs(free, schedule, TEMPERATURE), before)
    assert torch.equal(policy.log_probs(own, schedule, TEMPERATURE), replayed)


@pytest.mark.parametrize("form", [(), (FULL,)], ids=["no recompute", "recompute"])
def test_a_pass_that_fails_leaves_nothing_to_replay(
    parallel: Parallel, form: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(parallel, *EXPERTS, *form)
    rollouts = with_experts(ragged_rollouts(12), config.policy.model)
    schedule = policy.schedule(rollouts.sequence_lengths)
    own, objective = rollouts.select(schedule.samples_of(0)), PolicyGradient(1.0, TEMPERATURE)
    policy.checked_gradients(own, schedule, objective)
    expected = {name: gradient.clone() for name, gradient in gradients_of(policy).items()}
    calls = iter(range(100))

    def fail_in_the_second() -> None:
        if next(calls) == 1:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "on_micro_batch", fail_in_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.checked_gradients(own, schedule, objective)
    routers = [router for chunk in policy.routing_replay._routers for router in chunk]
    assert len(routers) == 2
    for router in routers:
        assert router.router_replay.router_replay_action is None
        assert router.router_replay.target_topk_idx is None
        assert router.router_replay.replay_backward_list == []
    policy.checked_gradients(own, schedule, objective)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients_of(policy).items())


def test_megatrons_list_of_routers_does_not_grow_with_every_policy(parallel: Parallel) -> None:
    make_policy(parallel, *EXPERTS)
    assert RouterReplay.global_router_replay_instances == []


MOE = ModelConfig(2, 32, 48, 4, 2, 8, num_moe_experts=6, moe_router_topk=2, vocab_size=VOCAB_SIZE)


def one_sample(experts: Tensor) -> Rollouts:
    return replace(Rollouts.from_demonstrations([[1, 2]], [[3, 4]]), routed_experts=experts)


@pytest.mark.parametrize(
    ("experts", "model", "message"),
    [
        (torch.zeros(4, 2, 2), MOE, r"shape \(4, 2, 2\), where the model has \(3, 2, 2\)"),
        (torch.zeros(3, 4, 2), MOE, r"shape \(3, 4, 2\), where the model has \(3, 2, 2\)"),
        (torch.zeros(3, 2, 1), MOE, r"shape \(3, 2, 1\), where the model has \(3, 2, 2\)"),
        (torch.zeros(3, 2), MOE, r"shape \(3, 2\), where the model has \(3, 2, 2\)"),
        (torch.full((3, 2, 2), 6), MOE, "name expert 6, but the model has 6 per layer"),
        (torch.full((3, 2, 2), -1), MOE, "name expert -1, but the model has 6 per layer"),
        (torch.zeros(3, 2, 2), replace(MOE, num_moe_experts=None), r"where the model has \(3, 2, 0\)"),
    ],
)
def test_experts_of_another_model_are_refused(experts: Tensor, model: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_routed_experts(one_sample(experts.to(torch.int16)), model)


@pytest.mark.parametrize("experts", [torch.zeros(3, 2, 2), torch.full((3, 2, 2), 5), torch.empty(0, 2, 2)])
def test_experts_of_this_model_are_accepted(experts: Tensor) -> None:
    rollouts = one_sample(experts.to(torch.uint8))
    check_routed_experts(rollouts if len(experts) else rollouts.select([]), MOE)


def test_in_bf16_replay_leaves_the_rounding_and_no_jumps(parallel: Parallel) -> None:
    wide = (f"{MODEL}num_layers=4", f"{MODEL}hidden_size=64", f"{MODEL}num_moe_experts=16")
    policy, config = make_policy(parallel, *EXPERTS, *wide, "policy.dtype=bf16")
    engine = LocalEngine(config.policy.model, VOCAB_SIZE, torch.bfloat16, parallel.device, slots=32)
    engine.update_weights(policy.stream_weights(), version=0)
    prompts = [tuple(i * k % VOCAB_SIZE for k in range(1, 2 + i % 9)) for i in range(64)]
    requests = [GenerationRequest(i, i, 0, prompt) for i, prompt in enumerate(prompts)]
    rollouts = engine.generate(requests, Sampling(40, (0,), (1,), routed_experts=True))
    schedule = policy.schedule(rollouts.sequence_lengths)
    own = rollouts.select(schedule.samples_of(0))
    assert own.engine_log_prob is not None

    def differences(batch: Rollouts) -> Tensor:
        return (policy.log_probs(batch, schedule, 1.0) - own.engine_log_prob).abs()

    with_replay, without = differences(own), differences(replace(own, routed_experts=None))
    assert float(with_replay.max()) < 0.1 < 0.3 < float(without.max())
    assert float(with_replay.mean()) < 0.5 * float(without.mean())
