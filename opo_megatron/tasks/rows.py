"""Rows of a data set, each a mapping of fields: from a JSONL or Parquet file, or from the Hugging Face hub.

`hub:owner/name[:config][:split]` is read by the library `datasets`, which downloads and caches it; owner/name
may also be a local folder.  The default split is `train`.  A single part after the name is the split if it is
train, test or validation, or a slice such as test[:100], else the configuration.

A number keeps its value: one of JSON is the `Decimal` of its digits, and one of a 32-bit column stays one of
32 bits, whose shortest text differs from that of the 64-bit number with the same value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from opo_megatron.errors import UserError
from opo_megatron.tasks.file_formats import check_format
from opo_megatron.utils.extras import require_extra
from opo_megatron.utils.start_folder import to_open

HUB = "hub:"
BYTE_ORDER_MARK = "\ufeff"
_BATCH = 1000
"""Rows of a table that are turned into Python objects at once."""
_SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")


def read_rows(source: str) -> Iterable[tuple[int, Any]]:
    """(number from 1, row) of a file or a data set of the hub.

    Raises:
        UserError: for a source that cannot be read, with the reason.
    """
    return _hub_rows(source) if source.startswith(HUB) else _file_rows(to_open(source))


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of `hub:…`."""
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))
    if not name or len(rest) > 2:
        raise UserError(f"{source} is not a data set of the hub; write it like hub:owner/name:config:split")
    if len(rest) == 1 and _SPLIT.fullmatch(rest[0]):
        rest = ["", rest[0]]
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or "train"


def parse_json(text: str) -> Any:
    """JSON whose numbers are Decimals, digit by digit as written."""
    try:
        return json.loads(text, parse_float=_decimal, parse_int=_decimal)
    except RecursionError:
        raise json.JSONDecodeError("its brackets are nested too deep", text, 0) from None


def _decimal(digits: str) -> Decimal | float:
    try:
        return Decimal(digits)
    except InvalidOperation:  # an exponent of twenty digits
        return float(digits)


def _hub_rows(source: str) -> Iterable[tuple[int, Any]]:
    name, config, split = parse_hub(source)
    datasets = require_extra("datasets", f"reading {source}", "data")
    try:
        tables = datasets.load_dataset(name, config, split=split).with_format("arrow").iter(_BATCH)
    except Exception as error:  # network, names and files each raise their own types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{source} cannot be read as data set {name}, configuration {config or 'default'}, split {split} "
            f"({reason}); check its name, or give a file"
        ) from error
    return enumerate(_table_rows(tables), 1)


def _file_rows(path: Path) -> Iterable[tuple[int, Any]]:
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"the data file {path} {problem}; check task.data and task.held_out_data")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    check_format(path, start)
    if path.suffix.lower() == ".parquet":
        return enumerate(_parquet_rows(path), 1)
    is_list = start.decode("utf-8", errors="replace").lstrip(BYTE_ORDER_MARK + " \t\r\n").startswith("[")
    if path.suffix.lower() == ".json":
        return _json_list(path) if is_list else _json_rows(path)
    if is_list:
        raise UserError(f"{path} is one JSON list, not a row per line; name it {path.with_suffix('.json')}")
    return _json_rows(path)


def _parquet_rows(path: Path) -> Iterator[Any]:
    parquet = require_extra("pyarrow.parquet", f"reading {path}", "data")
    try:
        yield from _table_rows(parquet.ParquetFile(path).iter_batches(_BATCH))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a readable Parquet file ({reason}); write it again") from None


def _table_rows(tables: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of tables or record batches of pyarrow."""
    for table in tables:
        fixes = [(field.name, fix) for field in table.schema if (fix := _restorer(field.type)) is not None]
        for row in table.to_pylist():
            yield {**row, **{name: fix(row[name]) for name, fix in fixes}}


def _restorer(kind: Any) -> Callable[[Any], Any] | None:
    """What makes 32-bit and 16-bit floats of the 64-bit ones that Python has; None where there are none."""
    from pyarrow import types

    if types.is_float32(kind) or types.is_float16(kind):
        number = kind.to_pandas_dtype()
        return lambda value: None if value is None else number(value)
    if types.is_struct(kind):
        members = [kind.field(index) for index in range(kind.num_fields)]
        fixes = [(member.name, fix) for member in members if (fix := _restorer(member.type)) is not None]
        if fixes:
            return lambda value: value and {**value, **{name: fix(value[name]) for name, fix in fixes}}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        entry = _restorer(kind.value_type)
        if entry is not None:
            return lambda value: value and [entry(one) for one in value]
    return None


def _json_list(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        return enumerate(parse_json(path.read_text(encoding="utf-8-sig")), 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno} is not JSON ({error.msg}); fix it") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                # Files that were joined have a mark in the middle, too.
                text = line.removeprefix(BYTE_ORDER_MARK).strip()
                if text:
                    yield number, parse_json(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
    except json.JSONDecodeError as error:
        raise _not_a_row(path, number, error) from None


def _not_a_row(path: Path, number: int, error: json.JSONDecodeError) -> UserError:
    """The error of a line that is no JSON, by what the file is instead."""
    if error.doc.startswith(("{", "[")) and number == 1:
        try:
            whole = parse_json(path.read_text(encoding="utf-8-sig"))
        except ValueError:
            if error.doc in ("{", "["):
                return UserError(
                    f"{path} has JSON objects of several lines; write one object per line, or one list of "
                    "objects into a .json file"
                )
        else:
            names = ", ".join(whole)
            return UserError(
                f"{path} is one JSON object (with {names}), not a list of rows; write its rows as one list "
                "into a .json file"
            )
    return UserError(f"{path}, line {number} is not JSON ({error.msg}); fix or remove it")
