"""Tasks: prompts and rewards."""

from collections.abc import Callable

from opo_megatron.config.choices import TaskName
from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.base import Prompt, Task
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.tasks.reasoning_gym import ReasoningGymTask
from opo_megatron.tasks.text import TextTask
from opo_megatron.tasks.tokenizers import open_tokenizer

TASKS: dict[TaskName, Callable[[TaskConfig], Task]] = {
    TaskName.lift: lambda config: LiftTask(),
    TaskName.text: TextTask,
    TaskName.reasoning_gym: ReasoningGymTask,
}


def make_task(config: TaskConfig) -> Task:
    """The task of a recipe."""
    return TASKS[config.name](config)


def decoder(name: str, tokenizer: str) -> Callable[[list[int]], str]:
    """The function tokens → text of a task, without loading its problems.

    Args:
        name: `task.name`.
        tokenizer: `task.tokenizer`.
    """
    return LiftTask.decode if name == TaskName.lift else open_tokenizer(tokenizer).decode


__all__ = ["Prompt", "Task", "decoder", "make_task"]
