"""Rules about the algorithm's settings."""

from __future__ import annotations

from opo_megatron.algorithm.config import (
    AlgorithmConfig,
    Center,
    LossNormalizer,
    Scale,
    Scope,
    Weight,
    is_own,
    keeps_zero_variance,
)
from opo_megatron.algorithm.presets import OWN
from opo_megatron.config.choices import Fill
from opo_megatron.config.rules.objective import check_objective
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config


def check_algorithm(config: Config) -> None:
    """Raise UserError at the first rule that the algorithm's settings break."""
    algorithm = config.algorithm
    check_objective(config)
    _check_switches(algorithm)
    _check_group_size(config)
    _check_fill(config)
    require(
        algorithm.loss_constant is None or algorithm.loss_normalizer is LossNormalizer.constant,
        f"algorithm.loss_constant is {algorithm.loss_constant}, but it is used only with "
        f"algorithm.loss_normalizer=constant; set that, or loss_constant to null",
    )
    require(
        algorithm.weight is not Weight.fitted or bool(algorithm.variance_every),
        "algorithm.variance_every is 0, but algorithm.baseline=auto fits its weights to these reports; set "
        "it to 10, for example, or choose another baseline",
    )


def _check_group_size(config: Config) -> None:
    """Refuse a single sample per prompt where it is its own baseline."""
    algorithm, rollout = config.algorithm, config.rollout
    samples = rollout.samples_per_prompt
    if algorithm.scope is Scope.batch or algorithm.shrink:
        samples *= rollout.prompts_per_step
    has_baseline = algorithm.center in (Center.mean, Center.logmeanexp, Center.token_mean)
    require(
        samples > 1 or not has_baseline or (bool(algorithm.keep_lone) and not algorithm.shrink),
        "rollout.samples_per_prompt is 1, where each response is its own baseline and every advantage is 0; "
        "raise it, or set algorithm.scope=batch with several prompts",
    )


def _check_switches(algorithm: AlgorithmConfig) -> None:
    """Refuse switches that have no meaning together."""
    if is_own(algorithm.baseline):
        for switch, value in OWN._asdict().items():
            given = getattr(algorithm, switch)
            require(
                given == value,
                f"algorithm.{switch} is {_shown(given)}, but algorithm.baseline={algorithm.baseline} "
                f"computes the advantages by itself; remove algorithm.{switch}",
            )
        return
    center = algorithm.center or Center.mean
    by_sample = center is Center.mean
    _needs(algorithm, "leave_one_out", center in (Center.mean, Center.token_mean), "center", "mean")
    _needs(algorithm, "shrink", by_sample, "center", "mean")
    _needs(algorithm, "shrink", bool(algorithm.leave_one_out), "leave_one_out", "true")
    _needs(algorithm, "shrink", algorithm.scope is Scope.group, "scope", "group")
    _needs(algorithm, "shrink", algorithm.scale is Scale.none, "scale", "none")
    if center is Center.logmeanexp:
        _only(algorithm, "weight", Weight.one)
    if center is Center.token_mean:
        for switch, value in (
            ("weight", Weight.energy),
            ("scope", Scope.group),
            ("scale", Scale.none),
            ("shift", 0.0),
            ("positive_only", False),
            ("drop_zero_variance", False),
        ):
            _only(algorithm, switch, value)


def _needs(algorithm: AlgorithmConfig, switch: str, holds: bool, other: str, value: str) -> None:
    """Refuse a switch that is on where another one has not the value that it needs."""
    require(
        not getattr(algorithm, switch) or holds,
        f"algorithm.{switch}=true needs algorithm.{other}={value}, but it is "
        f"{_shown(getattr(algorithm, other))}; set algorithm.{other}={value}, or algorithm.{switch}=false",
    )


def _only(algorithm: AlgorithmConfig, switch: str, value: object) -> None:
    """Refuse another value of a switch than the one that `center` is defined with."""
    require(
        getattr(algorithm, switch) == value,
        f"algorithm.{switch} is {_shown(getattr(algorithm, switch))}, but algorithm.center="
        f"{_shown(algorithm.center)} is defined with {_shown(value)} alone; set algorithm.{switch}="
        f"{_shown(value)}",
    )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))


def _check_fill(config: Config) -> None:
    """Refuse to choose groups by their rewards where the choice would change the gradient."""
    algorithm, rollout = config.algorithm, config.rollout
    if rollout.fill is Fill.off:
        require(
            rollout.fill_rounds == 1,
            f"rollout.fill_rounds is {rollout.fill_rounds}, but rollout.fill=off samples one round; set it "
            "to 1, or rollout.fill=groups_with_signal",
        )
        return
    require(
        rollout.fill_rounds > 1,
        "rollout.fill_rounds is 1, where rollout.fill=groups_with_signal has no prompts to fill up with; "
        "set it to 3, for example, or rollout.fill=off",
    )
    require(
        algorithm.scope is Scope.group,
        "rollout.fill=groups_with_signal takes prompts by their rewards, but with algorithm.scope=batch the "
        "rewards of all prompts are in one baseline; set algorithm.scope=group, or rollout.fill=off",
    )
    require(
        not keeps_zero_variance(algorithm),
        f"rollout.fill=groups_with_signal leaves out groups whose rewards are all equal, but "
        f"algorithm.baseline={algorithm.baseline} has a gradient there; choose another baseline, or set "
        "rollout.fill=off",
    )
