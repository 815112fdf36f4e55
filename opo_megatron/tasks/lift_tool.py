"""The environment `lift_tool`: a tool that rides the lift, for a price.

The turn `?$` asks for the next stretch of the ride, and is given the floor after it, as in `7,`.  Any other
turn is the answer, judged as the lift judges it.  The reward of a right answer is 1 minus `cost` for each
question, and at least 0; a wrong one has none.  So asking pays where the ride is too long to be done at once,
and does not where it is short.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.environment import Environment
from opo_megatron.tasks.lift import ASK, LiftTask

DEFAULTS: dict[str, float] = {"stretch": 32, "cost": 0.1}
"""Moves of a stretch, and the price of a question."""


class LiftTool(Environment):
    """One ride."""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        values = checked_options(config.environment_options)
        self.stretch, self.cost = int(values["stretch"]), float(values["cost"])
        self.lift = _lift(json.dumps(dict(config.options)))
        self.questions, self.last = 0, list[int]()

    def start(self, prompt: Prompt) -> Sequence[int]:
        self.prompt = prompt
        return prompt.tokens

    def respond(self, tokens: list[int]) -> Sequence[int] | None:
        self.last = tokens
        if self.lift.decode(tokens) != ASK:
            return None
        self.questions += 1
        return self.lift.encode(f"{self.lift.after(self.prompt, self.questions * self.stretch)},")

    def reward(self) -> float:
        return self.lift.reward(self.prompt, self.last) * max(0.0, 1 - self.cost * self.questions)


@cache
def _lift(options: str) -> LiftTask:
    return LiftTask(json.loads(options))


def checked_options(options: Mapping[str, Any]) -> dict[str, float]:
    """`task.environment_options` with defaults.

    Raises:
        UserError: for another name or value.
    """
    for name, value in options.items():
        if name not in DEFAULTS:
            raise UserError(
                f"task.environment_options.{name} is {value!r}, but task.environment=lift_tool has only "
                f"{', '.join(DEFAULTS)}; remove it"
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "stretch" and not (is_number and isinstance(value, int) and value >= 1):
            raise UserError(
                f"task.environment_options.stretch is {value!r}; it must be a whole number above 0"
            )
        if name == "cost" and not (is_number and 0 <= value <= 1):
            raise UserError(f"task.environment_options.cost is {value!r}; it must be a number from 0 to 1")
    return DEFAULTS | dict(options)
