"""The interface of a task: prompts by index, a reward per response, optionally demonstrations.

A split is an array of prompts with random access, so that their order is a pure function of (seed, epoch)
and no data loader state has to be saved.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

Split = Literal["train", "held_out"]
STREAM_TRAIN, STREAM_WARM_START, STREAM_EVAL, STREAM_GREEDY = range(4)
"""Independent streams of random numbers, for prompt order and sampling."""


@dataclass(frozen=True)
class Prompt:
    id: int
    """Unique within the task."""
    text: str
    tokens: tuple[int, ...]
    answer: str
    solution: str = ""
    """The reference solution that the answer was taken from."""
    messages: tuple[dict[str, Any], ...] = field(default=(), compare=False)
    """What the chat template rendered, where it did."""
    task_tokens: tuple[int, ...] | None = field(default=None, compare=False)
    """The task's own tokens, where an environment's `start` put others in their place."""

    @property
    def unopened(self) -> Prompt:
        """As the task made it."""
        return self if self.task_tokens is None else replace(self, tokens=self.task_tokens, task_tokens=None)

    @property
    def context(self) -> str:
        """What may tell how the answer is meant: the problem and its solution."""
        return f"{self.text}\n{self.solution}"


class Task(Protocol):
    vocab_size: int
    stop_tokens: tuple[int, ...]

    @property
    def notes(self) -> list[str]:
        """Lines about the data, for the log."""
        ...

    def size(self, split: Split) -> int:
        """Number of prompts."""
        ...

    def prompt(self, split: Split, index: int) -> Prompt: ...

    def dropped(self, split: Split) -> Sequence[int]:
        """Numbers of tokens of the prompts that were left out as longer than task.max_prompt_tokens."""
        ...

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        """Reward of a response, stop token included where it has one."""
        ...

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[float]:
        """Reward of each response to the prompt at the same index."""
        ...

    @property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of what the task reads besides the recipe, by key: a resumed run must read the same."""
        ...

    failures: int
    """Responses so far that the verifier could not grade; they got a default reward."""

    def start(self) -> None:
        """Start what grading needs; called once before the first reward, on every rank."""
        ...

    def close(self) -> None:
        """Stop the processes that the task started."""
        ...

    def demonstration(self, prompt: Prompt, rng: random.Random) -> list[int]:
        """A response for the warm start (SFT), stop token included."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Readable text."""
        ...

    def raw_text(self, tokens: list[int]) -> str:
        """Text with special tokens."""
        ...


class PerResponseTask(ABC):
    """Base of tasks that grade responses one by one, in this process."""

    failures = 0

    @abstractmethod
    def reward(self, prompt: Prompt, response: list[int]) -> float:
        """Reward of a response, stop token included where it has one."""

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[float]:
        return [self.reward(*pair) for pair in zip(prompts, responses, strict=True)]

    @property
    def fingerprint(self) -> dict[str, str]:
        return {}

    def dropped(self, split: Split) -> Sequence[int]:
        return ()

    def start(self) -> None:  # noqa: B027  this class needs nothing
        pass

    def close(self) -> None:  # noqa: B027  this class starts no processes
        pass


class PromptOrder:
    """An endless order of a split's indices: every epoch is a permutation from (seed, stream, epoch)."""

    def __init__(self, size: int, seed: int, stream: int) -> None:
        self.size, self.seed, self.stream = size, seed, stream
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, self.stream, epoch])
            self._permutation, self._epoch = generator.permutation(self.size), epoch
        return int(self._permutation[index])

    def batch(self, step: int, count: int) -> list[int]:
        """Indices of step 0, 1, 2, … with `count` prompts each."""
        return [self[step * count + i] for i in range(count)]
