"""Which versions every Python gets: from `versions.toml`, setup.py, the Dockerfile and the Makefile alike."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

from opo_megatron.environment.versions import read_versions
from tests.support.paths import ROOT

MEGATRON = {"3.10": "0.16.1", "3.11": "0.16.1", "3.11.7": "0.16.1", "3.12": "0.19.2", "3.12.1": "0.19.2"}
RUNNING = "{}.{}".format(*sys.version_info[:2])


@pytest.mark.parametrize("python", [*MEGATRON, "3.13"])
def test_the_set_has_one_megatron_core_for_every_python(python: str) -> None:
    part = read_versions(python=python).part("megatron-core")
    assert part.version == MEGATRON.get(python, "0.19.2") and part.needed == "always"


def test_without_a_python_the_set_is_that_of_this_one() -> None:
    assert read_versions() == read_versions(python=RUNNING)


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """The arguments of setup.py."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", found.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("name", ["megatron-core", "torch", "numpy", "transformer-engine"])
def test_pip_takes_the_versions_of_the_set(arguments: dict[str, Any], python: str, name: str) -> None:
    extra = arguments["extras_require"]["te"]
    requirements = [Requirement(text) for text in [*arguments["install_requires"], *extra]]
    environment = {"python_version": python}
    chosen = [
        one
        for one in requirements
        if one.name == name and (one.marker is None or one.marker.evaluate(environment))
    ]
    part = read_versions(python=python).part(name)
    assert len(chosen) == 1 and part.version is not None and chosen[0].specifier.contains(part.version)


def test_the_image_has_the_default_python() -> None:
    default = read_versions().default_python
    text = re.sub(r"(?m)^#.*", "", (ROOT / "Dockerfile").read_text())
    assert set(re.findall(r"python(3\.\d+)", text)) == {default}


def environment_of(folder: Path, *variables: str) -> str:
    """The environment that the Makefile uses in a folder, with these variables."""
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "--eval", "which: ; @echo $(VENV)", "which"]
    result = subprocess.run([*command, *variables], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("has", "variables", "environment"),
    [
        (None, (), ".venv"),
        ("3.9", (), ".venv"),
        (None, (f"PYTHON={sys.executable}",), ".venv"),
        (RUNNING, (f"PYTHON={sys.executable}",), ".venv"),
        ("3.9", (f"PYTHON={sys.executable}",), f".venv-{RUNNING}"),
        ("3.9", (f"PYTHON={sys.executable}", "VENV=other"), "other"),
    ],
)
def test_an_environment_keeps_its_python(
    tmp_path: Path, has: str | None, variables: tuple[str, ...], environment: str
) -> None:
    if has is not None:
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv/pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {has}.4\n")
    assert environment_of(tmp_path, *variables) == environment
