"""Environments: what answers the policy between its turns, `task.environment=package.module:Class`.

An environment is one conversation's other side, in tokens: `start` is told the prompt, `respond` gets the
tokens that the policy sampled in a turn (stop token included) and returns those that the policy is shown
next, or None to end.  Nothing is decoded, edited and tokenized again: the tokens that `respond` is given
stay in the sequence as they were sampled, and what it returns is only a condition, never trained on.

The class is called with the recipe's section `task` (a `TaskConfig`; `environment_options` is for the class
alone), once per conversation, in a process that holds one conversation at a time (`environment_pool.py`);
and once per prompt in the trainer's own process, which has to know what `start` returns.
What all can share, such as a tokenizer, belongs into a function with `functools.cache` that the constructor
calls: one object is made before the processes are forked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from opo_megatron.config.rules.environment import LIFT_TOOL, SINGLE_TURN, is_own_environment
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt, Split, Task
from opo_megatron.tasks.user_verifier import described, load_named

NEEDED = ("start", "respond", "reward")


class Environment:
    """Base of environments, and itself the one of single turns: it ends after the first."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def start(self, prompt: Prompt) -> Sequence[int]:
        """The tokens that the conversation begins with: the prompt's, or others.

        They depend on the prompt alone, because all samples of a prompt share a baseline.
        """
        self.prompt = prompt
        return prompt.tokens

    def respond(self, tokens: list[int]) -> Sequence[int] | None:
        """What the policy is given after a turn, at least one token; None ends the conversation.

        Args:
            tokens: sampled in this turn, stop token included where it has one.
        """
        return None

    def reward(self) -> float | None:
        """Of the whole conversation, after its last turn; None: the task's reward of the last turn."""
        return None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Called once when the run starts, with some of its prompts.

        Raises:
            UserError: where conversations about them would go wrong.
        """


def load_environment(config: TaskConfig) -> Callable[[TaskConfig], Environment]:
    """The class that the recipe names.

    Raises:
        UserError: where it cannot be loaded.
    """
    if config.environment == SINGLE_TURN:
        return Environment
    if config.environment == "tools":
        from opo_megatron.tasks.tool_environment import ToolEnvironment

        return ToolEnvironment
    if config.environment == LIFT_TOOL:
        from opo_megatron.tasks.lift_tool import LiftTool

        return LiftTool
    return load_named(
        "task.environment",
        config.environment,
        "check the name; modules are searched in {folder} and on PYTHONPATH",
    )


def make_environment(config: TaskConfig) -> Environment:
    """One environment, not started.

    Raises:
        UserError: where its class cannot be loaded or called, or lacks a method.
    """
    kind = load_environment(config)
    try:
        made = kind(config)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # a user's class may raise anything
        raise UserError(
            f"task.environment={config.environment} cannot be made: {described(error)}; it must be a class "
            "that is called with the recipe's section task"
        ) from error
    missing = [name for name in NEEDED if not callable(getattr(made, name, None))]
    if missing:
        raise UserError(
            f"task.environment={config.environment} has no {', no '.join(missing)}; an environment needs "
            f"{', '.join(NEEDED)}, as in docs/conversations.md"
        )
    return made


class OpenedTask:
    """A task whose prompts begin as the environment's `start` says; all else is the task's own."""

    def __init__(self, task: Task, config: TaskConfig) -> None:
        self._task, self._config = task, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def prompt(self, split: Split, index: int) -> Prompt:
        prompt = self._task.prompt(split, index)
        tokens = _started(self._config, prompt, self._task.vocab_size)
        if tokens == prompt.tokens:
            return prompt
        return replace(prompt, tokens=tokens, task_tokens=prompt.tokens)


def with_openings(task: Task, config: TaskConfig) -> Task:
    """The task as the recipe's environment opens it; those of the project begin with the prompt."""
    return cast(Task, OpenedTask(task, config)) if is_own_environment(config.environment) else task


def _started(config: TaskConfig, prompt: Prompt, vocab_size: int) -> tuple[int, ...]:
    """What `start` returns.

    Raises:
        UserError: where it raises, or returns what is no prompt.
    """
    name = f"task.environment={config.environment}"
    environment = make_environment(config)
    try:
        returned = environment.start(prompt)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # a user's class may raise anything
        raise UserError(f"{name} raised {described(error)} in start, of prompt {prompt.id}") from error
    try:
        tokens = tuple(int(token) for token in returned)
    except (TypeError, ValueError):
        tokens = ()
    if not tokens or not all(0 <= token < vocab_size for token in tokens):
        raise UserError(
            f"{name}: start returned {returned!r:.80} for prompt {prompt.id}; it must return token ids "
            f"from 0 to {vocab_size - 1}, at least one"
        )
    return tokens
