"""Where prompts and rewards come from."""

from collections.abc import Callable

from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.base import Prompt, Task
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.tasks.reasoning_gym import ReasoningGymTask
from opo_megatron.tasks.text import TextTask
from opo_megatron.tasks.tokenizers import open_tokenizer

TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "lift": lambda config: LiftTask(),
    "text": TextTask,
    "reasoning_gym": ReasoningGymTask,
}
"""Tasks by the name that a recipe uses."""


def decoder(name: str, tokenizer: str) -> Callable[[list[int]], str]:
    """Text for people of a task's tokens, without its problems.

    Args:
        name: `task.name`.
        tokenizer: `task.tokenizer`.
    """
    return LiftTask.decode if name == "lift" else open_tokenizer(tokenizer).decode


__all__ = ["TASKS", "Prompt", "Task", "decoder"]
