"""The table of objectives: name → formula, columns and options, without torch.

Notation, of one response token: ℓ = log π of the policy, o = log π of the policy before the batch's first
update ("old"), μ = log π of the engine, ρ = exp(ℓ − o), ρ_μ = exp(ℓ − μ), A the advantage, r the response's
reward.  c is the coefficient ∂L/∂ℓ before the division by N; weights and masks M carry no gradient.

What a step takes beyond its update follows from the columns alone: `old_log_prob` takes a forward pass before
the first update; `current_log_prob`, ℓ itself, one right before every update, where sums over a response or
the whole mini-batch have to be known before the gradient.  Such sums become columns, `derived`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from opo_megatron.algorithm.config import AlgorithmConfig, ObjectiveName

ADVANTAGES, REWARDS = "advantages", "rewards"
ENGINE, OLD, CURRENT = "engine_log_prob", "old_log_prob", "current_log_prob"


class Scope(str, Enum):
    """What the tokens are that a derived column is computed from."""

    group = "group"
    sequence = "sequence"
    batch = "batch"


@dataclass(frozen=True)
class Option:
    """A number in `algorithm.objective_options`."""

    default: float | None
    """None: it has to be given."""
    meaning: str
    low: float = 0.0
    high: float = math.inf
    includes_low: bool = False

    def allows(self, value: float) -> bool:
        """Whether `value` is in the range, whose upper end is included."""
        above = value >= self.low if self.includes_low else value > self.low
        return above and value <= self.high and math.isfinite(value)

    @property
    def allowed(self) -> str:
        """The range as text."""
        above = f"{'at least' if self.includes_low else 'above'} {self.low:g}"
        return above if math.isinf(self.high) else f"{above} and at most {self.high:g}"


@dataclass(frozen=True)
class ObjectiveSpec:
    """A row of the table."""

    formula: str
    source: str
    columns: tuple[str, ...]
    """Columns of tokens that the gradient is computed from."""
    options: Mapping[str, Option] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    """Those of `columns` that are computed before the gradient."""
    derived_from: tuple[str, ...] = ()
    derived_over: Scope | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """All columns that have to be there: measured by the engine, or in a pass, or of the rollouts."""
        own = (name for name in self.columns if name not in self.derived)
        return tuple(dict.fromkeys((*own, *self.derived_from)))

    @property
    def takes_rewards(self) -> bool:
        return REWARDS in self.inputs

    @property
    def takes_engine(self) -> bool:
        return ENGINE in self.inputs


class Passes(NamedTuple):
    """Forward passes over the whole batch in addition to the update's."""

    old: bool
    """For old log-probabilities, before the first update."""
    current: bool
    """For those of the policy, right before every update, over its part of the batch."""
    reference: bool
    """For those of the reference weights."""


def passes_of(algorithm: AlgorithmConfig) -> Passes:
    """The forward passes that a recipe's objective takes, from the table alone."""
    inputs = SPECS[algorithm.objective].inputs
    return Passes(OLD in inputs, CURRENT in inputs, bool(algorithm.kl_coefficient))


def with_defaults(algorithm: AlgorithmConfig) -> dict[str, Any]:
    """`algorithm.objective_options` with the objective's defaults, in its order; unknown ones stay."""
    options = SPECS[algorithm.objective].options
    known = {name: option.default for name, option in options.items() if option.default is not None}
    ordered = {name: None for name in options if name in {**known, **algorithm.objective_options}}
    return {**ordered, **known, **algorithm.objective_options}


_CAP = Option(10.0, "largest ρ_μ that a token is weighted with", low=1.0, includes_low=True)
_LOW = "ratios below 1 − this {}"
_HIGH = "ratios above 1 + this {}"


def _clips(low: float, high: float, what: str) -> dict[str, Option]:
    return {
        "epsilon_low": Option(low, _LOW.format(what)),
        "epsilon_high": Option(high, _HIGH.format(what)),
    }


