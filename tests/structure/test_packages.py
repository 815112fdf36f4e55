"""Structure of the package: imports between its subpackages, file lengths, and what tests may import."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "opo_megatron"
TOP = {"__init__", "__main__", "train", "run", "build", "errors"}
"""Modules outside of subpackages."""
LONGEST_FILE, LONGEST_NAME = 500, 70
WITHOUT_TORCH = (
    "config",
    "algorithm/config.py",
    "algorithm/presets.py",
    "algorithm/objectives/table.py",
    "errors.py",
)


def modules(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported module, including those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            if node.module == "opo_megatron":
                yield from (f"opo_megatron.{alias.name}" for alias in node.names)
            else:
                yield node.module


def package_of(module: str) -> str:
    """The subpackage of `opo_megatron.SUBPACKAGE.…`, or the top-level module itself."""
    return module.split(".")[1] if "." in module else "__init__"


def package_imports() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = defaultdict(set)
    for path, tree in modules(PACKAGE):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(tree):
            if module.startswith("opo_megatron") and package_of(module) not in (
                own,
                "__version__",
                "__init__",
            ):
                graph[own].add(package_of(module))
    return graph


def test_subpackages_import_each_other_without_cycles() -> None:
    graph = package_imports()
    assert {"train", "policy", "rollout", "config"} <= set(graph)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other in a cycle: {' → '.join(error.args[1])}")


def test_only_listed_modules_are_outside_of_subpackages() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP


def test_algorithm_imports_only_torch_and_errors() -> None:
    allowed = {"torch", "opo_megatron.errors", "opo_megatron.algorithm"}
    standard = {
        "__future__",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "itertools",
        "math",
        "typing",
    }
    for path, tree in modules(PACKAGE / "algorithm"):
        for module in imports(tree):
            is_allowed = module.split(".")[0] in standard or module in allowed
            is_allowed |= module.startswith(("torch.", "opo_megatron.algorithm."))
            assert is_allowed, f"{path.name} imports {module}"


@pytest.mark.parametrize("location", WITHOUT_TORCH)
def test_configuration_imports_no_torch(location: str) -> None:
    paths = [PACKAGE / location] if location.endswith(".py") else sorted((PACKAGE / location).rglob("*.py"))
    for path in paths:
        packages = {module.split(".")[0] for module in imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not {"torch", "megatron"} & packages, path


@pytest.mark.parametrize(
    "folder", [".", "docs", "opo_megatron", "recipes", "requirements", "slurm", "tests", "tools"]
)
def test_no_file_has_marks_of_a_merge(folder: str) -> None:
    paths = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
    for path in paths:
        if path.is_file() and "__pycache__" not in path.parts:
            assert not re.search(rb"(?m)^(<{7}|>{7}) ", path.read_bytes()), path


def test_a_file_is_at_most_500_lines() -> None:
    for folder in ("opo_megatron", "tools", "tests"):
        for path, _ in modules(ROOT / folder):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines"


def test_tests_import_no_test_and_do_not_change_sys_path() -> None:
    for path, tree in modules(ROOT / "tests"):
        for module in imports(tree):
            assert not module.split(".")[-1].startswith("test_"), f"{path} imports {module}"
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"sys.path.insert", "sys.path.append"} & set(calls), path


def test_names_of_tests_are_short_and_state_a_law() -> None:
    for path, tree in modules(ROOT / "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name) <= LONGEST_NAME, f"{path.name}: {node.name} ({len(node.name)})"


def test_folders_of_tests_mirror_the_package() -> None:
    subpackages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    others = {"data", "docs", "slurm", "structure", "support", "tools"}
    folders = {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders <= subpackages | others
