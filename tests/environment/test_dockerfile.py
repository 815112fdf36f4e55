"""The Dockerfile passes hadolint and uses the versions of `versions.toml`."""

from __future__ import annotations

import re
import subprocess
import sys

from opo_megatron.environment.versions import constraints, read_versions
from tests.support.paths import ROOT
from tests.support.requirements import program

TEXT = (ROOT / "Dockerfile").read_text()
VERSIONS = read_versions()


def test_hadolint_reports_nothing() -> None:
    hadolint = program("hadolint", "pip install 'opo-megatron[dev]'")
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "", result.stdout


def test_the_base_image_is_that_of_versions_toml() -> None:
    assert re.findall(r"^FROM (\S+)$", TEXT, re.M) == [VERSIONS.cuda["base_image"]]


def test_every_requirement_is_pinned_once() -> None:
    """By a constraint or a file of exact versions, never in the Dockerfile itself."""
    pinned = {line.partition("==")[0] for line in constraints(VERSIONS)}
    assert {"torch", "transformer-engine", "megatron-core", "nvidia-modelopt"} <= pinned
    for command in re.findall(r"pip install ((?:[^&\n]|\\\n)*)", TEXT.replace("\\\n", " ")):
        words = command.split()
        if "--requirement" in words:
            name = words[words.index("--requirement") + 1]
            lines = (ROOT / "requirements" / name).read_text().splitlines()
            assert all("==" in line for line in lines if line and line[0] != "#"), name
        else:
            assert "--constraint" in words, command
    assert not re.search(r"[=<>]=\d", re.sub(r"^#.*", "", TEXT, flags=re.M))


def test_the_image_needs_no_apex_and_copied_files_exist() -> None:
    assert "apex" not in TEXT.lower() and "apex" not in (ROOT / "requirements/build.txt").read_text().lower()
    assert re.fullmatch(r"[0-9a-f]{40}", VERSIONS.part("apex").version or "")
    for sources in re.findall(r"^COPY (.*) \./$", TEXT, re.M):
        assert all((ROOT / source).is_file() for source in sources.split())


def test_versions_print_without_installed_packages() -> None:
    command = [sys.executable, "-S", str(ROOT / "opo_megatron/environment/versions.py")]
    output = subprocess.run([*command, "apex"], capture_output=True, text=True, check=True).stdout
    assert output.strip() == VERSIONS.part("apex").version
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "torch==2.13.0\n" in output and "apex" not in output
