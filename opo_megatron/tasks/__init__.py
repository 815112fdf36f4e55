"""Tasks: prompts and rewards."""

from collections.abc import Callable

from opo_megatron.config.choices import TaskName
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt, Task
from opo_megatron.tasks.environment import with_openings
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.tasks.reasoning_gym import ReasoningGymTask
from opo_megatron.tasks.text import TextTask
from opo_megatron.tasks.tokenizers import open_tokenizer
from opo_megatron.tasks.user_task import UserTask

TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    TaskName.lift.value: lambda config: LiftTask(config.options),
    TaskName.text.value: TextTask,
    TaskName.reasoning_gym.value: ReasoningGymTask,
}


def make_task(config: TaskConfig) -> Task:
    """The task of a recipe: a built-in one, or a class of the user's own."""
    return with_openings(TASKS.get(config.name, UserTask)(config), config)


def decoder(name: str, tokenizer: str) -> Callable[[list[int]], str]:
    """The function tokens → text of a built-in task, without loading its problems.

    Args:
        name: `task.name`.
        tokenizer: `task.tokenizer`.

    Raises:
        UserError: for a class of the user's own, which would have to be run.
    """
    if name not in TASKS:
        raise UserError(f"task.name={name} is a class of your own, which a report does not run")
    return LiftTask.decode if name == TaskName.lift else open_tokenizer(tokenizer).decode


__all__ = ["Prompt", "Task", "decoder", "make_task"]
