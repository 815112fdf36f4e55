"""The settings that a resumed run may change.

A setting is fixed if another value gives another curve than an uninterrupted run's; `--allow KEY` permits the
change.  All else may change freely: layout, device, file locations, memory use, what is measured and saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from opo_megatron.config.choices import Schedule
from opo_megatron.config.load import to_yaml
from opo_megatron.config.schema import Config
from opo_megatron.errors import UserError

_PER_ATTEMPT = ("run.dir", "resume", "rollout.sglang.api_key", "rollout.sglang.api_key_file")

FIXED = (
    "run.seed",
    "task",
    "warm_start",
    "rollout",
    "algorithm",
    "optimizer",
    "policy.model",
    "policy.dtype",
    "policy.fp8",
    "policy.fp8_scales",
    "on_policy.action",
    "on_policy.max_importance_weight",
)
"""Keys and sections that must not change, except `FREE`."""
FREE = (
    "rollout.local",
    "rollout.sglang",
    "rollout.environments",
    "policy.model.max_sequence_length",
)
"""Their parts that may change, except `FIXED_IN_FREE`."""
FIXED_IN_FREE = ("rollout.sglang.deterministic",)
"""What a run promises: its samples are repeatable, or not."""


HASHED = ("task.data", "task.held_out_data")
"""Files that may be elsewhere, where the checkpoint knows what was read from them."""
INPUTS = "inputs"
"""Key of the hashes of what the task reads, in the state of a run."""


class Change(NamedTuple):
    """A key whose value has changed."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before} → {self.now}"


def check_resume(
    config: Config,
    recipe: Path,
    finished_steps: int,
    allowed: Sequence[str],
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Refuse to resume with a fixed setting that differs from the resolved recipe of the run so far.

    Args:
        finished_steps: OPO steps of the checkpoint.
        allowed: keys and sections that may change nevertheless.
        inputs: hashes of what the run has read, by key (`check_inputs`).
    """
    free = (*FREE, *(key for key in HASHED if key in (inputs or {})))
    changes = [change for change in changed_settings(config, recipe) if not _is_in(change.key, allowed)]
    for change in changes:
        may_change = _is_in(change.key, free) and not _is_in(change.key, FIXED_IN_FREE)
        if _is_in(change.key, FIXED) and not may_change:
            raise UserError(
                f"{change.key} is {change.now} but was {change.before} when the checkpoint {recipe.parent} "
                f"was written; restore it, or add --allow {change.key} to change the curve on purpose"
            )
        if change.key == "train.steps":
            _check_steps(config, change, finished_steps)


def check_inputs(
    config: Config,
    before: Mapping[str, str],
    now: Mapping[str, str],
    checkpoint: Path,
    allowed: Sequence[str],
) -> None:
    """Refuse to resume with other rows of data, or another source of the user's code.

    Args:
        before: hash by key, of the run so far; empty where a checkpoint has none.
        now: the same, of this attempt.
    """
    for key, digest in before.items():
        if now.get(key) == digest or _is_in(key, allowed):
            continue
        value = flat(yaml.safe_load(to_yaml(config))).get(key)
        what = f"the rows of {key}" if key in HASHED else f"the source of {key}"
        raise UserError(
            f"{what}={value} changed since the checkpoint {checkpoint} was written; restore what it was, or "
            f"add --allow {key} to change the curve on purpose"
        )


def _check_steps(config: Config, change: Change, finished_steps: int) -> None:
    """Changing the number of steps keeps the curve only if the learning rates do not depend on it."""
    if change.now < finished_steps:
        raise UserError(
            f"train.steps is {change.now}, but the checkpoint has finished {finished_steps} steps; raise it, "
            "or resume from an older checkpoint"
        )
    schedule = config.optimizer.schedule
    if schedule is not Schedule.constant:
        raise UserError(
            f"train.steps is {change.now} but was {change.before}, and with optimizer.schedule="
            f"{schedule.value} the learning rates of all steps depend on it; restore it, or add --allow "
            "train.steps to change the curve on purpose"
        )


def changed_settings(config: Config, recipe: Path) -> list[Change]:
    """Every key that differs from a resolved recipe; none if the recipe does not exist."""
    if not recipe.exists():
        return []
    before, now = flat(yaml.safe_load(recipe.read_bytes())), flat(yaml.safe_load(to_yaml(config)))
    keys = [key for key in now if key not in _PER_ATTEMPT and key in before and before[key] != now[key]]
    return [Change(key, before[key], now[key]) for key in keys]


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    leaves: dict[str, Any] = {}
    for name, part in tree.items():
        leaves |= flat(part, f"{prefix}{name}.")
    return leaves
