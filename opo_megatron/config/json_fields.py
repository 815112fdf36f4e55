"""A JSON file of somebody else's, such as a model's `config.json`, read field by field with its type.

A field that is missing takes its default, if it has one.  `null` is a value like any other, and refused,
unless transformers gives it a meaning; then the caller says so with `null=True`, and it is read as missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opo_megatron.errors import UserError

_REQUIRED = object()


class JsonFields:
    """An object in a JSON file; every error names the file, the field and its value."""

    def __init__(self, raw: dict[str, Any], path: Path, prefix: str = "") -> None:
        """Args:
        prefix: the field that holds this object, with a dot; nothing for the file's own.
        """
        self.raw, self.path, self._prefix = raw, path, prefix

    def __contains__(self, name: str) -> bool:
        return name in self.raw

    def integer(self, name: str, default: Any = _REQUIRED, null: bool = False) -> int:
        """A positive integer."""
        return int(self._read(name, default, null, _is_positive_integer, "a positive integer"))

    def number(self, name: str, default: Any = _REQUIRED, null: bool = False, or_zero: bool = False) -> float:
        """A positive, finite number."""
        what = "a number of 0 or more" if or_zero else "a positive number"
        return float(
            self._read(name, default, null, lambda value: _is_number(value) and (value > 0 or or_zero), what)
        )

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        return bool(self._read(name, default, False, lambda value: isinstance(value, bool), "true or false"))

    def text(self, name: str, default: Any = _REQUIRED, null: bool = False) -> str:
        return str(self._read(name, default, null, lambda value: isinstance(value, str), "a text"))

    def optional_text(self, name: str) -> str | None:
        """A text; None where it is missing or null."""
        return None if self.raw.get(name) is None else self.text(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is missing or null."""
        return list(self._read(name, [], True, _is_list_of_texts, "a list of texts"))

    def mapping(self, name: str) -> JsonFields:
        """An object; empty where it is missing or null."""
        raw = self._read(name, {}, True, lambda value: isinstance(value, dict), "a mapping")
        return JsonFields(raw, self.path, f"{self._prefix}{name}.")

    def _read(self, name: str, default: Any, null: bool, is_valid: Callable[[Any], bool], what: str) -> Any:
        field = self._prefix + name
        if name not in self.raw or (null and self.raw[name] is None):
            if default is _REQUIRED:
                raise UserError(f"{self.path} has no {field}; download it again, or add the field")
            return default
        value = self.raw[name]
        if not is_valid(value):
            raise UserError(
                f"{self.path} has {field}={_shown(value)}, which is not {what}; download it again, or "
                "correct the field"
            )
        return value


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file with an object, UTF-8 with or without a byte order mark.

    Raises:
        UserError: for a file that is missing, unreadable or something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({reason}); download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object but {_shown(raw)}; download it again")
    return raw


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max  # not NaN


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _shown(value: Any) -> str:
    """A value as the file has it, at most a line long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
