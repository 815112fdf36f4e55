"""Prompts that are lists of messages: `[{"role": "user", "content": "…"}]`.

Only what every chat template renders is accepted: a system message at the start, then users and assistants,
and a user at the end.  A template may leave out other roles without an error.  Further fields of a message go
to the template as they are.
"""

from __future__ import annotations

import json
from typing import Any

from opo_megatron.tasks.fields import RowError, can_be_encoded, describe, scalar_text
from opo_megatron.tasks.rows import parse_json

ROLES = ("system", "user", "assistant")
Messages = list[dict[str, Any]]
"""Each with the texts `role` and `content`."""


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def find_messages(place: str, field: str, value: Any) -> Messages | None:
    """The messages of a prompt that is a list of them, or the JSON text of one; None for another value.

    Raises:
        RowError: for a list that does not lead to a response, with the message and what is wrong.
    """
    entries = _entries(value)
    if entries is None:
        return None
    where = f"{place}: {field}"
    messages = [_checked(where, number, entry) for number, entry in enumerate(entries, 1)]
    if "system" in [one["role"] for one in messages[1:]]:
        raise RowError(f"{where} has a system message after the first message; put it first")
    if messages[-1]["role"] != "user":
        raise RowError(
            f"{where} ends with a message of the {messages[-1]['role']}, but the policy responds to a user; "
            "remove that message, or the row"
        )
    return messages


def text_of_messages(messages: Messages) -> str:
    """One user message's own text; several messages with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def _entries(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.lstrip().startswith("[") and '"role"' in value:
        try:
            value = parse_json(value)
        except json.JSONDecodeError:
            return None
    is_list = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return value if is_list else None


def _checked(where: str, number: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys():
        raise RowError(
            f"{where}, message {number} is {describe(entry)}, without role and content; write it like "
            '{"role": "user", "content": "…"}'
        )
    role, content = entry["role"], _content(where, number, entry["content"])
    if role not in ROLES:
        raise RowError(f"{where}, message {number} has the role {role!r}; use {', '.join(ROLES)}")
    # An empty system message is how one overrides a template's default.
    if role != "system" and not content.strip():
        raise RowError(f"{where}, message {number} is empty; fix or remove the row")
    further = {name: value for name, value in entry.items() if value is not None}
    return {**further, "role": role, "content": content}


def _content(where: str, number: int, content: Any) -> str:
    """A message's text, which may come in parts."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        value = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        text = scalar_text(value)
        if text is None or not can_be_encoded(text):
            kind = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else describe(part)
            raise RowError(f"{where}, message {number} has {kind}, not text; fix or remove the row")
        texts.append(text)
    return "".join(texts)
