"""Token loss, coefficient and mismatch: the kernel in Triton's interpreter against float64.

Run by test_kernels.py, which sets TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from opo_megatron import kernels
from opo_megatron.algorithm.objective import PolicyGradient, Supervised
from opo_megatron.algorithm.on_policy import HISTOGRAM, MismatchSums
from opo_megatron.kernels import triton_token_loss as kernel_file
from opo_megatron.policy.metric_sums import MetricSums
from opo_megatron.policy.token_loss import TokenLoss
from tests.support.kernel_probes import Counted, poison_new_memory

CPU = torch.device("cpu")
SIZES = (1, 2, 64, 65, 1000)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(kernel_file._kernel)
    monkeypatch.setattr(kernel_file, "_kernel", counted)
    monkeypatch.setattr(kernel_file, "BLOCK", 64)
    monkeypatch.setattr(kernels, "uses_triton", lambda device: True)
    poison_new_memory(monkeypatch)
    return counted


def columns(tokens: int, scale: float = 0.3, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """log π of the policy, and the columns; engine and policy differ by about `scale`."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = -5 * torch.rand(tokens, generator=generator)
    delta = scale * torch.randn(tokens, generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    return log_prob, {"advantages": advantages, "engine_log_prob": log_prob - delta}


def expected_sums(log_prob: Tensor, engine_log_prob: Tensor) -> MismatchSums:
    sums = MismatchSums(CPU)
    sums.add(log_prob - engine_log_prob)
    return sums


def assert_same_sums(result: MismatchSums, expected: MismatchSums) -> None:
    torch.testing.assert_close(result.values, expected.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.highest, expected.highest, rtol=1e-6, atol=0)
    assert torch.equal(result.values[4:], expected.values[4:])


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("cap", [None, 1.2])
@pytest.mark.parametrize("scale", [0.3, 1e-7])
def test_one_launch_gives_loss_coefficient_and_mismatch(
    kernel: Counted, tokens: int, cap: float | None, scale: float
) -> None:
    log_prob, others = columns(tokens, scale)
    objective, sums = PolicyGradient(37.0, 1.0, cap), MetricSums(CPU, True)
    token_loss = TokenLoss(objective, others, sums)
    loss, coefficient = token_loss(log_prob, slice(0, tokens))
    token_loss.add_mismatch(log_prob)
    assert kernel.launches == 1
    exact = {name: values.double() for name, values in others.items()}
    for values, reference in zip((loss, coefficient), objective(log_prob.double(), exact), strict=True):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), reference, rtol=1e-6, atol=0)
    assert_same_sums(sums.mismatch, expected_sums(log_prob, others["engine_log_prob"]))


@pytest.mark.parametrize(
    "scale",
    # Around ln 2 / 2 the power of two changes; above 88 float32 overflows, above 354 does w² in float64.
    [1e-12, 1e-8, 1e-5, 1e-3, 0.1, 0.34, 0.3465, 0.3466, 0.36, 0.7, 1.03, 1.05, 3.0, 30.0, 89.0, 350.0],
)
def test_k3_is_accurate_at_every_magnitude(scale: float) -> None:
    """Against mpmath: in float64, e^Δ − 1 − Δ itself loses digits."""
    engine = torch.tensor([-scale, scale, -scale / 3])  # of a token with log π = 0
    sums = MetricSums(CPU, True)
    TokenLoss(None, {"engine_log_prob": engine}, sums).add_mismatch(torch.zeros(3))
    with mpmath.workdps(60):
        deltas = [mpmath.mpf(delta) for delta in (-engine.double()).tolist()]
        k3 = float(mpmath.fsum(mpmath.expm1(delta) - delta for delta in deltas))
        weights = [float(mpmath.fsum(mpmath.exp(n * delta) for delta in deltas)) for n in (1, 2)]
    assert sums.mismatch.values[1:4].tolist() == pytest.approx([k3, *weights], rel=4e-7)


