"""Tools: functions with a docstring and types, which a chat model may call.

    def population(city: str, year: int = 2020) -> str:
        "How many people live in a city.\n\ncity: its name in English"

The schema that the chat template renders follows from the signature; the first line of the docstring says
what the tool does, and a line `NAME: …` what an argument is.  A call whose arguments do not fit, or that
raises, gets an error as its answer.  The answer is text; other values are written as JSON.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from opo_megatron.errors import UserError
from opo_megatron.tasks.tool_calls import BadCall, Call
from opo_megatron.tasks.user_verifier import described

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}

Tool = Callable[..., Any]


def schema_of(name: str, tool: Tool) -> dict[str, Any]:
    """The tool in the form of OpenAI's function calling, which chat templates expect.

    Raises:
        UserError: for a function whose signature or docstring does not say what it needs.
    """
    documentation = inspect.getdoc(tool)
    if not documentation:
        raise UserError(f"the tool {name} has no docstring; say in its first line what it does")
    try:
        hints = get_type_hints(tool)
        parameters = inspect.signature(tool).parameters
    except (TypeError, ValueError, NameError) as error:
        raise UserError(f"the signature of the tool {name} cannot be read ({error}); correct it") from None
    first, _, rest = documentation.partition("\n")
    meanings = dict(re.findall(r"^\s*(\w+): (.+)$", rest, re.MULTILINE))
    properties = {}
    for key, parameter in parameters.items():
        if key not in hints or parameter.kind not in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        ):
            raise UserError(f"the argument {key} of the tool {name} has no type, or no name; give it both")
        properties[key] = _type_schema(name, key, hints[key])
        if key in meanings:
            properties[key]["description"] = meanings[key]
    required = [key for key, one in parameters.items() if one.default is inspect.Parameter.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": first.strip(), "parameters": schema},
    }


def _type_schema(name: str, key: str, hint: Any) -> dict[str, Any]:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        kinds = [one for one in get_args(hint) if one is not NoneType]
        if len(kinds) == 1:
            return _type_schema(name, key, kinds[0])
    kind = _TYPES.get(origin or hint)
    if kind is None:
        raise UserError(
            f"the argument {key} of the tool {name} has the type {hint}, which JSON does not have; use "
            f"{', '.join(one.__name__ for one in _TYPES)}"
        )
    schema: dict[str, Any] = {"type": kind}
    if kind == "array" and get_args(hint):
        schema["items"] = _type_schema(name, key, get_args(hint)[0])
    return schema


def answer_call(tools: Mapping[str, Tool], call: Call | BadCall, longest: int) -> str:
    """What the policy is told, at most `longest` characters; never raises for what a tool does."""
    try:
        text = _called(tools, call)
    except Exception as error:  # a tool may raise anything
        text = f"Error: {described(error)}"
    text = text.encode(errors="replace").decode()  # lone surrogates cannot be tokenized
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest} more characters)"


def _called(tools: Mapping[str, Tool], call: Call | BadCall) -> str:
    if isinstance(call, BadCall):
        return f"Error: {call.words}"
    if call.name not in tools:
        return f"Error: there is no tool {call.name[:60]!r}; there are {', '.join(tools)}"
    wrong = wrong_arguments(schema_of(call.name, tools[call.name]), call.arguments)
    if wrong is not None:
        return f"Error: {wrong}"
    value = tools[call.name](**call.arguments)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def wrong_arguments(schema: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """What does not fit a schema; None if all does."""
    parameters = schema["function"]["parameters"]
    for key in parameters["required"]:
        if key not in arguments:
            return f"the argument {key!r} is missing"
    for key, value in arguments.items():
        if key not in parameters["properties"]:
            return f"there is no argument {key[:60]!r}; there are {', '.join(parameters['properties'])}"
        kind = parameters["properties"][key]["type"]
        if not _fits(value, kind):
            return f"the argument {key!r} must be of type {kind}"
    return None


def _fits(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "number":
        return isinstance(value, int | float)
    return any(name == kind and isinstance(value, python) for python, name in _TYPES.items())


# ------------------------------------------------------------------ tools that come with it

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
MOST_DIGITS = 1000
LONGEST_EXPRESSION = 1000


def calculator(expression: str) -> str:
    """Compute an arithmetic expression with + - * / // % ** and parentheses.

    expression: for example (3+4)*5
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"an expression has at most {LONGEST_EXPRESSION} characters")
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("this is not an arithmetic expression") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _small(_OPERATORS[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _small(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _value(node.left), _value(node.right)
        if isinstance(base, int) and abs(exponent) * base.bit_length() > 4 * MOST_DIGITS:
            raise ValueError("the number is too large")
        return _small(base**exponent)
    raise ValueError("only numbers and + - * / // % ** ( ) are allowed")


def _small(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > 4 * MOST_DIGITS:
        raise ValueError("the number is too large")
    return value  # type: ignore[no-any-return]


@cache
def read_table(path: str) -> dict[str, str]:
    """Keys and values of a JSONL file with {"key": …, "value": …} per line; keys are compared in lower case.

    Raises:
        UserError: for a line that is something else.
    """
    table: dict[str, str] = {}
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007  named in the error
                if line.strip():
                    row = json.loads(line)
                    table[row["key"].strip().lower()] = str(row["value"])
    except OSError as error:
        raise UserError(
            f"task.environment_options.lookup_file={path} cannot be read ({error.strerror}); correct the path"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}, line {number}: not an object with a text key and a value; write it like "
            '{"key": "Paris", "value": "capital of France"}'
        ) from None
    return table


def lookup_in(table: Mapping[str, str]) -> Tool:
    """The tool that looks a key up in a table."""

    def lookup(key: str) -> str:
        """Look up an entry by its key.

        key: the exact key; upper and lower case are the same
        """
        return table.get(key.strip().lower(), "there is no such entry")

    return lookup


def schemas(tools: Mapping[str, Tool]) -> Sequence[dict[str, Any]]:
    """Of all tools, in their order."""
    return [schema_of(name, tool) for name, tool in tools.items()]
