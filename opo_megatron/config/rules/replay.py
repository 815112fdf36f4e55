"""Rules of `rollout.replay`: what can be trained on once more."""

from __future__ import annotations

from dataclasses import fields

from opo_megatron.algorithm.config import LossNormalizer, ObjectiveName
from opo_megatron.config.choices import ReplayMethod
from opo_megatron.config.rollout import ReplayConfig
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config

_OF_REPO = ("per_prompt", "choose")
_OF_SPEAR = ("history", "divide_by_std")


def check_replay(config: Config) -> None:
    """Raise UserError at the first setting that replay contradicts, or that has no meaning without it."""
    replay, algorithm = config.rollout.replay, config.algorithm
    setting = f"rollout.replay.method={replay.method.value}"
    _check_unused(replay)
    if replay.method is ReplayMethod.off:
        return
    require(
        algorithm.off_policy_sampling,
        f"rollout.replay.method is {replay.method.value}, which trains on responses of earlier weights; set "
        "it to off, or accept off-policy rollouts with algorithm.off_policy_sampling=true",
    )
    for name, is_wrong, reason in (
        (
            "rollout.overlap=true",
            config.rollout.overlap,
            "which trains on groups as they arrive; set it to false",
        ),
        (
            f"rollout.staleness={config.rollout.staleness}",
            config.rollout.staleness > 0,
            "whose rollouts are of earlier weights already; set it to 0",
        ),
        (
            f"algorithm.objective={algorithm.objective.value}",
            algorithm.objective is not ObjectiveName.policy_gradient,
            "but the step's own responses are at ratio 1, and those replayed are clipped by themselves; set "
            "it to policy_gradient",
        ),
    ):
        require(not is_wrong, f"{setting} with {name}, {reason}, or set rollout.replay.method=off")
    if replay.method is ReplayMethod.repo:
        assert replay.size is not None and replay.min_size is not None
        _check_sizes(replay, replay.size, replay.min_size)
    require(
        algorithm.loss_normalizer is not LossNormalizer.constant or replay.method is not ReplayMethod.spear,
        f"{setting} with algorithm.loss_normalizer=constant, but a replay has another number of samples than "
        "a step; set it to tokens or sequences, or set rollout.replay.method=off",
    )


def _check_sizes(replay: ReplayConfig, size: int, min_size: int) -> None:
    require(
        replay.per_prompt <= min_size,
        f"rollout.replay.per_prompt is {replay.per_prompt}, but prompts are replayed from "
        f"rollout.replay.min_size={min_size} kept responses on; lower the first or raise the second",
    )
    require(
        min_size <= size,
        f"rollout.replay.min_size is {min_size}, but rollout.replay.size={size} keeps fewer responses per "
        "prompt, so none would be replayed; lower the first or raise the second",
    )


def _check_unused(replay: ReplayConfig) -> None:
    """Refuse a key that the method does not read."""
    default = {one.name: one.default for one in fields(ReplayConfig)}
    unused = {ReplayMethod.off: (*_OF_REPO, *_OF_SPEAR, "coefficient"), ReplayMethod.repo: _OF_SPEAR}
    for key in unused.get(replay.method, _OF_REPO):
        value = getattr(replay, key)
        require(
            value == default[key],
            f"rollout.replay.{key} is {getattr(value, 'value', value)}, but rollout.replay.method="
            f"{replay.method.value} does not read it; remove it, or choose another method",
        )
