"""The values of a recipe file and of `key=value`, one by one, each with its full key.

A key of type text holds the text as it is written: YAML would make 83 of 0123, false of `no` and nothing of
what follows a `#`.  In a file YAML's own syntax applies (quotes, comments, `null`), but no conversion; on the
command line the text begins after the `=` and ends with the argument.  All other keys are parsed as YAML.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opo_megatron.config.keys import inner_type, key_types, may_be_null, unknown
from opo_megatron.errors import UserError

MERGED = "policy.megatron"
"""A mapping that is merged key by key over the bases of a recipe, like a section; others are replaced."""
SERVER_OPTIONS = "rollout.sglang.options"
"""A mapping whose keys have `-` or `_`, as one likes; stored with `_`."""
_NULLS = ("null", "Null", "NULL", "~")
_MISREAD = re.compile(r"[-+]?(0[0-7_]*[1-7][0-7_]*|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")
"""Numbers that YAML reads in base 8 or 60."""


class Entry(NamedTuple):
    """One value of a recipe or override, and its file ('' for the command line)."""

    key: str
    value: Any
    file: str


class _WrittenLoader(yaml.SafeLoader):
    """Loads every plain scalar but null as the text that is written."""


_WrittenLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


# ---------------------------------------------------------------------- files


def recipe_entries(path: Path, children: tuple[Path, ...] = ()) -> Iterator[Entry]:
    """The entries of a recipe after those of its bases; `children` are the recipes based on it."""
    if path.resolve() in [child.resolve() for child in children]:
        chain = " → ".join(str(step) for step in (*children, path))
        raise UserError(f"base: {chain} is a cycle; remove one of these `base:` lines")
    content, written = _read(path, child=children[-1] if children else None)
    base = content.pop("base", None)
    if base is not None:
        if not isinstance(written["base"], str):
            raise UserError(f"base is {base!r} in {path}; it must be the path of one recipe")
        yield from recipe_entries(path.parent / written["base"], (*children, path))
    yield from _flatten(content, written, "", str(path))


def _read(path: Path, child: Path | None) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """A file's values as YAML reads them, and as they are written."""
    name = f"recipe '{path}'" + (f", the base of '{child}'," if child else "")
    try:
        text = path.read_text(encoding="utf-8")
        # OmegaConf's loader reads 1e-4 as a number (YAML 1.1: text), and rejects repeated keys.
        content = OmegaConf.load(io.StringIO(text))
    except FileNotFoundError:
        hint = "the recipe comes before key=value" if "=" in path.name else "check the path"
        raise UserError(f"{name} does not exist; {hint}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name} is not valid YAML{line}: {problem}; fix that line") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; give a YAML file") from None
    except OSError as error:
        # OmegaConf raises OSError, without errno, if the whole file is one number.
        reason = f"cannot be read ({error.strerror})" if error.strerror else "is not a mapping"
        raise UserError(f"{name} {reason}; give a YAML file of `section:` blocks") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{name} has an interpolation that cannot be read: {error.msg}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{name} is a list, not a mapping; write `section:` blocks of `key: value`")
    values = cast(dict[Any, Any], OmegaConf.to_container(content, resolve=False))
    return values, yaml.load(text, _WrittenLoader) or {}


# ---------------------------------------------------------------------- the command line


def override_entries(overrides: Sequence[str]) -> Iterator[Entry]:
    """The entries of `key=value` arguments.

    Raises:
        UserError: for an argument that is none, or whose value cannot be read.
    """
    spellings: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}' is not key=value; write it like train.steps=10")
        if any("\ud800" <= character <= "\udfff" for character in override):
            raise UserError(f"override '{override}' is not UTF-8 text; convert it, or write it in a recipe")
        if key.startswith(SERVER_OPTIONS + "."):
            option = key.removeprefix(SERVER_OPTIONS + ".").partition(".")[0]
            _check_spelling(option, spellings, "")
        if inner_type(key_types().get(key)) is str:
            yield Entry(key, _as_it_stands(key, text), "")
        else:
            yield from _flatten({key: _parse(override, text)}, {key: yaml.load(text, _WrittenLoader)}, "", "")


def _as_it_stands(key: str, text: str) -> str | None:
    """The text, but null where that is allowed; there "null" in quotes is the word."""
    if not may_be_null(key_types()[key]):
        return text
    return {"null": None, '"null"': "null", "'null'": "null"}.get(text, text)


