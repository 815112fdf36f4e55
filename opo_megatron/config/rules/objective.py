"""Rules about the objective and its options (`algorithm/objectives/table.py`)."""

from __future__ import annotations

from opo_megatron.algorithm.config import AlgorithmConfig, MismatchAction, ObjectiveName, needs_token_energies
from opo_megatron.algorithm.objectives.table import SPECS, ObjectiveSpec, Option, Scope
from opo_megatron.config.rules.require import divides, require
from opo_megatron.config.schema import Config

OPTIONS = "algorithm.objective_options"
_OF_CLIPPED = {"clip_low": 0.2, "clip_high": 0.2, "kl_coefficient": 0.0}
"""Keys of the recipe that only `clipped` reads, with their defaults."""


def check_objective(config: Config) -> None:
    """Raise UserError at the first setting that the objective contradicts."""
    algorithm, spec = config.algorithm, SPECS[config.algorithm.objective]
    _check_options(algorithm, spec)
    if algorithm.objective is ObjectiveName.policy_gradient:
        _check_opo(algorithm)
        return
    if algorithm.objective is not ObjectiveName.clipped:
        _check_keys_of_clipped(algorithm, spec)
    updates, prompts = algorithm.updates_per_batch, config.rollout.prompts_per_step
    divides("algorithm.updates_per_batch", updates, "rollout.prompts_per_step", prompts)
    _check_correction(config, spec)
    _check_rewards(config, spec)


def _check_opo(algorithm: AlgorithmConfig) -> None:
    require(
        algorithm.updates_per_batch == 1,
        f"algorithm.updates_per_batch is {algorithm.updates_per_batch}, but OPO takes exactly one "
        "optimizer step per batch; set it to 1, or algorithm.objective=clipped",
    )
    require(
        algorithm.kl_coefficient == 0,
        f"algorithm.kl_coefficient is {algorithm.kl_coefficient:g}, but OPO has no KL term; set it to 0, "
        "or algorithm.objective=clipped",
    )


def _check_options(algorithm: AlgorithmConfig, spec: ObjectiveSpec) -> None:
    """Refuse options that the objective does not have, lacks, or that are out of range."""
    name, given = algorithm.objective.value, algorithm.objective_options
    for option, value in given.items():
        require(
            value is not None,
            f"{OPTIONS}.{option} has no value; write {OPTIONS}.NAME=NUMBER, or a mapping with a space after "
            "each colon",
        )
        has = f"has only {', '.join(spec.options)}" if spec.options else "has none"
        require(
            option in spec.options,
            f"{OPTIONS}.{option} is {value!r}, but algorithm.objective={name} {has}; remove it",
        )
        _check_value(f"{OPTIONS}.{option}", spec.options[option], value)
    for option, rule in spec.options.items():
        require(
            option in given,
            f"algorithm.objective={name} needs {OPTIONS}.{option}, {rule.meaning}, which has no default; set "
            f"{OPTIONS}.{option}=0.1, for example",
        )
    for low, high in (("low", "highest_low"), ("high", "highest_high")):
        require(
            low not in given or given[low] <= given[high],
            f"{OPTIONS}.{low} is {given.get(low)}, which is above {OPTIONS}.{high}={given.get(high)}; "
            f"lower it, or raise {high}",
        )


def _check_value(key: str, option: Option, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        is_number and option.allows(float(value)),  # type: ignore[arg-type]
        f"{key} is {value!r}; it must be a number {option.allowed}",
    )


def _check_keys_of_clipped(algorithm: AlgorithmConfig, spec: ObjectiveSpec) -> None:
    """Refuse keys that would be ignored."""
    name = algorithm.objective.value
    own = f"{OPTIONS} has {', '.join(spec.options)}" if spec.options else "it has no options"
    for key, default in _OF_CLIPPED.items():
        value = getattr(algorithm, key)
        require(
            value == default,
            f"algorithm.{key} is {value:g}, but algorithm.objective={name} does not read it ({own}); set it "
            f"to {default:g}, its default",
        )


def _check_correction(config: Config, spec: ObjectiveSpec) -> None:
    name = config.algorithm.objective.value
    own = "weights by the engine's log-probabilities itself" if spec.takes_engine else "has its own ratio"
    require(
        config.on_policy.action is not MismatchAction.correct,
        f"on_policy.action=correct weights OPO's gradient, but algorithm.objective={name} {own}; set "
        "on_policy.action to refuse or warn",
    )


def _check_rewards(config: Config, spec: ObjectiveSpec) -> None:
    """Refuse what has no meaning for objectives that read the rewards beside the advantages."""
    algorithm, samples = config.algorithm, config.rollout.samples_per_prompt
    name = algorithm.objective.value
    require(
        not (spec.takes_rewards and needs_token_energies(algorithm)),
        f"algorithm.objective={name} goes by the reward of a whole response, but algorithm.baseline="
        f"{algorithm.baseline} has an advantage for each token; choose a baseline such as group_mean",
    )
    compares = spec.takes_rewards and spec.derived_over in (Scope.group, Scope.sequence)
    require(
        not compares or samples > 1,
        f"rollout.samples_per_prompt is {samples}, but algorithm.objective={name} compares the rewards of a "
        "prompt's responses; raise it",
    )
