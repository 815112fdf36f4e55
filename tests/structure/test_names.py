"""One word per thing: private names that were replaced by the field's do not come back."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TABLE = Path(__file__).with_name("names.toml")


def entries() -> list[tuple[str, str, str]]:
    """(old name, new name, where) of every entry."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))["gone"]
    return [(old, new, where) for where, names in table.items() for old, new in names.items()]


def identifiers(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword):
            names.add(node.arg or "")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.split(".")[-1])
    return names


def files(where: str) -> list[Path]:
    """The Python files of comma-separated files and folders."""
    paths = [ROOT / place.strip() for place in where.split(",")]
    assert all(path.exists() for path in paths), where
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


@pytest.mark.parametrize("where", sorted({where for _, _, where in entries()}))
def test_replaced_names_are_no_identifiers(where: str) -> None:
    kept = tomllib.loads(TABLE.read_text(encoding="utf-8"))["kept"]
    old_names = {old: new for old, new, place in entries() if place == where}
    for path in files(where):
        name = path.relative_to(ROOT).as_posix()
        names = identifiers(ast.parse(path.read_text(encoding="utf-8"))) | {path.stem, path.name}
        for old in sorted(names & set(old_names) - set(kept.get(name, {}))):
            pytest.fail(f"{name} has {old!r}; the word is {old_names[old]!r}")


def test_every_kept_name_has_a_reason_and_exists() -> None:
    for name, reasons in tomllib.loads(TABLE.read_text(encoding="utf-8"))["kept"].items():
        names = identifiers(ast.parse((ROOT / name).read_text(encoding="utf-8")))
        for kept, reason in reasons.items():
            assert len(reason) > 10 and kept in names, f"{name}: {kept}"
