"""The environments of a run, in worker processes, behind the protocols of `conversations.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.config.rules.environment import has_environment
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.rollout.conversations import Answer, ConversationLedger, Limits
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.tasks.base import Prompt, Split, Task
from opo_megatron.tasks.environment import make_environment
from opo_megatron.tasks.environment_pool import EnvironmentPool, Reply

CHECKED_PROMPTS = 8
"""Prompts of each split that the environment's `check` gets."""


class WorkerEnvironments:
    """Conversations with the recipe's environment, one call of an engine after the other."""

    def __init__(self, config: Config, task: Task, log: Callable[[str], None]) -> None:
        """
        Raises:
            UserError: where the environment cannot be used.
        """
        self.config, self.task, self.log = config, task, log
        self.failures = 0
        self._kinds: set[str] = set()
        """Failures that were logged."""
        self._calls = count()
        self.pool = EnvironmentPool(config.task, config.rollout.environments)
        check_environment_on(config.task, task)
        self.pool.start()

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the class's source."""
        return {} if self.pool.source is None else {"task.environment": self.pool.source}

    def open(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[Prompt], sampling: Sampling
    ) -> WorkerConversations:
        longest = self.config.policy.model.max_sequence_length
        limits = Limits(self.config.rollout.max_turns, sampling.max_tokens, longest)
        return WorkerConversations(self, next(self._calls), requests, prompts, limits)

    def failed(self, words: str) -> None:
        """Count a failure, and log the first of its kind."""
        self.failures += 1
        if words not in self._kinds and len(self._kinds) < CHECKED_PROMPTS:
            self._kinds.add(words)
            self.log(
                f"an environment of task.environment={self.config.task.environment} {words}; its "
                f"conversation has the reward task.verifier_default={self.config.task.verifier_default:g}"
            )

    def close(self) -> None:
        self.pool.close()


class WorkerConversations:
    """The conversations of one call; see `Conversations`."""

    def __init__(
        self,
        environments: WorkerEnvironments,
        call: int,
        requests: Sequence[GenerationRequest],
        prompts: Sequence[Prompt],
        limits: Limits,
    ) -> None:
        self._environments, self._pool, self._call = environments, environments.pool, call
        self._task, self._prompts = environments.task, prompts
        self._ledger = ConversationLedger(requests, limits)
        self._turns: dict[int, list[int]] = {}
        """The last turn of each conversation that has not ended."""
        self._to_grade: dict[int, list[int]] = {}
        self._rewards: Tensor | None = None

    def left(self, index: int) -> int:
        return self._ledger.left(index)

    def respond(self, index: int, tokens: Sequence[int], finish: int) -> None:
        self._ledger.turn(index, tokens, finish)
        is_first = index not in self._turns
        self._turns[index] = list(tokens)
        if is_first:
            self._pool.begin((self._call, index), self._prompts[index], list(tokens))
        else:
            self._pool.respond((self._call, index), list(tokens))

    def ready(self, timeout: float) -> list[Answer]:
        end = time.monotonic() + timeout
        while True:
            replies = self._pool.replies(max(0.0, end - time.monotonic()))
            found = [one for reply in replies if (one := self._answer(reply)) is not None]
            if found or time.monotonic() >= end:
                return found

    def _answer(self, reply: Reply) -> Answer | None:
        """The answer that follows from a reply; None where the environment is asked for its reward."""
        assert isinstance(reply.key, tuple)
        index, kind, value = reply.key[1], reply.kind, reply.value
        config = self._environments.config.task
        if kind == "wrong":
            raise UserError(f"task.environment={config.environment}: {value}; correct it")
        if kind == "failed":
            self._environments.failed(str(value))
            self._ledger.continues(index, None)
            return self._end(index, config.verifier_default)
        if kind == "given":
            check_given(config, value, self._task.vocab_size)
            if self._ledger.continues(index, value):
                return index, tuple(value)
            self._pool.reward(reply.key)
            return None
        if value is None:
            self._to_grade[index] = self._turns[index]
        elif not abs(value) < float("inf"):
            raise UserError(
                f"task.environment={config.environment}: reward returned {value}; it must be a finite "
                "number, or None for the task's reward of the last turn"
            )
        return self._end(index, 0.0 if value is None else value)

    def _end(self, index: int, reward: float) -> Answer:
        self._ledger.end(index, reward)
        del self._turns[index]
        self._pool.release((self._call, index))
        return index, None

    def rewards(self) -> Tensor:
        if self._rewards is None:
            self._rewards = self._ledger.rewards()
            if self._to_grade:
                indices = sorted(self._to_grade)
                graded = self._task.rewards(
                    [self._prompts[i] for i in indices], [self._to_grade[i] for i in indices]
                )
                self._rewards[indices] = torch.tensor(graded, dtype=torch.float64)
        return self._rewards

    def finish_reasons(self) -> Tensor:
        return self._ledger.finish_reasons()

    def close(self) -> None:
        for index in list(self._turns):
            self._pool.forget((self._call, index))
        self._turns.clear()


def open_environments(config: Config, task: Task, log: Callable[[str], None]) -> WorkerEnvironments | None:
    """What answers the policy; None for a task of single turns, which needs nothing."""
    return WorkerEnvironments(config, task, log) if has_environment(config) else None


def with_answers(
    config: Config, stop_tokens: Sequence[int], prompts: Sequence[Prompt], demonstrations: Rollouts
) -> Rollouts:
    """Demonstrations, which are all turns of the policy, with what the environment gives between them.

    It answers in this process; a turn ends at a stop token, and what follows the end stays without answers.
    """
    lengths, given, after = [], list[int](), list[int]()
    for prompt, response in zip(prompts, demonstrations.responses(), strict=True):
        environment = make_environment(config.task)
        environment.start(prompt.unopened)
        begin, before = 0, len(given)
        for end in [i + 1 for i, token in enumerate(response[:-1]) if token in stop_tokens]:
            answer = environment.respond(response[begin:end])
            if answer is None:
                break
            given += answer
            after += [end] * len(answer)
            begin = end
        lengths.append(len(given) - before)
    demonstrations.given_lengths = torch.tensor(lengths, dtype=torch.int64)
    demonstrations.given_tokens = torch.tensor(given, dtype=torch.int64)
    demonstrations.given_after = torch.tensor(after, dtype=torch.int64)
    return demonstrations


def check_environment_on(config: TaskConfig, task: Task) -> None:
    """Let the environment look at prompts of the task.

    Raises:
        UserError: from its `check`.
    """
    environment = make_environment(config)
    if not hasattr(environment, "check"):
        return
    splits: tuple[Split, ...] = ("train", "held_out")
    indices = [(split, i) for split in splits for i in range(min(CHECKED_PROMPTS, task.size(split)))]
    environment.check([task.prompt(*index).unopened for index in indices])


def check_given(config: TaskConfig, tokens: list[int] | None, vocab_size: int) -> None:
    """
    Raises:
        UserError: for what the policy could not be given.
    """
    if tokens is None or (tokens and all(0 <= token < vocab_size for token in tokens)):
        return
    raise UserError(
        f"task.environment={config.environment}: respond returned {tokens!r:.80}; it must return token ids "
        f"from 0 to {vocab_size - 1}, at least one, or None to end the conversation"
    )
