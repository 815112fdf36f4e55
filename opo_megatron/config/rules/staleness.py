"""Rules of `rollout.staleness`: what can be trained on steps after it was sampled."""

from __future__ import annotations

from opo_megatron.algorithm.config import Proximal
from opo_megatron.algorithm.objectives.table import passes_of
from opo_megatron.config.choices import Fill
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config


def check_staleness(config: Config) -> None:
    """Raise UserError at the first setting that rollouts of earlier weights cannot have."""
    algorithm, staleness, steps = config.algorithm, config.rollout.staleness, config.train.steps
    setting = f"rollout.staleness={staleness}"
    if staleness == 0:
        require(
            algorithm.proximal is Proximal.behavior,
            f"algorithm.proximal is {algorithm.proximal.value}, but {setting} trains on rollouts of the "
            "current weights, where all choices are the same; remove it, or set rollout.staleness",
        )
        return
    require(
        algorithm.off_policy_sampling,
        f"rollout.staleness is {staleness}, which trains on rollouts of earlier weights; set it to 0, or "
        "accept off-policy rollouts with algorithm.off_policy_sampling=true",
    )
    require(
        steps == 0 or staleness < steps,
        f"rollout.staleness is {staleness}, but with train.steps={steps} no step would get rollouts of that "
        "age; lower it, or raise train.steps",
    )
    for name, is_wrong, reason in (
        (
            "rollout.overlap=true",
            config.rollout.overlap,
            "which trains on rollouts as they arrive; set it to false",
        ),
        (
            f"rollout.fill={config.rollout.fill.value}",
            config.rollout.fill is not Fill.off,
            "which samples as many batches as a step turns out to need; set it to off",
        ),
        (
            "run.on_bad_numbers=skip",
            config.run.on_bad_numbers == "skip",
            "after which rollouts would be of another age; set it to stop",
        ),
    ):
        require(not is_wrong, f"{setting} with {name}, {reason}, or set rollout.staleness=0")
    require(
        algorithm.proximal is Proximal.behavior or passes_of(algorithm).old,
        f"algorithm.proximal is {algorithm.proximal.value}, but algorithm.objective="
        f"{algorithm.objective.value} reads no old log-probabilities; remove it, or set "
        "algorithm.objective=clipped",
    )
