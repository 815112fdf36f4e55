"""The tool calls in a turn of a chat model, in the formats of Qwen and of Llama.

    Qwen    any number of   <tool_call>{"name": "calculator", "arguments": {"expression": "2*3"}}</tool_call>
    Llama   the whole turn  {"name": "calculator", "parameters": {"expression": "2*3"}}

Text around Qwen's calls is the model's own.  What begins as a call and is none is returned as a `BadCall`,
whose words are the tool's answer: the policy learns from them, and nothing is repaired for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_QWEN = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_LLAMA = re.compile(r'\s*(?:<\|python_tag\|>)?\s*\{\s*"(?:name|type|parameters|arguments)"')
LONGEST_CALL = 100_000
"""Characters."""


@dataclass(frozen=True)
class Call:
    """A tool and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BadCall:
    """What is wrong with a call."""

    words: str


def find_calls(text: str) -> list[Call | BadCall]:
    """All calls of a turn, in order; none where it is an answer."""
    found = list(_QWEN.finditer(text))
    if found:
        return [_parsed(one[1]) if one[2] else BadCall("</tool_call> is missing") for one in found]
    if _LLAMA.match(text):
        return [_parsed(text.strip().removeprefix("<|python_tag|>"))]
    return []


def _parsed(text: str) -> Call | BadCall:
    if len(text) > LONGEST_CALL:
        return BadCall(f"the call has {len(text)} characters; at most {LONGEST_CALL} are allowed")
    try:
        value = json.loads(text, parse_constant=_refused)
    except RecursionError:
        return BadCall("the call is nested too deeply")
    except ValueError as error:
        return BadCall(f"the call is not JSON ({error})")
    if not isinstance(value, dict):
        return BadCall("the call is not a JSON object")
    name = value.get("name")
    if not isinstance(name, str):
        return BadCall('the call has no "name"')
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return BadCall('the call has no "arguments", which is an object of arguments by name')
    return Call(name, arguments)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
