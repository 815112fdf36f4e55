"""Where prompts and rewards come from."""

from collections.abc import Callable

from opo_megatron.tasks.base import Prompt, Task
from opo_megatron.tasks.lift import LiftTask

TASKS: dict[str, Callable[[], Task]] = {"lift": LiftTask}
"""Tasks by the name that a recipe uses."""

__all__ = ["TASKS", "Prompt", "Task"]