SPECS: Mapping[ObjectiveName, ObjectiveSpec] = {
    ObjectiveName.policy_gradient: ObjectiveSpec(
        "c = −A", "OPO (arXiv 2505.23585): exactly on-policy, one update per batch", (ADVANTAGES,)
    ),
    ObjectiveName.clipped: ObjectiveSpec(
        "L = −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A)",
        "PPO and GRPO; options are `algorithm.clip_low`, `clip_high` and `kl_coefficient`",
        (ADVANTAGES, OLD),
    ),
    ObjectiveName.pg_is: ObjectiveSpec(
        "c = −A min(ρ_μ, cap)",
        "Stable-RL `pg_no_mask`; as `on_policy.action=correct`, for several updates too",
        (ADVANTAGES, ENGINE),
        {"cap": _CAP},
    ),
    ObjectiveName.dppo_tv: ObjectiveSpec(
        "c = −A min(ρ_μ, cap) M; M = 0 if A > 0 and π − π_μ > delta_high, or A ≤ 0 and π − π_μ < −delta_low",
        "DPPO, binary TV (arXiv 2602.04879; Stable-RL, SkyRL)",
        (ADVANTAGES, ENGINE),
        {
            "delta_low": Option(0.15, "largest fall of a token's probability", high=1.0),
            "delta_high": Option(0.15, "largest rise of a token's probability", high=1.0),
            "cap": Option(20.0, _CAP.meaning, low=1.0, includes_low=True),
        },
    ),
    ObjectiveName.dppo_kl: ObjectiveSpec(
        "c = −A min(ρ_μ, cap) M; M = 0 if A > 0 and π > π_μ and D > delta_high, or A ≤ 0 and π < π_μ and "
        "D > delta_low; D = π_μ(μ − ℓ) + (1 − π_μ) log[(1 − π_μ + 1e-8)/(1 − π + 1e-8)]",
        "DPPO, binary KL (arXiv 2602.04879; Stable-RL, SkyRL)",
        (ADVANTAGES, ENGINE),
        {
            "delta_low": Option(0.05, "largest D of a token that becomes less likely"),
            "delta_high": Option(0.05, "largest D of a token that becomes more likely"),
            "cap": Option(20.0, _CAP.meaning, low=1.0, includes_low=True),
        },
    ),
    ObjectiveName.minirl: ObjectiveSpec(
        "c = −A min(ρ_μ, cap) M; M = 0 if A > 0 and ρ > 1 + epsilon_high, or A ≤ 0 and ρ < 1 − epsilon_low",
        "MiniRL (arXiv 2512.01374; Stable-RL `ppo_recompute`)",
        (ADVANTAGES, ENGINE, OLD),
        {**_clips(0.2, 0.27, "have no gradient where A pushes them further"), "cap": _CAP},
    ),
    ObjectiveName.prime_rl: ObjectiveSpec(
        "c = −tau_advantage A ρ_μ M + 2 tau_kl (ℓ − μ); M as in dppo_tv, without a gradient",
        "prime-rl's default loss",
        (ADVANTAGES, ENGINE),
        {
            "delta_low": Option(0.2, "largest fall of a token's probability", high=1.0),
            "delta_high": Option(0.2, "largest rise of a token's probability", high=1.0),
            "tau_advantage": Option(1.0, "factor of the advantages"),
            "tau_kl": Option(1e-3, "coefficient of (ℓ − μ)²", includes_low=True),
        },
    ),
    ObjectiveName.cispo: ObjectiveSpec(
        "c = −A clip(ρ, 1 − epsilon_low, 1 + epsilon_high)",
        "CISPO (arXiv 2506.13585; verl, SkyRL)",
        (ADVANTAGES, OLD),
        _clips(10.0, 0.2, "are weighted as if they were there"),
    ),
    ObjectiveName.topr: ObjectiveSpec(
        "c = −A where r > 0, else −A clip(ρ, 0, 1)",
        "TOPR (arXiv 2503.14286), by tokens as in ROLL, without its two weights",
        (ADVANTAGES, REWARDS, OLD),
    ),
    ObjectiveName.sapo: ObjectiveSpec(
        "c = −A 4σ(1 − σ) ρ, σ = sigmoid(τ(ρ − 1)); τ is tau_positive where A > 0, else tau_negative",
        "SAPO (arXiv 2511.20347; verl, SkyRL)",
        (ADVANTAGES, OLD),
        {
            "tau_positive": Option(1.0, "sharpness of the gate where A > 0"),
            "tau_negative": Option(1.05, "sharpness of the gate where A ≤ 0"),
        },
    ),
    ObjectiveName.rec_ring: ObjectiveSpec(
        "c = −A where 1 − epsilon_low ≤ ρ ≤ 1 + epsilon_high, or A ≥ 0 and ρ ≤ 1 − outer_low, or A ≤ 0 and "
        "ρ ≥ 1 + outer_high; else 0",
        "REC with clip mode `ring` and weight 1 (Trinity-RFT)",
        (ADVANTAGES, OLD),
        {
            "epsilon_low": Option(0.2, "lower edge of the inner region, below 1", high=1.0),
            "epsilon_high": Option(0.2, "upper edge of the inner region, above 1"),
            "outer_low": Option(0.6, "edge of the region below, where A ≥ 0", high=1.0),
            "outer_high": Option(2.0, "edge of the region above, where A ≤ 0"),
        },
    ),
    ObjectiveName.dro: ObjectiveSpec(
        "c = −A + beta (ℓ − o)",
        "DRO (verl)",
        (ADVANTAGES, OLD),
        {"beta": Option(None, "coefficient of (ℓ − o)²/2")},
    ),
    ObjectiveName.kimi: ObjectiveSpec(
        "c = −A + tau (ℓ − o)",
        "Kimi k1.5 (arXiv 2501.12599; ROLL `kimi15`)",
        (ADVANTAGES, OLD),
        {"tau": Option(0.1, "coefficient of (ℓ − o)²/2")},
    ),
    ObjectiveName.oapl: ObjectiveSpec(
        "c = 2 beta_2 g, L = g² for a response; g = beta_2 Σₜ(ℓ − μ) − (r − V), V = beta_1 log mean "
        "exp(r/beta_1) over the prompt's responses",
        "OAPL (arXiv 2602.19362), A*-PO's regression; defaults are TRL's",
        ("residual", "response_length"),
        {
            "beta_1": Option(0.5, "temperature of V"),
            "beta_2": Option(1e-3, "factor of the log-ratio that is fitted to r − V"),
        },
        derived=("residual", "response_length"),
        derived_from=(CURRENT, ENGINE, REWARDS),
        derived_over=Scope.sequence,
    ),
    ObjectiveName.brrl: ObjectiveSpec(
        "L = |A| |ρ − t|, t = 1 − epsilon_low + (epsilon_low + epsilon_high) "
        "sigmoid((r − m)/target_temperature), m the median of the prompt's rewards; c = |A| sgn(ρ − t) ρ",
        "GBPO of BRRL (arXiv 2604.18578 and its code)",
        (ADVANTAGES, OLD, "target_ratio"),
        {
            "epsilon_low": Option(0.3, "lowest t is 1 − this", high=1.0),
            "epsilon_high": Option(0.3, "highest t is 1 + this"),
            "target_temperature": Option(
                1e-4, "width of the step from the lowest to the highest t, in rewards"
            ),
        },
        derived=("target_ratio",),
        derived_from=(REWARDS,),
        derived_over=Scope.group,
    ),
    ObjectiveName.gspo: ObjectiveSpec(
        "c = −A s where min(sA, clip(s, 1 − epsilon_low, 1 + epsilon_high) A) = sA, else 0; "
        "s = (Πρ)^(1/length) of the response",
        "GSPO (arXiv 2507.18071), its form by tokens (verl, Trinity-RFT)",
        (ADVANTAGES, "sequence_ratio"),
        _clips(3e-4, 4e-4, "have no gradient where A pushes them further"),
        derived=("sequence_ratio",),
        derived_from=(CURRENT, OLD),
        derived_over=Scope.sequence,
    ),
    ObjectiveName.bapo: ObjectiveSpec(
        "L = −min(ρA, clip(ρ, l, h) A), at most −dual_clip A where A < 0; l, then h, are raised in steps "
        "until ΣA⁺/(Σ|A⁻| + 1e-8) ≥ target, A times min(ρ, h) where A ≥ 0, else max(ρ, l)",
        "BAPO (its code, `recipe/bapo/policy_loss.py`)",
        (ADVANTAGES, OLD, "ratio_low", "ratio_high"),
        {
            "low": Option(0.6, "l to begin with", high=1.0),
            "highest_low": Option(0.8, "largest l", high=1.0),
            "high": Option(1.2, "h to begin with", low=1.0),
            "highest_high": Option(2.0, "largest h", low=1.0),
            "step": Option(0.05, "by which they are raised"),
            "target": Option(1.0, "ratio of positive to negative sums that is wanted", includes_low=True),
            "dual_clip": Option(3.0, "ratios above it have no gradient where A < 0", low=1.0),
        },
        derived=("ratio_low", "ratio_high"),
        derived_from=(ADVANTAGES, CURRENT, OLD),
        derived_over=Scope.batch,
    ),
    ObjectiveName.m2po: ObjectiveSpec(
        "c = −A ρ M; M = 0 for the tokens with A(ℓ − o) > 0 and the largest (ℓ − o)², so many that the mean "
        "of (ℓ − o)² over the other ones with A(ℓ − o) > 0 is at most threshold",
        "M2PO (Trinity-RFT `m2po_policy_loss`)",
        (ADVANTAGES, OLD, "kept"),
        {"threshold": Option(0.04, "largest mean of (ℓ − o)²")},
        derived=("kept",),
        derived_from=(ADVANTAGES, CURRENT, OLD),
        derived_over=Scope.batch,
    ),
}
"""All objectives.  `opo_megatron/algorithm/objectives/build.py` has their functions."""
