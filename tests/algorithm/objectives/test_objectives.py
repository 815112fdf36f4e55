"""Every objective: against autograd of its written loss, its public code's numbers, and the law at ratio 1.

`tests/data/estimator_oracles/README.md` says whose numbers they are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.config import AlgorithmConfig, ObjectiveName
from opo_megatron.algorithm.objective import Objective, PolicyGradient
from opo_megatron.algorithm.objectives.build import build_objective
from opo_megatron.algorithm.objectives.table import SPECS, Passes, Scope, passes_of, with_defaults
from opo_megatron.algorithm.objectives.tokens import Derives, SampleTokens
from tests.support.objective_batches import BATCHES, ObjectiveBatch, objective_batch
from tests.support.objective_losses import LOSSES
from tests.support.paths import DATA

ORACLES = DATA / "estimator_oracles" / "objectives.npz"
NAMES = sorted(LOSSES)
NORMALIZER = 7.0
OTHER_OPTIONS: dict[str, dict[str, float]] = {
    "pg_is": {"cap": 1.1},
    "dppo_tv": {"delta_low": 0.05, "delta_high": 0.3, "cap": 1.5},
    "dppo_kl": {"delta_low": 0.3, "delta_high": 0.01, "cap": 2},
    "minirl": {"epsilon_low": 0.5, "epsilon_high": 0.1},
    "prime_rl": {"tau_advantage": 0.5, "tau_kl": 0.3, "delta_low": 0.02},
    "cispo": {"epsilon_low": 0.1, "epsilon_high": 3},
    "sapo": {"tau_positive": 2, "tau_negative": 0.5},
    "rec_ring": {"epsilon_low": 0.05, "outer_low": 0.1, "outer_high": 0.5},
    "dro": {"beta": 0.7},
    "kimi": {"tau": 2},
    "oapl": {"beta_1": 2, "beta_2": 0.4},
    "brrl": {"epsilon_low": 0.1, "epsilon_high": 0.4, "target_temperature": 0.5},
    "gspo": {"epsilon_low": 0.2, "epsilon_high": 0.3},
    "bapo": {"low": 0.3, "highest_low": 0.9, "high": 1.05, "step": 0.3, "dual_clip": 1.5, "target": 3},
    "m2po": {"threshold": 0.4},
}
"""Others than the defaults; DRO has none."""


def config_of(name: str, **options: Any) -> AlgorithmConfig:
    config = AlgorithmConfig(objective=ObjectiveName(name), objective_options=options)
    config.objective_options = with_defaults(config)
    return config


def columns_of(objective: Objective, batch: ObjectiveBatch) -> dict[str, Tensor]:
    """Every column that an objective may read, as the update provides them."""
    columns = {
        "advantages": batch.advantages,
        "rewards": torch.repeat_interleave(batch.rewards, batch.lengths),
        "engine_log_prob": batch.engine,
        "old_log_prob": batch.old,
        "current_log_prob": batch.log_prob,
    }
    if not isinstance(objective, Derives):
        return columns
    samples = torch.arange(len(batch.lengths))
    tokens = SampleTokens(columns, batch.lengths, samples, batch.rewards, batch.groups)
    return columns | objective.derive(tokens)


def evaluate(config: AlgorithmConfig, batch: ObjectiveBatch) -> tuple[Tensor, Tensor]:
    objective = build_objective(config, NORMALIZER, 1.0)
    columns = columns_of(objective, batch)
    return objective(batch.log_prob, {name: columns[name] for name in SPECS[config.objective].columns})


@cache
def batches() -> tuple[ObjectiveBatch, ...]:
    return tuple(objective_batch(number) for number in range(BATCHES))


@cache
def all_batches() -> ObjectiveBatch:
    """All of them as one, with prompts of their own."""
    parts = [replace(batch, groups=batch.groups + 10 * i) for i, batch in enumerate(batches())]
    return ObjectiveBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def pieces(name: str) -> tuple[ObjectiveBatch, ...]:
    """What is evaluated at once: a batch where its tokens choose together, else all of them."""
    of_batch = SPECS[ObjectiveName(name)].derived_over is Scope.batch
    return batches() if of_batch else (all_batches(),)


CASES = [(name, {"beta": 0.05} if name == "dro" else {}) for name in NAMES] + list(OTHER_OPTIONS.items())


@pytest.mark.parametrize("name, options", CASES, ids=[f"{name}-{len(o)}" for name, o in CASES])
def test_loss_and_coefficient_are_those_of_the_written_loss(name: str, options: dict[str, float]) -> None:
    config = config_of(name, **options)
    for batch in pieces(name):
        now = batch.log_prob.clone().requires_grad_()
        expected = LOSSES[name](now, batch, config.objective_options) / NORMALIZER
        (gradient,) = torch.autograd.grad(expected, now)
        loss, coefficient = evaluate(config, batch)
        torch.testing.assert_close(coefficient, gradient, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(loss.sum(), expected.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("oapl", "m2po")])
def test_sums_are_those_of_the_public_code(name: str) -> None:
    """Loss, sum of the coefficients, and their product with cosines, of each batch."""
    config = config_of(name, **({"beta": 0.05} if name == "dro" else {}))
    found = []
    results = [evaluate(config, batch) for batch in pieces(name)]
    loss, coefficient = (torch.cat(parts) * NORMALIZER for parts in zip(*results, strict=True))
    sizes = [int(batch.lengths.sum()) for batch in batches()]
    for own, gradient in zip(loss.split(sizes), coefficient.split(sizes), strict=True):
        weights = torch.cos(torch.arange(len(gradient), dtype=torch.float64))
        found.append([float(own.sum()), float(gradient.sum()), float(gradient @ weights)])
    np.testing.assert_allclose(np.array(found), np.load(ORACLES)[name], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("oapl", "brrl")])
def test_without_drift_it_is_the_policy_gradient_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    for batch in batches()[:20]:
        same = replace(batch, log_prob=batch.log_prob.to(dtype))
        same = replace(same, old=same.log_prob, engine=same.log_prob)
        config = config_of(name, **({"beta": 0.05} if name == "dro" else {}))
        objective = build_objective(config, NORMALIZER, 1.0)
        columns = {key: value.to(dtype) for key, value in columns_of(objective, same).items()}
        _, coefficient = objective(same.log_prob, columns)
        _, plain = PolicyGradient(NORMALIZER, 1.0)(same.log_prob, columns)
        assert coefficient.dtype is dtype and torch.equal(coefficient, plain)
        assert torch.equal(coefficient.signbit(), plain.signbit())


def test_without_drift_oapl_and_brrl_are_what_their_formulas_say() -> None:
    for batch in batches()[:20]:
        same = replace(batch, old=batch.log_prob, engine=batch.log_prob)
        values = {int(g): batch.rewards[batch.groups == g] for g in batch.groups.unique()}
        _, oapl = evaluate(config_of("oapl"), same)
        _, brrl = evaluate(config_of("brrl"), same)
        for i, (of_oapl, of_brrl) in enumerate(
            zip(oapl.split(batch.lengths.tolist()), brrl.split(batch.lengths.tolist()), strict=True)
        ):
            rewards = values[int(batch.groups[i])]
            value = 0.5 * ((rewards / 0.5).exp().mean()).log()
            above = torch.sign(batch.rewards[i] - rewards.quantile(0.5))
            expected = -2e-3 * (batch.rewards[i] - value) / NORMALIZER
            torch.testing.assert_close(of_oapl, expected.expand_as(of_oapl), rtol=1e-12, atol=1e-15)
            assert torch.equal(
                of_brrl, (-batch.sample_advantages[i].abs() / NORMALIZER * above).expand_as(of_brrl)
            )


# ---------------------------------------------------------------------- published numbers


def tokens(*rows: list[float]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def test_cispo_has_the_loss_of_a_public_test() -> None:
    """SkyRL `test_policy_loss_cispo`."""
    objective = build_objective(config_of("cispo", epsilon_low=0.2), 1.0, 1.0)
    columns = {"advantages": tokens([1.0, -1.0, -4.0]), "old_log_prob": tokens([-1.0, -1.0, -3.0])}
    loss, _ = objective(tokens([-1.69315, -1.0, -0.69741]), columns)
    assert float(loss.sum()) == pytest.approx(-2.9930, abs=1e-4)


def test_sapo_has_the_loss_of_a_public_test() -> None:
    """SkyRL `test_sapo_policy_loss_basic`: the mean of its three tokens."""
    objective = build_objective(config_of("sapo", tau_negative=2.0), 3.0, 1.0)
    columns = {"advantages": tokens([1.0, -1.0, 0.5]), "old_log_prob": tokens([-1.0, -1.0, -1.0])}
    loss, _ = objective(tokens([-1.5, -0.8, -1.1]), columns)
    assert float(loss.sum()) == pytest.approx(-0.4487099, abs=1e-6)


def test_dro_has_the_loss_of_a_public_test() -> None:
    """verl `test_dro_matches_direct_formula_and_requires_positive_beta`."""
    objective = build_objective(config_of("dro", beta=0.05), 2.0, 1.0)
    columns = {"advantages": tokens([2.0, -1.5]), "old_log_prob": tokens([-1.0, -0.7])}
    loss, _ = objective(tokens([-0.8, -0.9]), columns)
    assert float(loss.sum()) == pytest.approx((1.6 - 1.35 + 0.025 * 0.08) / 2)


@pytest.mark.parametrize(
    "name, delta, old, now, advantages, mask",
    [
        ("dppo_tv", 0.2, [-1.0, -1.0, -1.0], [-0.3, -2.0, -0.9], [1.0, -1.0, 1.0], [0, 0, 1]),
        ("dppo_tv", 0.2, [-1.0, -1.0], [-2.0, -0.3], [1.0, -1.0], [1, 1]),
        ("dppo_tv", 0.2, [-0.35, -1.0], [-0.3, -0.95], [1.0, 1.0], [1, 1]),
        ("dppo_kl", 0.05, [-1.0, -1.0], [-0.1, -0.95], [1.0, 1.0], [0, 1]),
        ("dppo_kl", 0.5, [-1.0, -1.0], [-1.01, -0.99], [1.0, -1.0], [1, 1]),
    ],
)
def test_dppo_masks_the_tokens_of_a_public_test(
    name: str, delta: float, old: list[float], now: list[float], advantages: list[float], mask: list[int]
) -> None:
    """SkyRL `test_dppo_policy_loss`."""
    objective = build_objective(config_of(name, delta_low=delta, delta_high=delta), 1.0, 1.0)
    columns = {"advantages": tokens(advantages), "engine_log_prob": tokens(old)}
    _, coefficient = objective(tokens(now), columns)
    expected = -(tokens(now) - tokens(old)).exp() * tokens(advantages) * torch.tensor(mask)
    torch.testing.assert_close(coefficient, expected)


@pytest.mark.parametrize(
    "differences, advantages, kept",
    [
        ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0], [1, 1, 0]),
        ([1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, 1.0, -1.0], [1, 1, 0, 0]),
        ([0.1, 0.1, 0.1], [1.0, 1.0, 1.0], [1, 1, 1]),
        ([5.0, 5.0], [0.0, 0.0], [1, 1]),
        ([0.5, 0.01, -0.01], [1.0, 1.0, -1.0], [0, 1, 1]),
    ],
)
def test_m2po_keeps_the_tokens_of_a_public_test(
    differences: list[float], advantages: list[float], kept: list[int]
) -> None:
    """Trinity-RFT `test_masks_largest_trust_region_token_until_m2_is_below_threshold`, then neighbours."""
    count = len(differences)
    batch = ObjectiveBatch(
        torch.ones(count, dtype=torch.int64),
        torch.arange(count),
        torch.zeros(count, dtype=torch.float64),
        tokens(differences) - 6,
        tokens([-6.0] * count),
        tokens([-6.0] * count),
        tokens(advantages),
    )
    columns = columns_of(build_objective(config_of("m2po"), 1.0, 1.0), batch)
    assert columns["kept"].tolist() == kept


def test_oapl_has_the_loss_of_a_public_test() -> None:
    """NeMo-RL `test_oapl_loss_regresses_sequence_log_ratio_to_advantage`."""
    objective = build_objective(config_of("oapl", beta_2=0.5), 2.0, 1.0)
    now, engine = tokens([0.2, -0.1], [0.4, 0.6]), tokens([0.1, -0.3], [0.1, 0.2])
    residual = tokens([0.5 * 0.3 - 1.0] * 2, [0.5 * 0.7 + 0.5] * 2)
    loss, coefficient = objective(now, {"residual": residual, "response_length": tokens([2.0] * 4)})
    sums = tokens([(now - engine)[:2].sum().item()], [(now - engine)[2:].sum().item()])
    expected = (0.5 * sums - tokens([1.0, -0.5])).square().mean()
    assert float(loss.sum()) == pytest.approx(float(expected))
    torch.testing.assert_close(coefficient, residual / 2)


def test_gspo_has_the_loss_of_a_public_test() -> None:
    """Trinity-RFT `tests/algorithm/policy_loss_test.py`: the mean of each response's mean."""
    generator = torch.Generator().manual_seed(42)
    now, old, _, masked, advantages = (torch.rand(5, 20, generator=generator) for _ in range(5))
    mask = masked > 0.5
    lengths, none = mask.sum(1), torch.zeros(5, dtype=torch.float64)
    log_probs = [(2 * values - 1)[mask].double() for values in (now, old, old)]
    batch = ObjectiveBatch(lengths, torch.arange(5), none, *log_probs, none)
    objective = build_objective(config_of("gspo"), 1.0, 1.0)
    columns = columns_of(objective, batch) | {"advantages": (2 * advantages - 1)[mask].double()}
    loss, _ = objective(batch.log_prob, columns)
    means = torch.stack([part.mean() for part in loss.split(lengths.tolist())])
    assert float(means.mean()) == pytest.approx(0.27235108613967896, abs=1e-6)


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_reads_exactly_the_columns_of_its_row(name: str) -> None:
    objective = build_objective(config_of(name, **({"beta": 0.05} if name == "dro" else {})), 1.0, 1.0)
    batch, spec = batches()[0], SPECS[ObjectiveName(name)]
    columns = columns_of(objective, batch)
    assert tuple(objective.columns) == spec.columns
    needed = {key: columns[key] for key in spec.columns}
    objective(batch.log_prob, needed)
    for key in spec.columns:
        with pytest.raises(KeyError, match=key):
            objective(batch.log_prob, {k: v for k, v in needed.items() if k != key})


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_tokens_have_the_coefficients_of_all(name: str) -> None:
    """Chunks of the LM head, micro-batches and ranks: what they choose together is in the columns."""
    objective = build_objective(config_of(name, **({"beta": 0.05} if name == "dro" else {})), 1.0, 1.0)
    for batch in batches()[:10]:
        columns = columns_of(objective, batch)
        whole = objective(batch.log_prob, columns)
        middle = len(batch.log_prob) // 2
        halves = [
            objective(batch.log_prob[part], {key: value[part] for key, value in columns.items()})
            for part in (slice(0, middle), slice(middle, None))
        ]
        for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
            torch.testing.assert_close(one, torch.cat(parts), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if SPECS[ObjectiveName(n)].derived_over in (Scope.group, Scope.sequence)]
)
def test_columns_of_responses_do_not_depend_on_the_others_of_the_rank(name: str) -> None:
    objective = build_objective(config_of(name), 1.0, 1.0)
    assert isinstance(objective, Derives)
    for batch in batches()[:10]:
        columns = columns_of(objective, batch)
        chosen = torch.arange(len(batch.lengths)).flip(0)[::2]
        places = torch.arange(len(batch.log_prob)).split(batch.lengths.tolist())
        where = torch.cat([places[i] for i in chosen.tolist()])
        own = {key: value[where] for key, value in columns.items()}
        tokens_of = SampleTokens(own, batch.lengths[chosen], chosen, batch.rewards, batch.groups)
        for key, value in objective.derive(tokens_of).items():
            assert torch.equal(value, columns[key][where])


PASSES = {
    "policy_gradient": (False, False),
    "clipped": (True, False),
    "pg_is": (False, False),
    "dppo_tv": (False, False),
    "dppo_kl": (False, False),
    "minirl": (True, False),
    "prime_rl": (False, False),
    "cispo": (True, False),
    "topr": (True, False),
    "sapo": (True, False),
    "rec_ring": (True, False),
    "dro": (True, False),
    "kimi": (True, False),
    "oapl": (False, True),
    "brrl": (True, False),
    "gspo": (True, True),
    "bapo": (True, True),
    "m2po": (True, True),
}


def test_forward_passes_follow_from_the_table() -> None:
    assert PASSES.keys() == {name.value for name in ObjectiveName} == {name.value for name in SPECS}
    for name, (old, current) in PASSES.items():
        assert passes_of(AlgorithmConfig(objective=ObjectiveName(name))) == Passes(old, current, False)
    with_kl = AlgorithmConfig(objective=ObjectiveName.clipped, kl_coefficient=0.1)
    assert passes_of(with_kl) == Passes(True, False, True)
