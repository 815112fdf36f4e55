"""Where prompts and rewards come from."""

from collections.abc import Callable

from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.base import Prompt, Task
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.tasks.reasoning_gym import ReasoningGymTask
from opo_megatron.tasks.text import TextTask

TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "lift": lambda config: LiftTask(),
    "text": TextTask,
    "reasoning_gym": ReasoningGymTask,
}
"""Tasks by the name that a recipe uses."""

__all__ = ["TASKS", "Prompt", "Task"]
