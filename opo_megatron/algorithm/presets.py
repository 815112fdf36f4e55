"""The presets of `algorithm.baseline`."""

from __future__ import annotations

from typing import NamedTuple

from opo_megatron.algorithm.config import (
    AlgorithmConfig,
    Baseline,
    Center,
    Scale,
    Scope,
    Weight,
    is_own,
)
from opo_megatron.errors import UserError


class Preset(NamedTuple):
    """The switches of the advantage formula, named as in `AlgorithmConfig`."""

    weight: Weight = Weight.one
    leave_one_out: bool = False
    scale: Scale = Scale.none
    scope: Scope = Scope.group
    center: Center = Center.mean
    shrink: bool = False
    shift: float = 0.0
    positive_only: bool = False
    drop_zero_variance: bool = False
    keep_lone: bool = False


PRESETS = {
    Baseline.opo: Preset(Weight.length),
    Baseline.opo_loo: Preset(Weight.length, leave_one_out=True),
    Baseline.group_mean: Preset(),
    Baseline.rloo: Preset(leave_one_out=True),
    Baseline.grpo: Preset(scale=Scale.std),
    Baseline.batch_length: Preset(Weight.length, scope=Scope.batch),
    Baseline.energy: Preset(Weight.energy),
    Baseline.energy_loo: Preset(Weight.energy, leave_one_out=True),
    Baseline.auto: Preset(Weight.fitted, leave_one_out=True),
    Baseline.none: Preset(center=Center.none),
    Baseline.reinforce_plus_plus: Preset(center=Center.none, scale=Scale.token_std),
    Baseline.reinforce_plus_plus_baseline: Preset(scale=Scale.token_std, keep_lone=True),
    Baseline.asymre: Preset(shift=-0.1, keep_lone=True),
    Baseline.opmd: Preset(scale=Scale.one_plus_tau, keep_lone=True),
    Baseline.opmd_logmeanexp: Preset(
        center=Center.logmeanexp, scale=Scale.one_plus_tau, keep_lone=True
    ),
    Baseline.raft: Preset(center=Center.none, positive_only=True),
    Baseline.reinforce_rej: Preset(center=Center.none, drop_zero_variance=True, keep_lone=True),
    Baseline.remax: Preset(center=Center.greedy),
    Baseline.maxrl: Preset(scale=Scale.mean, keep_lone=True),
    Baseline.rec: Preset(keep_lone=True),
    Baseline.otb: Preset(Weight.energy, center=Center.token_mean, keep_lone=True),
    Baseline.otb_loo: Preset(Weight.energy, leave_one_out=True, center=Center.token_mean, keep_lone=True),
    Baseline.james_stein: Preset(leave_one_out=True, shrink=True, keep_lone=True),
}  # fmt: skip


OWN = Preset(center=Center.none)
"""The switches of a user's function, which uses none of them."""


def preset_of(baseline: str) -> Preset:
    """The switches of `algorithm.baseline`.

    Raises:
        UserError: where it is neither a preset nor `package.module:function`.
    """
    if is_own(baseline):
        return OWN
    if baseline not in Baseline.__members__:
        raise UserError(
            f"algorithm.baseline is {baseline!r}; it must be one of {', '.join(Baseline.__members__)}, or "
            "package.module:function"
        )
    return PRESETS[Baseline(baseline)]


def config_of(baseline: Baseline, **switches: object) -> AlgorithmConfig:
    """The algorithm of a preset; `switches` override it."""
    return AlgorithmConfig(baseline.value, **{**PRESETS[baseline]._asdict(), **switches})  # type: ignore[arg-type]
