"""Rows of a data set, each a mapping of fields: from a JSONL or Parquet file, or from the Hugging Face hub.

`hub:owner/name[:config][:split]` is read by the library `datasets`, which downloads and caches it; owner/name
may also be a local folder.  The default split is `train`.  A single part after the name is the split if it is
train, test or validation, or a slice such as test[:100], else the configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opo_megatron.errors import UserError
from opo_megatron.utils.extras import require_extra

HUB = "hub:"
_SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")


def read_rows(source: str) -> Iterable[tuple[int, Any]]:
    """(number from 1, row) of a file or a data set of the hub.

    Raises:
        UserError: for a source that cannot be read, with the reason.
    """
    return _hub_rows(source) if source.startswith(HUB) else _file_rows(Path(source))


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of `hub:…`."""
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))
    if not name or len(rest) > 2:
        raise UserError(f"{source} is not a data set of the hub; write it like hub:owner/name:config:split")
    if len(rest) == 1 and _SPLIT.fullmatch(rest[0]):
        rest = ["", rest[0]]
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or "train"


def _hub_rows(source: str) -> Iterable[tuple[int, Any]]:
    name, config, split = parse_hub(source)
    datasets = require_extra("datasets", f"reading {source}", "data")
    try:
        return enumerate(datasets.load_dataset(name, config, split=split), 1)
    except Exception as error:  # network, names and files each raise their own types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{source} cannot be read as data set {name}, configuration {config or 'default'}, split {split} "
            f"({reason}); check its name, or give a file"
        ) from error


def _file_rows(path: Path) -> Iterable[tuple[int, Any]]:
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"the data file {path} {problem}; check task.data and task.held_out_data")
    if path.suffix == ".parquet":
        parquet = require_extra("pyarrow.parquet", f"reading {path}", "data")
        try:
            return enumerate(parquet.read_table(path).to_pylist(), 1)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable Parquet file ({error}); write it again") from None
    if path.suffix in (".jsonl", ".json"):
        return _json_list(path) if _is_list(path) else _json_rows(path)
    raise UserError(f"{path} is neither .jsonl nor .parquet; convert it to one of them")


def _is_list(path: Path) -> bool:
    """Whether a .json file is one list of rows, not a row per line."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


def _json_list(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        return enumerate(json.loads(path.read_text(encoding="utf-8")), 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno} is not JSON ({error.msg}); fix it") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is not JSON ({error.msg}); fix or remove it") from None
