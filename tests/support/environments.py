"""Environments for tests: what each does is in its prompt's text."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.environment import Environment
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.tasks.lift_tool import LiftTool


class Opens(Environment):
    """Begins the conversation as the prompt says."""

    def start(self, prompt: Prompt) -> Any:
        one, other = prompt.tokens
        openings = {
            "prompt": prompt.tokens, "list": [one, other], "longer": [1, one, other, 2], "shorter": [other],
            "array": np.arange(one, one + 3), "none": None, "empty": [], "unknown": [17], "negative": [-1],
            "text": "ab",
        }  # fmt: skip
        return openings[prompt.text]


class AsksBehindASign(LiftTool):
    """The lift's tool, whose conversations begin with a sign of their own."""

    def start(self, prompt: Prompt) -> Sequence[int]:
        return [*LiftTask.encode("?"), *super().start(prompt)]


class Obedient(Environment):
    """Does in its second turn what the prompt says, and answers [turn] otherwise."""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.turns: list[list[int]] = []

    def start(self, prompt: Prompt) -> Sequence[int]:
        self.prompt = prompt
        return (*prompt.tokens, 1) if prompt.text == "other start" else prompt.tokens

    def respond(self, tokens: list[int]) -> Sequence[int] | None:
        self.turns.append(tokens)
        if self.prompt.text.startswith("slow"):
            time.sleep(seconds(self.prompt.id, len(self.turns), float(self.prompt.text.split()[1])))
            return [1] if len(self.turns) < 3 else None
        if len(self.turns) < 2:
            return [len(self.turns)]
        return self.act(self.prompt.text)

    def act(self, what: str) -> Sequence[int] | None:
        if what == "raise":
            raise RuntimeError("on purpose")
        if what == "exit":
            sys.exit(3)
        if what == "die":
            os._exit(1)
        if what == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "kill parent":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
        if what == "hang":
            time.sleep(1000)
        if what == "memory":
            return [0] * 10**10
        if what == "fork":
            os.fork()
        if what == "child":
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
            time.sleep(1000)
        if what == "print":
            print('["given", [5]]', flush=True)
        if what == "write":
            for descriptor in range(3, 20):
                with suppress(OSError):
                    os.write(descriptor, b"nonsense\n")
        if what == "wrong tokens":
            return [99]
        if what == "no tokens":
            return []
        if what == "endless":
            return [4]
        if what.startswith("sleep"):
            time.sleep(float(what.split()[1]))
        return None

    def reward(self) -> float | None:
        if self.prompt.text == "task's reward":
            return None
        if self.prompt.text == "nan":
            return float("nan")
        if self.prompt.text == "raise in reward":
            raise ValueError("no reward")
        return float(sum(map(len, self.turns)))


def seconds(number: int, turn: int, longest: float) -> float:
    """How long a slow environment takes to answer a turn."""
    return random.Random(f"{number}/{turn}").uniform(0, longest)


class NoReward:
    """Lacks a method."""

    def __init__(self, config: TaskConfig) -> None: ...

    def start(self, prompt: Prompt) -> Sequence[int]:
        return prompt.tokens

    def respond(self, tokens: list[int]) -> Sequence[int] | None:
        return None


class Raises(Environment):
    """Cannot be made."""

    def __init__(self, config: TaskConfig) -> None:
        raise KeyError("option")
