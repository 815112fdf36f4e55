"""The keys of a recipe with their types, and the nearest key to a misspelling."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from opo_megatron.config.schema import Config

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@lru_cache(maxsize=1)
def key_types() -> dict[str, Any]:
    """Full key ('rollout.top_p') → type; a section's type is its dataclass."""
    return dict(_walk(Config, ""))


def _walk(section: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    hints = get_type_hints(section)
    for field in fields(section):
        key, hint = prefix + field.name, hints[field.name]
        yield key, hint
        if is_dataclass(hint):
            yield from _walk(hint, key + ".")


def may_be_null(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def inner_type(hint: Any) -> Any:
    """The type without `| None`."""
    if not may_be_null(hint):
        return hint
    return next(argument for argument in get_args(hint) if argument is not type(None))


def describe_type(hint: Any) -> str:
    """The type as text: 'an integer', 'one of opo, rloo', 'a number or null'."""
    if may_be_null(hint):
        return describe_type(inner_type(hint)) + " or null"
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(choice.value for choice in hint)
    if origin is list:
        return f"a list, each entry {describe_type(arguments[0])}"
    return _WORDS.get(hint, "a mapping")


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The key that was probably meant: one with the same last part, else the most similar."""
    candidates = list(keys)
    leaf = key.rpartition(".")[2]
    misplaced = [candidate for candidate in candidates if candidate.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(key, misplaced or candidates, n=1, cutoff=0.0 if misplaced else 0.6)
    return close[0] if close else None


def unknown(key: str, keys: Iterable[str]) -> str:
    """The error message for a key that does not exist."""
    guess = nearest(key, keys)
    remedy = f"did you mean '{guess}'?" if guess else "`opo config RECIPE` prints every key"
    return f"unknown key '{key}'; {remedy}"
