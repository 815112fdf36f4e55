"""A step of policy and local engine by exact mode's Triton operations, in Triton's interpreter.

Run by test_exact_kernels.py, which sets TRITON_INTERPRET=1 and OPO_EXACT_TRITON=1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.kernels import exact
from opo_megatron.kernels import triton_exact_attention as attention_file
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.exact_trace import policy_digests
from opo_megatron.rollout.local.decoder import Decoder
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.weights.random_init import random_weights
from tests.support.fixtures import VOCAB_SIZE, small_config
from tests.support.policies import gradients_of

MODELS = {
    "grouped-query attention, QK-norm": (),
    "QKV biases, tied": ("policy.model.add_qkv_bias=true", "policy.model.qk_layernorm=false",
                         "policy.model.tie_embeddings=true"),
    "packed": ("policy.packing=thd",),
    "recomputed, packed": ("policy.packing=thd", "policy.recompute=selective"),
    "sums in parts": ("policy.exact_sum_parts=2",),
}  # fmt: skip


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_file, "SPLIT", 32)


def sharp_weights(config: Config) -> Callable[[str], Tensor]:
    """Next-token distributions far from uniform."""
    source = random_weights(config.policy.model, VOCAB_SIZE, config.run.seed)
    return lambda name: source(name) * (1 if source(name).dim() == 1 else 4)


def make(parallel: Parallel, *overrides: str) -> tuple[Config, Policy]:
    config = small_config("rollout.local.exact=true", *overrides)
    return config, Policy(config, VOCAB_SIZE, parallel, config.optimizer, sharp_weights(config))


def engine_of(config: Config, policy: Policy, slots: int) -> LocalEngine:
    parts = config.policy.exact_sum_parts
    engine = LocalEngine(
        config.policy.model, VOCAB_SIZE, torch.float32, torch.device("cpu"), slots, True, parts
    )
    engine.update_weights(policy.stream_weights(), policy.version)
    return engine


def rollouts_of(engine: LocalEngine, count: int = 3) -> Rollouts:
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))) for _ in range(count)]
    requests = [GenerationRequest(i, i, 0, prompt) for i, prompt in enumerate(prompts)]
    rollouts = engine.generate(
        requests, Sampling(max_tokens=4, stop_tokens=(0, 1), seed=(1,), temperature=0.7)
    )
    rollouts.advantages = (torch.arange(count) % 3).double() - 1
    return rollouts


def step(policy: Policy, rollouts: Rollouts, budget: int) -> float:
    """Largest |Δ log π| of a training pass in micro-batches of `budget` tokens; gradients are accumulated."""
    policy.config.max_tokens_per_micro_batch = budget
    schedule = policy.schedule(rollouts.sequence_lengths, rollouts.advantages == 0)
    metrics = policy.checked_gradients(
        rollouts.select(schedule.samples_of(0)), schedule, PolicyGradient(100.0, 0.7)
    )
    assert metrics.mismatch is not None
    return float(metrics.mismatch.max)


@pytest.mark.parametrize("model", MODELS)
def test_engine_and_policy_have_the_same_log_probs_bit_for_bit(parallel: Parallel, model: str) -> None:
    config, policy = make(parallel, *MODELS[model])
    rollouts = rollouts_of(engine_of(config, policy, 2))
    assert step(policy, rollouts, 100) == 0.0


def test_the_gradients_are_those_of_the_torch_operations(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, policy = make(parallel, "policy.packing=thd")
    rollouts = rollouts_of(engine_of(config, policy, 2))
    results = []
    for uses_triton in (True, False):
        monkeypatch.setattr(exact, "uses_triton", lambda x, uses=uses_triton: uses)
        policy.zero_gradients()
        step(policy, rollouts, 100)
        results.append({name: gradient.clone() for name, gradient in gradients_of(policy).items()})
    for name, gradient in results[0].items():
        assert float((gradient - results[1][name]).norm() / gradient.norm()) <= 1e-5, name


def test_every_operation_has_the_same_digest_in_engine_and_policy(parallel: Parallel) -> None:
    config, policy = make(parallel)
    engine = engine_of(config, policy, 2)
    request = GenerationRequest(0, 0, 0, tuple(range(2, 9)))
    rollouts, traces = engine.trace(
        [request], Sampling(max_tokens=3, stop_tokens=(), seed=(1,), temperature=0.7)
    )
    assert policy_digests(policy, parallel, rollouts) == traces[0]


def test_another_attention_in_the_decoder_is_noticed(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: splits at other positions than the policy's."""
    config, policy = make(parallel)
    attend = Decoder._attend_slots

    def other(*arguments: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_file, "BLOCK", 16)
            return attend(*arguments)

    monkeypatch.setattr(Decoder, "_attend_slots", other)
    rollouts = rollouts_of(engine_of(config, policy, 2))
    assert 0 < step(policy, rollouts, 100) < 1e-4
