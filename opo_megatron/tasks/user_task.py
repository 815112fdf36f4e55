"""A user's task class, `task.name=package.module:Class`: what it needs, and the sentence where it is wrong.

The class is called with the recipe's section `task` (a `TaskConfig`; `task.options` is for the class alone),
once on every rank.  It needs the attributes in `NEEDED`; those in `OPTIONAL` have defaults.  What each must
do is said by `base.py::Task`.  It runs in the training process, and must give every rank the same prompts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt, Split
from opo_megatron.tasks.user_verifier import (
    as_reward,
    described,
    leave_forks,
    load_function,
    make_importable,
    source_hash,
)

NEEDED = ("vocab_size", "stop_tokens", "size", "prompt", "decode")
"""And `reward` or `rewards`."""
OPTIONAL = ("notes", "fingerprint", "dropped", "start", "close", "demonstration", "raw_text")


class UserTask:
    """A task that forwards to a user's object, checks what it returns, and turns what it raises into a
    sentence."""

    failures = 0

    def __init__(self, config: TaskConfig) -> None:
        """
        Raises:
            UserError: for a class that cannot be loaded or called, or lacks an attribute.
        """
        self.config, self.path = config, config.name
        self._task = self._made()
        missing = [name for name in NEEDED if not hasattr(self._task, name)]
        if not hasattr(self._task, "rewards") and not hasattr(self._task, "reward"):
            missing.append("reward")
        if missing:
            raise UserError(
                f"task.name={self.path} has no {', no '.join(missing)}; a task class needs "
                f"{', '.join(NEEDED)} and reward or rewards, as in examples/counting_task.py"
            )
        self.vocab_size = self._positive("vocab_size", self._task.vocab_size)
        stops = self._task.stop_tokens
        self._check_tokens("stop_tokens", stops)
        self.stop_tokens = tuple(stops)

    def _made(self) -> Any:
        folder = make_importable()
        try:
            return load_function(self.path)(self.config)
        except (KeyboardInterrupt, UserError):
            raise
        except BaseException as error:  # a user's class may raise anything
            raise UserError(
                f"task.name={self.path} cannot be made: {described(error)}; it must be a class that is "
                f"called with the recipe's section task, in a module in {folder} or on PYTHONPATH"
            ) from error

    def _call(self, name: str, *arguments: Any) -> Any:
        own_pid = os.getpid()
        try:
            result = getattr(self._task, name)(*arguments)
        except (KeyboardInterrupt, UserError):
            raise
        except BaseException as error:  # a user's class may raise anything, SystemExit included
            leave_forks(own_pid)
            raise UserError(
                f"task.name={self.path} raised {described(error)} in {name}; correct it"
            ) from error
        leave_forks(own_pid)
        return result

    def _call_optional(self, name: str, default: Any, *arguments: Any) -> Any:
        return self._call(name, *arguments) if hasattr(self._task, name) else default

    def _wrong(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(f"task.name={self.path}: {name} is {value!r:.80}; it must be {expected}")

    def _positive(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(name, value, "a whole number, at least 1")
        return value

    def _check_tokens(self, name: str, tokens: Any) -> None:
        if not isinstance(tokens, tuple | list) or not tokens:
            raise self._wrong(name, tokens, "token ids, at least one")
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise self._wrong(name, tokens, f"token ids from 0 to {self.vocab_size - 1}")

    # ------------------------------------------------------------------ the task

    @property
    def notes(self) -> list[str]:
        return [str(note) for note in getattr(self._task, "notes", ())]

    def size(self, split: Split) -> int:
        return self._positive(f"size({split!r})", self._call("size", split))

    def prompt(self, split: Split, index: int) -> Prompt:
        prompt = self._call("prompt", split, index)
        name = f"prompt({split!r}, {index})"
        if not isinstance(prompt, Prompt):
            raise self._wrong(name, prompt, "a Prompt of opo_megatron.tasks.base")
        self._check_tokens(f"{name}.tokens", prompt.tokens)
        if len(prompt.tokens) > self.config.max_prompt_tokens:
            raise self._wrong(
                f"the length of {name}",
                len(prompt.tokens),
                f"at most task.max_prompt_tokens={self.config.max_prompt_tokens}",
            )
        return prompt

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the class's source, and what the class adds."""
        source = source_hash(self.path, type(self._task))
        own = dict(getattr(self._task, "fingerprint", {}))
        return own | ({} if source is None else {"task.name": source})

    def dropped(self, split: Split) -> Sequence[int]:
        return self._call_optional("dropped", (), split)  # type: ignore[no-any-return]

    def start(self) -> None:
        self._call_optional("start", None)

    def close(self) -> None:
        self._call_optional("close", None)

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        return self.rewards([prompt], [response])[0]

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[float]:
        """None is a response that could not be graded: it gets the default reward, and is counted."""
        if hasattr(self._task, "rewards"):
            rewards = self._call("rewards", prompts, responses)
        else:
            rewards = [self._call("reward", *pair) for pair in zip(prompts, responses, strict=True)]
        try:
            found = [None if reward is None else as_reward(reward) for reward in rewards]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"task.name={self.path}: a reward is wrong ({described(error)}); it must be a finite number"
            ) from None
        if len(found) != len(prompts):
            raise self._wrong("the number of rewards", len(found), f"that of the responses, {len(prompts)}")
        self.failures += found.count(None)
        return [self.config.verifier_default if reward is None else reward for reward in found]

    def demonstration(self, prompt: Prompt, rng: random.Random) -> list[int]:
        if not hasattr(self._task, "demonstration"):
            raise UserError(f"task.name={self.path} has no demonstrations; set warm_start.steps=0")
        tokens = self._call("demonstration", prompt, rng)
        self._check_tokens("a demonstration", tokens)
        return list(tokens)

    def decode(self, tokens: list[int]) -> str:
        return str(self._call("decode", tokens))

    def raw_text(self, tokens: list[int]) -> str:
        return str(self._call_optional("raw_text", None, tokens) or self.decode(tokens))
