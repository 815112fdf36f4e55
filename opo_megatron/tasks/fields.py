"""Fields of a row, as text: a field by its path, numbers in plain digits, empty cells refused.

A number's text reads back as the same number and has no exponent: 1e22 is 10000000000000000000000, and the 8
of a column that also holds 2.5 is 8, not 8.0.  Numbers of JSON and decimals of Parquet keep their digits.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np

from opo_megatron.errors import UserError
from opo_megatron.tasks.rows import parse_json

MAX_DIGITS = 1000
"""Digits of a number before or after the decimal point; 1e999999999 would fill the memory."""


class RowError(UserError):
    """A row that gives no problem; the message names file, row and field."""


def find_field(place: str, row: Any, field: str, key: str) -> Any:
    """The value of a field, or of a path such as `reward_model.ground_truth` or `answers.0`.

    A name that the row has wins over a path.  A step into a text reads it as JSON.

    Args:
        place: file and row, for the error.
        key: the setting that names the field, for the error.

    Raises:
        RowError: naming where the path ended.
    """
    if not isinstance(row, dict):
        raise RowError(f"{place} has no field {field!r} (it has a {type(row).__name__}); set {key}")
    found: Any = row
    passed: list[str] = []
    steps = field.split(".")
    while steps:
        found = _opened(found)
        count = next((n for n in range(len(steps), 0, -1) if _has(found, ".".join(steps[:n]))), 0)
        if not count:
            content = f"{'.'.join(passed)} is {describe(found)}" if passed else f"it has {', '.join(row)}"
            raise RowError(f"{place} has no field {field!r} ({content}); set {key}")
        name, passed, steps = ".".join(steps[:count]), passed + steps[:count], steps[count:]
        found = found[name] if isinstance(found, dict) else found[int(name)]
    return found


def _opened(value: Any) -> Any:
    """The list or mapping that a text holds as JSON; any other value itself."""
    if not isinstance(value, str):
        return value
    try:
        content = parse_json(value)
    except json.JSONDecodeError:
        return value
    return content if isinstance(content, list | dict) else value


def _has(value: Any, name: str) -> bool:
    if isinstance(value, list):
        return name.isascii() and name.isdecimal() and int(name) < len(value)
    return isinstance(value, dict) and name in value


def field_text(place: str, row: Any, field: str, key: str) -> str:
    """The text of a field.

    Raises:
        RowError: for a missing field, an empty cell, and a value that is not text or a finite number.
    """
    return text_of(place, field, find_field(place, row, field, key), key)


def text_of(place: str, field: str, value: Any, key: str) -> str:
    """The text of a value found in `field`; raises as `field_text`."""
    text = scalar_text(value)
    if text is not None and text.strip() and can_be_encoded(text):
        return text
    remedy = "fix or remove the row"
    if isinstance(value, dict | list) and value:
        first = next(iter(value)) if isinstance(value, dict) else 0
        remedy = f"name one of its entries, like {key}={field}.{first}"
    raise RowError(f"{place}: {field} is {describe(value)}, not text; {remedy}")


def scalar_text(value: Any) -> str | None:
    """A text itself, a number in plain digits; None for null, NaN, infinities, booleans and all else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        digits = value.is_finite() and max(value.adjusted(), -int(value.as_tuple().exponent)) <= MAX_DIGITS
        return format(value, "f") if digits else None
    if isinstance(value, float | np.floating):
        return np.format_float_positional(value, trim="-") if math.isfinite(value) else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def describe(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, dict):
        return f"a mapping with {', '.join(map(str, value))}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str) and not value.strip():
        return "white space alone" if value else "empty"
    return ascii(value)[:60] if isinstance(value, str) else str(value)[:60]


def can_be_encoded(text: str) -> bool:
    """False for text with half of a UTF-16 surrogate pair, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
