"""Rules of `rollout.overlap`: what can be computed of a part of the batch while the rest is sampled."""

from __future__ import annotations

from opo_megatron.algorithm.config import (
    AlgorithmConfig,
    Center,
    ObjectiveName,
    Scale,
    Scope,
    Weight,
    is_own,
    needs_energies,
)
from opo_megatron.config.arithmetic import shares_memory
from opo_megatron.config.choices import Device, EngineName, Fill, Fp8, OverlapOrder
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config


def check_overlap(config: Config) -> None:
    """Raise UserError at the first setting that needs the whole batch before anything is trained."""
    rollout, algorithm = config.rollout, config.algorithm
    if not rollout.overlap:
        require(
            rollout.overlap_order is OverlapOrder.arrival,
            f"rollout.overlap_order is {rollout.overlap_order.value} without rollout.overlap=true, so there "
            "is no such order; remove it, or set rollout.overlap=true",
        )
        return
    require(
        rollout.engine is EngineName.sglang,
        f"rollout.overlap=true with rollout.engine={rollout.engine.value}, which samples in the trainer's "
        "own process; set rollout.engine=sglang, or rollout.overlap=false",
    )
    check_overlap_devices(config, on_gpu=config.policy.device is Device.cuda)
    for name, is_wrong, reason in (
        (
            f"algorithm.objective={algorithm.objective.value}",
            algorithm.objective is not ObjectiveName.policy_gradient,
            "whose other passes need the whole batch",
        ),
        (
            "rollout.fill=groups_with_signal",
            rollout.fill is not Fill.off,
            "which chooses groups of all rounds",
        ),
        (
            f"algorithm.variance_every={algorithm.variance_every}",
            bool(algorithm.variance_every),
            "whose reports take the gradients of the whole batch; set it to 0",
        ),
        ("policy.fp8=delayed", config.policy.fp8 is Fp8.delayed, "whose scales depend on the order"),
    ):
        require(not is_wrong, f"rollout.overlap=true with {name}, {reason}, or set rollout.overlap=false")
    whole = needs_whole_batch(algorithm)
    require(
        whole is None,
        f"rollout.overlap=true with algorithm.baseline={algorithm.baseline}, {whole}; choose a baseline of "
        "each group alone, such as opo or rloo, or set rollout.overlap=false",
    )


def check_overlap_devices(config: Config, on_gpu: bool) -> None:
    """Refuse to overlap with servers that sleep while the policy trains.

    Args:
        on_gpu: whether the policy is on GPUs, which policy.device=auto leaves open until the run starts.
    """
    require(
        not (config.rollout.overlap and shares_memory(config, on_gpu)),
        "rollout.overlap=true, but these SGLang servers are on the trainer's GPUs and sleep while it trains; "
        "give servers of their own nodes as rollout.sglang.urls, or set rollout.overlap=false",
    )


def needs_whole_batch(algorithm: AlgorithmConfig) -> str | None:
    """Why a group's rewards and lengths do not determine its advantages; None if they do."""
    if is_own(algorithm.baseline):
        return "a function that is given the whole batch"
    for is_so, reason in (
        (algorithm.weight is Weight.fitted, "which fits its weights to variance reports"),
        (algorithm.center is Center.greedy, "which needs the rewards of greedy responses"),
        (algorithm.center is Center.token_mean, "which needs energies of all tokens"),
        (needs_energies(algorithm), "which needs energies that another forward pass measures"),
        (algorithm.scope is Scope.batch, "which takes the mean over the batch"),
        (bool(algorithm.shrink), "which takes the mean of other prompts"),
        (algorithm.scale is Scale.token_std, "which divides by a deviation over the batch"),
    ):
        if is_so:
            return reason
    return None
