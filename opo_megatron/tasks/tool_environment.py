"""The environment `tools`: a chat model calls tools, and answers when it calls none.

    task.environment=tools
    task.environment_options.tools=[calculator, python, lookup, package.module:function]

Every call of a turn gets a message as its answer; a malformed one gets an error.  A turn without a call ends
the conversation, and the task's verifier judges this turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.chat_turns import ChatTurns
from opo_megatron.tasks.environment import Environment
from opo_megatron.tasks.python_sandbox import Limits, check_sandbox, run_python
from opo_megatron.tasks.tokenizers import FolderTokenizer
from opo_megatron.tasks.tool_calls import find_calls
from opo_megatron.tasks.tools import Tool, answer_call, calculator, lookup_in, read_table, schemas
from opo_megatron.tasks.user_verifier import load_named
from opo_megatron.utils.start_folder import absolute, to_open

DEFAULTS: dict[str, Any] = {
    "tools": ["calculator"],
    "lookup_file": "",
    "python_seconds": 5.0,
    "python_memory_mib": 512,
    "longest_answer": 2000,
    "answer_role": "tool",
}
"""Options, by name; `longest_answer` is a number of characters."""
MOST_CALLS = 16
"""Calls of a turn that are answered."""


class ToolEnvironment(Environment):
    """A conversation with tools."""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.options = checked_options(config.environment_options)
        self.tools, self.turns = _shared(config.tokenizer, json.dumps(self.options))

    def start(self, prompt: Prompt) -> Sequence[int]:
        self.messages = list(prompt.messages)
        return super().start(prompt)

    def respond(self, tokens: list[int]) -> Sequence[int] | None:
        tokenizer = self.turns.tokenizer
        calls = find_calls(tokenizer.decode(tokens))[:MOST_CALLS]
        if not calls:
            return None
        stop = tokens[-1] if tokens[-1] in tokenizer.stop_tokens else None
        answers = [answer_call(self.tools, call, self.options["longest_answer"]) for call in calls]
        return self.turns.given(self.messages, stop, answers)

    def check(self, prompts: Sequence[Prompt]) -> None:
        if "python" in self.tools:
            check_sandbox()
        self.turns.check([list(prompt.messages) for prompt in prompts])


def tool_schemas(config: TaskConfig) -> list[dict[str, Any]]:
    """What the prompt of a recipe tells of its tools; none without the environment."""
    if config.environment != "tools":
        return []
    return list(schemas(make_tools(checked_options(config.environment_options))))


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`task.environment_options` with defaults.

    Raises:
        UserError: for another name, or a value of another type.
    """
    for name, value in options.items():
        key = f"task.environment_options.{name}"
        if name not in DEFAULTS:
            raise UserError(
                f"{key} is {value!r}, but task.environment=tools has only {', '.join(DEFAULTS)}; remove it"
            )
        kind: Any = type(DEFAULTS[name])
        is_right = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
        if kind in (int, float):
            is_right = is_right and 0 < value < float("inf")
        if not is_right or not value:
            raise UserError(f"{key} is {value!r}; it must be {_EXPECTED[kind]}")
    return DEFAULTS | dict(options)


_EXPECTED = {list: "a list of tools, at least one", str: "a text", int: "a whole number above 0"}
_EXPECTED[float] = "a number above 0"


def make_tools(options: Mapping[str, Any]) -> dict[str, Tool]:
    """The tools by the names that the policy calls them by.

    Raises:
        UserError: for one that there is not.
    """
    tools: dict[str, Tool] = {}
    for name in options["tools"]:
        tools[str(name).rpartition(":")[2]] = _tool(str(name), options)
    return tools


def _tool(name: str, options: Mapping[str, Any]) -> Tool:
    if name == "calculator":
        return calculator
    if name == "python":
        limits = Limits(float(options["python_seconds"]), options["python_memory_mib"])
        return _python_tool(limits)
    if name == "lookup":
        if not options["lookup_file"]:
            raise UserError(
                "task.environment_options.tools has lookup, which needs "
                "task.environment_options.lookup_file; name a JSONL file"
            )
        return lookup_in(read_table(str(to_open(options["lookup_file"]))))
    if not all(name.partition(":")):
        raise UserError(
            f"task.environment_options.tools has {name!r}; it must be calculator, python, lookup, or a "
            "function as package.module:function"
        )
    advice = "check the name; modules are searched in {folder} and on PYTHONPATH"
    return load_named("task.environment_options.tools", name, advice)


def _python_tool(limits: Limits) -> Tool:
    def python(code: str) -> str:
        """Run a Python program, and see what it prints and the value of its last line.

        code: the program; it has the standard library, no network and no files
        """
        return run_python(code, limits)

    return python


@cache
def _shared(tokenizer: str, options: str) -> tuple[dict[str, Tool], ChatTurns]:
    """What all conversations share."""
    values = json.loads(options)
    tools = make_tools(values)
    return tools, ChatTurns(FolderTokenizer(absolute(tokenizer)), schemas(tools), values["answer_role"])
