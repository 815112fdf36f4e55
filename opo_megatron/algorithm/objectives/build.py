"""From a recipe's objective and options to the function that the LM head calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opo_megatron.algorithm.config import AlgorithmConfig, ObjectiveName
from opo_megatron.algorithm.objective import Objective, PolicyGradient
from opo_megatron.algorithm.objectives.batch import Bapo, M2po
from opo_megatron.algorithm.objectives.clipped import Cispo, Clipped, RecRing, Sapo, Topr
from opo_megatron.algorithm.objectives.masked import DppoKl, DppoTv, MiniRl, PrimeRl
from opo_megatron.algorithm.objectives.regularized import Brrl, Dro, Kimi, Oapl
from opo_megatron.algorithm.objectives.sequence import Gspo
from opo_megatron.algorithm.objectives.table import SPECS

FUNCTIONS: Mapping[ObjectiveName, Callable[..., Objective]] = {
    ObjectiveName.pg_is: lambda normalizer, temperature, _, cap: PolicyGradient(normalizer, temperature, cap),
    ObjectiveName.dppo_tv: DppoTv,
    ObjectiveName.dppo_kl: DppoKl,
    ObjectiveName.minirl: MiniRl,
    ObjectiveName.prime_rl: PrimeRl,
    ObjectiveName.cispo: Cispo,
    ObjectiveName.topr: Topr,
    ObjectiveName.sapo: Sapo,
    ObjectiveName.rec_ring: RecRing,
    ObjectiveName.dro: Dro,
    ObjectiveName.kimi: Kimi,
    ObjectiveName.oapl: Oapl,
    ObjectiveName.brrl: Brrl,
    ObjectiveName.gspo: Gspo,
    ObjectiveName.bapo: Bapo,
    ObjectiveName.m2po: M2po,
}
"""Called with N, temperature and columns, and the options by name."""


def build_objective(algorithm: AlgorithmConfig, normalizer: float, temperature: float) -> Objective:
    """The objective of a resolved recipe, for an update with the normalizer N."""
    name, options = algorithm.objective, algorithm.objective_options
    if name is ObjectiveName.clipped:  # its options are keys of the recipe
        clips = (algorithm.clip_low, algorithm.clip_high)
        return Clipped(normalizer, temperature, *clips, algorithm.kl_coefficient)
    return FUNCTIONS[name](normalizer, temperature, SPECS[name].columns, **options)
