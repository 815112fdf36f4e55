"""Rules about the algorithm's settings."""

from __future__ import annotations

from opo_megatron.algorithm.config import LossNormalizer, MismatchAction, ObjectiveName, Scope, Weight
from opo_megatron.config.rules.require import divides, require
from opo_megatron.config.schema import Config


def check_algorithm(config: Config) -> None:
    """Raise UserError at the first rule that the algorithm's settings break."""
    algorithm, rollout = config.algorithm, config.rollout
    _check_objective(config)
    samples = rollout.samples_per_prompt
    if algorithm.scope is Scope.batch:
        samples *= rollout.prompts_per_step
    require(
        samples > 1,
        "rollout.samples_per_prompt is 1, where each response is its own baseline and every advantage is 0; "
        "raise it, or set algorithm.scope=batch with several prompts",
    )
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


def _check_objective(config: Config) -> None:
    algorithm, prompts = config.algorithm, config.rollout.prompts_per_step
    if algorithm.objective is ObjectiveName.policy_gradient:
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
        return
    divides("algorithm.updates_per_batch", algorithm.updates_per_batch, "rollout.prompts_per_step", prompts)
    require(
        config.on_policy.action is not MismatchAction.correct,
        "on_policy.action=correct weights OPO's gradient, but algorithm.objective=clipped has its own ratio; "
        "set on_policy.action to refuse or warn",
    )
