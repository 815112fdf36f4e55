"""The presets of `algorithm.baseline`."""

from __future__ import annotations

from typing import NamedTuple

from opo_megatron.algorithm.config import Baseline, Scale, Scope, Weight


class Preset(NamedTuple):
    """The four switches of the advantage formula, named as in `AlgorithmConfig`."""

    weight: Weight
    leave_one_out: bool
    scale: Scale
    scope: Scope


PRESETS = {
    Baseline.opo: Preset(Weight.length, False, Scale.none, Scope.group),
    Baseline.opo_loo: Preset(Weight.length, True, Scale.none, Scope.group),
    Baseline.group_mean: Preset(Weight.one, False, Scale.none, Scope.group),
    Baseline.rloo: Preset(Weight.one, True, Scale.none, Scope.group),
    Baseline.grpo: Preset(Weight.one, False, Scale.std, Scope.group),
    Baseline.batch_length: Preset(Weight.length, False, Scale.none, Scope.batch),
    Baseline.energy: Preset(Weight.energy, False, Scale.none, Scope.group),
    Baseline.energy_loo: Preset(Weight.energy, True, Scale.none, Scope.group),
    Baseline.auto: Preset(Weight.fitted, True, Scale.none, Scope.group),
}
