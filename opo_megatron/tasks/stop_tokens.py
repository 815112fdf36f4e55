"""The tokens at which a response ends: every one that a model's folder names, in this order.

    generation_config.json   eos_token_id: what the model's authors generate with
    config.json              eos_token_id, at the top and in text_config
    the tokenizer            its eos_token

They differ in published models: the one of a chat's turn is often in only one of the three, and a model that
ends its turns with a token that nobody looks for never ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Task

KEY = "eos_token_id"
PLACES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("generation_config.json", ()),
    ("config.json", ()),
    ("config.json", ("text_config",)),
)
"""Files and the section of each that may name stop tokens, the first one first."""


def find_stop_tokens(folder: Path, of_tokenizer: int | None, size: int) -> tuple[int, ...]:
    """All stop tokens of a model's folder, each once.

    Args:
        of_tokenizer: the id of the tokenizer's eos_token, if it has one.
        size: number of ids of the tokenizer.

    Raises:
        UserError: for a value that is no token, and where there is no stop token at all.
    """
    named = [token for file, section in PLACES for token in _tokens_in(folder / file, section, size)]
    if of_tokenizer is not None:
        named.append(of_tokenizer)
    if not named:
        raise UserError(
            f"the tokenizer in {folder} has no stop token, so responses would not end; set its eos_token"
        )
    return tuple(dict.fromkeys(named))


def _tokens_in(path: Path, section: tuple[str, ...], size: int) -> Iterator[int]:
    if not path.exists():
        return
    content: Any = _read(path)
    for name in (*section, KEY):
        content = content.get(name) if isinstance(content, dict) else None
    key, value = ".".join((*section, KEY)), content
    if value is None:  # how these files write that there is none
        return
    for token in value if isinstance(value, list) else [value]:
        if type(token) is not int or token < 0:  # a bool is an int
            raise UserError(
                f"{path} has {key}={json.dumps(value)}, and {json.dumps(token)} is not the id of a token; "
                "write whole numbers, 0 or more"
            )
        if token >= size:
            raise UserError(
                f"{path} has {key}={json.dumps(value)}, but {token} is beyond the tokenizer's vocabulary of "
                f"{size:,} tokens; correct it there, or name another folder in task.tokenizer"
            )
        yield token


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reason = "is not a JSON object"
    except ValueError as error:  # of JSON, or of UTF-8
        content, reason = None, f"is not JSON ({error})"
    if not isinstance(content, dict):
        raise UserError(f"{path} may name stop tokens, but {reason}; copy it from the model again")
    return content


def check_stop_tokens(tokens: Sequence[int], rows: int) -> None:
    """
    Args:
        rows: of the policy's embedding.

    Raises:
        UserError: where the task stops at a token that the policy cannot generate.
    """
    for token in tokens:
        if token >= rows:
            raise UserError(
                f"the task's stop token {token} is beyond the policy's vocabulary of {rows:,} tokens; set "
                "task.tokenizer to the folder of the model's own tokenizer"
            )


def how_responses_end(task: Task) -> str:
    """A line for the log."""
    if not task.stop_tokens:
        return "no token ends a response; it has rollout.max_response_tokens"
    return f"a response ends at {with_texts(task, task.stop_tokens)}"


def with_texts(task: Task, tokens: Sequence[int]) -> str:
    """Ids with their texts, to be read by a person: `128009 '<|eot_id|>', …`."""
    return ", ".join(f"{token} {task.raw_text([token])!r}" for token in tokens)
