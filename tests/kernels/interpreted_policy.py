"""A training step's gradients and metrics with every kernel in Triton's interpreter, against torch.

Run by test_kernels.py, which sets TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

from opo_megatron import kernels
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.kernels import triton_softmax as head_softmax
from opo_megatron.kernels import triton_token_loss as token_loss
from opo_megatron.policy.metric_sums import StepMetrics
from tests.support.fixtures import ragged_rollouts
from tests.support.kernel_probes import Counted
from tests.support.policies import gradients_of, make_policy
from tests.support.policies import parallel as parallel


def test_a_step_with_kernels_equals_a_step_in_torch(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _ = make_policy(parallel)
    rollouts = ragged_rollouts(12)
    generator = torch.Generator().manual_seed(1)
    rollouts.advantages = torch.randn(len(rollouts), generator=generator, dtype=torch.float64)
    rollouts.advantages[:4] = 0
    rollouts.engine_log_prob = -3 * torch.rand(rollouts.response_tokens.numel(), generator=generator)
    schedule = policy.schedule(rollouts.sequence_lengths, rollouts.advantages == 0)
    batch = rollouts.select(schedule.samples_of(0))
    counted = {}
    for file, name in (
        (token_loss, "_kernel"),
        (head_softmax, "_statistics_kernel"),
        (head_softmax, "_gradient_kernel"),
    ):
        counted[name] = Counted(getattr(file, name))
        monkeypatch.setattr(file, name, counted[name])
    monkeypatch.setattr(head_softmax, "BLOCK", 16)
    monkeypatch.setattr(token_loss, "BLOCK", 16)
    results: list[tuple[StepMetrics, dict[str, torch.Tensor]]] = []
    for triton in (False, True):
        monkeypatch.setattr(kernels, "uses_triton", lambda device, triton=triton: triton)
        metrics = policy.checked_gradients(batch, schedule, PolicyGradient(100.0, 0.7, 2.0))
        results.append((metrics, {name: value.clone() for name, value in gradients_of(policy).items()}))
        assert all(bool(kernel.launches) == triton for kernel in counted.values())
    # A chunk with gradient launches each kernel once; a forward-only micro-batch launches one for all tokens.
    assert counted["_kernel"].launches > counted["_gradient_kernel"].launches
    (expected, gradients), (ours, others) = results
    assert expected.mismatch is not None and ours.mismatch is not None
    assert ours.tokens == expected.tokens
    assert [ours.loss, ours.entropy] == pytest.approx([expected.loss, expected.entropy], rel=1e-5)
    assert ours.mismatch.above == expected.mismatch.above
    for name in ("max", "mean", "k3", "ess"):
        assert getattr(ours.mismatch, name) == pytest.approx(getattr(expected.mismatch, name), rel=1e-5)
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm() / gradient.norm()) <= 1e-5, name