@pytest.mark.parametrize("edge", HISTOGRAM)
def test_differences_next_to_a_threshold_are_counted_as_in_float64(edge: float) -> None:
    sizes = [torch.tensor(edge)]
    for _ in range(3):
        below, above = (torch.nextafter(sizes[i], torch.tensor(to)) for i, to in ((0, 0.0), (-1, 1.0)))
        sizes = [below, *sizes, above]
    engine, sums = torch.stack(sizes), MetricSums(CPU, True)
    TokenLoss(None, {"engine_log_prob": engine}, sums).add_mismatch(torch.zeros(7))
    expected = expected_sums(torch.zeros(7), engine)
    assert torch.equal(sums.mismatch.values[4:], expected.values[4:])
    assert 0 < expected.values[4 + HISTOGRAM.index(edge)] < 7


def test_chunks_and_forward_only_micro_batches_add_up(kernel: Counted) -> None:
    log_prob, others = columns(300)
    sums = MetricSums(CPU, True)
    trained = TokenLoss(PolicyGradient(10.0, 1.0), {n: v[:200] for n, v in others.items()}, sums)
    for part in (slice(0, 130), slice(130, 200)):
        trained(log_prob[part], part)
    trained.add_mismatch(log_prob[:200])
    TokenLoss(None, {n: v[200:] for n, v in others.items()}, sums).add_mismatch(log_prob[200:])
    assert kernel.launches == 3
    assert_same_sums(sums.mismatch, expected_sums(log_prob, others["engine_log_prob"]))


def test_other_objectives_launch_one_kernel_for_the_mismatch(kernel: Counted) -> None:
    log_prob, others = columns(100)
    sums = MetricSums(CPU, True)
    token_loss = TokenLoss(Supervised(100.0), others, sums)
    loss, _ = token_loss(log_prob, slice(0, 100))
    assert kernel.launches == 0
    torch.testing.assert_close(loss, -log_prob / 100)
    token_loss.add_mismatch(log_prob)
    assert kernel.launches == 1
    assert_same_sums(sums.mismatch, expected_sums(log_prob, others["engine_log_prob"]))


def test_without_an_engine_there_is_no_mismatch(kernel: Counted) -> None:
    log_prob, others = columns(100)
    del others["engine_log_prob"]
    token_loss = TokenLoss(PolicyGradient(4.0, 1.0), others, MetricSums(CPU, False))
    loss, coefficient = token_loss(log_prob, slice(0, 100))
    token_loss.add_mismatch(log_prob)
    assert kernel.launches == 1
    torch.testing.assert_close(coefficient, -others["advantages"] / 4, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, coefficient * log_prob, rtol=1e-6, atol=0)


def test_no_tokens_launch_nothing(kernel: Counted) -> None:
    log_prob, others = columns(0)
    sums = MetricSums(CPU, True)
    token_loss = TokenLoss(PolicyGradient(4.0, 1.0, 2.0), others, sums)
    loss, coefficient = token_loss(log_prob, slice(0, 0))
    token_loss.add_mismatch(log_prob)
    assert loss.shape == coefficient.shape == (0,) and kernel.launches == 0
    assert not sums.mismatch.values.any() and not sums.mismatch.highest


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_non_finite_values_show_in_the_largest_difference(wrong: float) -> None:
    log_prob, others = columns(100)
    others["engine_log_prob"][70] = wrong
    sums, expected = MetricSums(CPU, True), expected_sums(log_prob, others["engine_log_prob"])
    loss, _ = TokenLoss(PolicyGradient(4.0, 1.0, 2.0), others, sums)(log_prob, slice(0, 100))
    mismatch = sums.mismatch
    assert loss.isfinite().sum() == (99 if math.isnan(wrong) else 100)
    torch.testing.assert_close(mismatch.highest, expected.highest, equal_nan=True)
    assert torch.equal(mismatch.values[4:], expected.values[4:]) and len(HISTOGRAM) == mismatch.edges.numel()
