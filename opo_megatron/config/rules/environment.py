"""Rules of `task.environment`: what is not proven for conversations of several turns is refused."""

from __future__ import annotations

from opo_megatron.algorithm.config import Center
from opo_megatron.config.choices import Fill, TaskName
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config

SINGLE_TURN = "single_turn"
LIFT_TOOL = "lift_tool"
ENVIRONMENTS = (SINGLE_TURN, "tools", LIFT_TOOL)
"""Names besides `package.module:Class`."""


def has_environment(config: Config) -> bool:
    """Whether something answers the policy."""
    return config.task.environment != SINGLE_TURN


def is_own_environment(name: str) -> bool:
    """Whether `task.environment` names a user's class, `package.module:Class`."""
    return all(name.partition(":"))


def check_environment(config: Config) -> None:
    """Raise UserError at the first setting that does not go with the environment."""
    task, rollout, algorithm = config.task, config.rollout, config.algorithm
    name = f"task.environment={task.environment}"
    require(
        task.environment in ENVIRONMENTS or is_own_environment(task.environment),
        f"task.environment is {task.environment!r}; it must be one of {', '.join(ENVIRONMENTS)}, or "
        "package.module:Class",
    )
    if not has_environment(config):
        require(
            not task.environment_options,
            f"task.environment_options is {dict(task.environment_options)}, but {name} has no options; "
            "remove it, or name an environment",
        )
        return
    require(
        not rollout.overlap,
        f"rollout.overlap=true with {name}, whose conversations are trained on as a whole batch; set "
        "rollout.overlap=false",
    )
    require(
        rollout.fill is Fill.off,
        f"rollout.fill={rollout.fill.value} with {name}, whose failures and time limits would decide which "
        "groups are trained on; set rollout.fill=off",
    )
    require(
        algorithm.center is not Center.greedy,
        f"algorithm.baseline={algorithm.baseline} with {name}, but its greedy responses are sampled without "
        "an environment; choose another baseline, such as opo or rloo",
    )
    require(
        task.environment != LIFT_TOOL or task.name == TaskName.lift,
        f"{name} with task.name={task.name}, but it knows only the lift; set task.name=lift",
    )
    if task.environment == "tools":
        require(
            task.name == TaskName.text and task.chat,
            f"{name} needs task.name=text and task.chat=true, because a chat template renders the tools and "
            "their answers; set both",
        )