def _parse(override: str, text: str) -> Any:
    """The value that YAML reads.

    Raises:
        UserError: where it is not YAML, or nothing at all, which is not what `null` says.
    """
    try:
        container = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"override '{override}' has a value that is not valid YAML; quote it") from None
    value = cast(dict[str, Any], container)["value"]
    if value is None and text.strip() not in _NULLS and not _is_section(override.partition("=")[0]):
        null = ", or null for none" if may_be_null(key_types().get(override.partition("=")[0])) else ""
        raise UserError(f"override '{override}' has no value; write one after the ={null}")
    return value


# ---------------------------------------------------------------------- keys and values


def _flatten(content: dict[Any, Any], written: dict[Any, Any], prefix: str, file: str) -> Iterator[Entry]:
    """Leaves of nested sections; raises for keys that are not in the schema."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        hint = key_types().get(key)
        if hint is None and (owner := _mapping_of(key)) is None:
            raise UserError(unknown(key, key_types()) + location(file))
        if hint is None:
            inside = key.removeprefix(f"{owner}.")
            yield Entry(f"{owner}.{_canonical(inside) if owner == SERVER_OPTIONS else inside}", value, file)
        elif not _is_section(key):
            yield Entry(key, _value(key, value, written.get(name), file), file)
        elif isinstance(value, dict) and (value or file):
            yield from _flatten(value, written[name], key + ".", file)
        elif value is not None or not file:  # in a file, a section without entries is null
            shown = "empty" if value is None or value == {} else repr(value)
            raise UserError(
                f"{key} is {shown}, but it is a section; set one of its keys, like "
                f"{_first_key(key)}{location(file)}"
            )


def _value(key: str, value: Any, written: Any, file: str) -> Any:
    """The value of a key: as it is written where the key takes text, else as YAML reads it."""
    hint = inner_type(key_types()[key])
    if hint is str or (isinstance(hint, type) and issubclass(hint, Enum)) or get_args(hint) == (str,):
        return written
    if key == SERVER_OPTIONS and isinstance(value, dict):
        spellings: dict[str, str] = {}
        for name in value:
            _check_spelling(str(name), spellings, file)
        return {_canonical(str(name)): option for name, option in value.items()}
    if hint in (int, float) or get_origin(hint) is list:
        _check_number(key, value, written, file)
    return value


def _check_number(key: str, value: Any, written: Any, file: str) -> None:
    """Refuse 010, which YAML reads as 8, and 1:30, which it reads as 90."""
    pairs: Iterable[tuple[Any, Any]] = [(value, written)]
    if isinstance(value, list) and isinstance(written, list):
        pairs = zip(value, written, strict=True)
    for number, text in pairs:
        if isinstance(number, int | float) and isinstance(text, str) and _MISREAD.fullmatch(text):
            raise UserError(
                f"{key} is {text}, which YAML reads as {number}; write it as a decimal number{location(file)}"
            )


def _check_spelling(name: str, spellings: dict[str, str], file: str) -> None:
    """Refuse an option of the server that one file or command line has in two spellings."""
    other = spellings.setdefault(_canonical(name), name)
    if other != name:
        raise UserError(
            f"{SERVER_OPTIONS} has both {other} and {name}, which are one option; remove one{location(file)}"
        )


def _canonical(option: str) -> str:
    """The name of a server's option as it is stored; what follows a dot is a key of its own value."""
    name, dot, rest = option.partition(".")
    return name.replace("-", "_") + dot + rest


def _mapping_of(key: str) -> str | None:
    """The mapping without a schema that a key belongs to; None where there is none."""
    owners = [known for known, hint in key_types().items() if get_origin(hint) is dict]
    return next((owner for owner in owners if re.fullmatch(rf"{owner}(\.[\w-]+)+", key)), None)


def _is_section(key: str) -> bool:
    return key == MERGED or any(known.startswith(key + ".") for known in key_types())


def _first_key(section: str) -> str:
    if section == MERGED:
        return f"{MERGED}.FIELD"
    return f"{section}.{fields(key_types()[section])[0].name}"


def location(file: str) -> str:
    """The file as the end of a sentence; nothing for the command line."""
    return f" (in {file})" if file else ""
