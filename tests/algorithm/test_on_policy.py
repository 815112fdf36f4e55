"""The two on-policy checks of a batch: weight versions, and engine against policy log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from opo_megatron.algorithm.config import MismatchAction, OnPolicyConfig
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.algorithm.on_policy import (
    HISTOGRAM,
    Mismatch,
    MismatchSums,
    check_mismatch,
    check_versions,
    k3,
)
from opo_megatron.errors import OnPolicyError


def test_tokens_of_the_expected_version_pass() -> None:
    check_versions(torch.full((5,), 3), 3)
    check_versions(torch.empty(0, dtype=torch.int64), 3)


def test_tokens_of_other_versions_are_refused_with_their_counts() -> None:
    versions = torch.tensor([3, 2, 3, 4, 2, 3])
    with pytest.raises(OnPolicyError, match=r"version 3 but 3 of 6 .*\(2 of version 2, 1 of version 4\)"):
        check_versions(versions, 3)


def test_rollouts_without_versions_are_refused() -> None:
    with pytest.raises(OnPolicyError, match="no weight versions"):
        check_versions(None, 0)


@pytest.mark.parametrize("action", [MismatchAction.refuse, MismatchAction.warn])
@pytest.mark.parametrize("largest", [0.0, 1e-4, 0.01])
def test_a_difference_up_to_the_tolerance_gives_no_warning(action: MismatchAction, largest: float) -> None:
    assert check_mismatch(OnPolicyConfig(0.01, action), Mismatch(largest, 0.0, 0.0)) is None


@pytest.mark.parametrize("action", list(MismatchAction))
@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_non_finite_mismatch_is_refused_under_every_action(action: MismatchAction, wrong: float) -> None:
    config = OnPolicyConfig(tolerance=0.01, action=action)
    for mismatch in (Mismatch(wrong, 0.0, 0.0), Mismatch(0.0, wrong, 0.0), Mismatch(0.0, 0.0, wrong)):
        with pytest.raises(OnPolicyError, match="not finite"):
            check_mismatch(config, mismatch)


def test_a_difference_beyond_the_tolerance_raises_or_warns() -> None:
    mismatch = Mismatch(0.0101, 0.002, 0.0)
    with pytest.raises(OnPolicyError, match=r"on_policy\.tolerance=0\.01.*on_policy\.action to warn"):
        check_mismatch(OnPolicyConfig(0.01, MismatchAction.refuse), mismatch)
    warning = check_mismatch(OnPolicyConfig(0.01, MismatchAction.warn), mismatch)
    assert warning is not None and f"disagree by {mismatch.max:.3g}" in warning


def test_k3_is_never_negative_and_zero_only_at_zero() -> None:
    sizes = torch.logspace(-12, 1.5, 2001, dtype=torch.float64)
    for delta in (torch.cat((-sizes, sizes)), torch.cat((-sizes, sizes)).float()):
        assert bool((k3(delta) >= 0).all())
    assert k3(torch.zeros(3)).tolist() == [0, 0, 0]
    assert bool((k3(sizes[sizes > 1e-6]) > 0).all())


def test_k3_equals_its_definition() -> None:
    delta = torch.tensor([-3.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    expected = [math.exp(d) - 1 - d for d in delta.tolist()]
    assert k3(delta).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_mean_of_k3_under_the_engine_is_the_kl_divergence() -> None:
    """Σ q (p/q − 1 − log p/q) = KL(q ‖ p), summed over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    engine, policy = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(1)
    kl = (engine.exp() * (engine - policy)).sum()
    torch.testing.assert_close((engine.exp() * k3(policy - engine)).sum(), kl, rtol=1e-12, atol=0)


def test_sums_over_micro_batches_give_the_mismatch_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = 10 ** (-8 * torch.rand(1000, generator=generator, dtype=torch.float64)) - 0.01
    sums = MismatchSums(torch.device("cpu"))
    for part in delta.split(137):
        sums.add(part)
    mismatch = MismatchSums.result(sums.values.tolist(), float(sums.highest), 1000)
    weight = delta.exp()
    assert mismatch.max == float(delta.abs().max())
    assert mismatch.mean == pytest.approx(float(delta.abs().mean()), rel=1e-12)
    assert mismatch.k3 == pytest.approx(float((weight - 1 - delta).mean()), rel=1e-9)
    assert mismatch.ess == pytest.approx(float(weight.sum() ** 2 / weight.square().sum() / 1000), rel=1e-12)
    assert mismatch.above == tuple(float((delta.abs() > edge).double().mean()) for edge in HISTOGRAM)


def test_without_mismatch_the_effective_sample_size_is_1() -> None:
    sums = MismatchSums(torch.device("cpu"))
    sums.add(torch.zeros(5))
    assert MismatchSums.result(sums.values.tolist(), 0.0, 5) == Mismatch(0, 0, 0, 1, (0,) * len(HISTOGRAM))


def test_correction_weights_tokens_by_the_truncated_ratio() -> None:
    """The expected gradient of an uncapped correction under the engine is the policy's own."""
    generator = torch.Generator().manual_seed(0)
    engine, policy = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(1)
    advantage = torch.randn(50, generator=generator, dtype=torch.float64)
    columns = {"advantages": advantage, "engine_log_prob": engine}
    _, exact = PolicyGradient(2.0, 1.0)(policy, columns)
    _, corrected = PolicyGradient(2.0, 1.0, max_importance_weight=math.inf)(policy, columns)
    torch.testing.assert_close((engine.exp() * corrected).sum(), (policy.exp() * exact).sum())
    _, capped = PolicyGradient(2.0, 1.0, max_importance_weight=1.5)(policy, columns)
    torch.testing.assert_close(capped, exact * (policy - engine).exp().clamp(max=1.5))


def test_a_correction_is_reported_only_beyond_the_tolerance() -> None:
    config = OnPolicyConfig(tolerance=0.01, action=MismatchAction.correct, max_importance_weight=3.0)
    assert "corrected by importance weights up to 3" in str(check_mismatch(config, Mismatch(0.5, 0.1, 0.0)))
    assert check_mismatch(config, Mismatch(0.005, 0.001, 0.0)) is None
