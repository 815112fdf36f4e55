"""Tool calls are read as they are written, arguments are checked by types, and a mistake is an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opo_megatron.errors import UserError
from opo_megatron.tasks.tool_calls import BadCall, Call, find_calls
from opo_megatron.tasks.tools import (
    answer_call,
    calculator,
    lookup_in,
    read_table,
    schema_of,
    wrong_arguments,
)

ADD = Call("add", {"a": 1})
BODY = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>{BODY}</tool_call>", [ADD]),
        (f"I add.\n<tool_call>\n{BODY}\n</tool_call>\n", [ADD]),
        (f"<tool_call>{BODY}</tool_call> and <tool_call>{BODY}</tool_call>", [ADD, ADD]),
        ('{"name": "add", "parameters": {"a": 1}}', [ADD]),
        (' <|python_tag|>{"name": "add", "parameters": {"a": 1}}', [ADD]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1}}', [ADD]),
        ("The answer is 42.", []),
        ('{"answer": 42}', []),
        ("", []),
        ("a tool_call is not made", []),
    ],
)
def test_calls_are_found_in_the_formats_of_qwen_and_llama(text: str, calls: list[Call]) -> None:
    assert find_calls(text) == calls


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"<tool_call>{BODY}", "</tool_call> is missing"),
        ("<tool_call>add(1)</tool_call>", "is not JSON"),
        ("<tool_call>[1]</tool_call>", "is not a JSON object"),
        ('<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
        ('<tool_call>{"name": "add"}</tool_call>', 'no "arguments"'),
        ('<tool_call>{"name": "add", "arguments": "1"}</tool_call>', 'no "arguments"'),
        ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "NaN is no number"),
        ("<tool_call>" + "[" * 50000 + "</tool_call>", "nested too deeply"),
        ("<tool_call>" + " " * 200000 + "</tool_call>", "at most 100000"),
        ('{"name": "add", "parameters": {"a": 1}', "is not JSON"),
        ("<tool_call></tool_call>", "is not JSON"),
    ],
)
def test_a_malformed_call_gets_an_error_as_its_answer(text: str, words: str) -> None:
    (call,) = find_calls(text)
    assert isinstance(call, BadCall) and words in call.words
    assert words in answer_call({}, call, 1000)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("6*7", "42"), ("(3+4)*5", "35"), ("2**10", "1024"), ("2^3", "8"), ("7/2", "3.5"), ("6/3", "2"),
        ("-7//2", "-4"), ("7%4", "3"), ("1e3", "1000"), ("10**400", "1" + "0" * 400),
    ],
)  # fmt: skip
def test_the_calculator_computes(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", "1+", "x", "__import__('os')", "9**9**9", "9**99999", "(-8)**0.5", "1/0", "'a'*9", "[1]*9",
        "1 if 1 else 2", "(" * 300 + "1" + ")" * 300, "1+" * 5000 + "1", "10**999*10**999", "2.0**9999",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_gets_an_error(expression: str) -> None:
    answer = answer_call({"calculator": calculator}, Call("calculator", {"expression": expression}), 300)
    assert answer.startswith("Error: ") and "\n" not in answer


def sample(text: str, count: int = 2, ratio: float | None = None, rows: list[str] | None = None) -> Any:
    """Do something.

    text: what to do
    """
    return [text, count, ratio, rows]


def test_the_schema_follows_from_docstring_and_types() -> None:
    assert schema_of("sample", sample)["function"] == {
        "name": "sample",
        "description": "Do something.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "what to do"},
                "count": {"type": "integer"},
                "ratio": {"type": "number"},
                "rows": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["text"],
        },
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "'text' is missing"),
        ({"text": 1}, "'text' must be of type string"),
        ({"text": "a", "count": "2"}, "'count' must be of type integer"),
        ({"text": "a", "count": True}, "'count' must be of type integer"),
        ({"text": "a", "ratio": "x"}, "'ratio' must be of type number"),
        ({"text": "a", "rows": {}}, "'rows' must be of type array"),
        ({"text": "a", "other": 1}, "there is no argument 'other'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], words: str) -> None:
    assert words in str(wrong_arguments(schema_of("sample", sample), arguments))
    assert words in answer_call({"sample": sample}, Call("sample", arguments), 1000)


def no_docstring(a: int) -> int:
    return a


def no_type(a) -> int:  # type: ignore[no-untyped-def]
    """Do it."""
    return 1


def strange_type(a: complex) -> int:
    """Do it."""
    return 1


def any_number(*a: int) -> int:
    """Do it."""
    return 1


@pytest.mark.parametrize("tool", [no_docstring, no_type, strange_type, any_number, print])
def test_a_function_that_says_too_little_is_refused(tool: Any) -> None:
    with pytest.raises(UserError):
        schema_of(tool.__name__, tool)


def boom() -> str:
    """Raise."""
    raise RuntimeError("two\nlines")


def surrogate() -> str:
    """Return half of a character."""
    return "\ud800"


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (Call("boom", {}), "Error: RuntimeError (two lines)"),
        (Call("nothing", {}), "Error: there is no tool 'nothing'; there are boom, sample, surrogate"),
        (Call("sample", {"text": "a" * 50}), '["aaaaaaaaaaaaaaaaaa… (49 more characters)'),
        (Call("surrogate", {}), "?"),
        (BadCall("so it is"), "Error: so it is"),
    ],
)
def test_an_answer_is_text_whatever_the_tool_does(call: Call | BadCall, answer: str) -> None:
    tools = {"boom": boom, "sample": sample, "surrogate": surrogate}
    longest = 20 if isinstance(call, Call) and call.name == "sample" else 1000
    assert answer_call(tools, call, longest) == answer


def test_lookup_finds_keys_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({"key": k, "value": v}) + "\n" for k, v in (("Paris", "F"), ("b", 2))))
    lookup = lookup_in(read_table(str(path)))
    assert [lookup(key) for key in ("paris", " PARIS ", "b", "c")] == [
        "F",
        "F",
        "2",
        "there is no such entry",
    ]


@pytest.mark.parametrize("line", ["[]", "{", '{"key": "a"}', '{"key": 1, "value": 2}', "1"])
def test_a_line_of_another_form_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text('{"key": "a", "value": "b"}\n' + line)
    with pytest.raises(UserError, match="line 2"):
        read_table(str(path))
