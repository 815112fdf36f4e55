"""The Dockerfile: clean, and of the versions that `versions.toml` says."""

from __future__ import annotations

import re
import subprocess
import sys

from opo_megatron.environment.versions import constraints, read_versions
from tests.support.paths import ROOT
from tests.support.requirements import program

TEXT = (ROOT / "Dockerfile").read_text()
VERSIONS = read_versions()


def test_hadolint_finds_nothing() -> None:
    hadolint = program("hadolint", "pip install 'opo-megatron[dev]'")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout


def test_its_base_is_the_one_of_the_set() -> None:
    assert re.findall(r"^FROM (\S+)$", TEXT, re.M) == [VERSIONS.cuda["base_image"]]


def test_every_requirement_has_one_version() -> None:
    """By a constraint, or in a file of exact versions; nothing is named with a version of its own."""
    pinned = {line.partition("==")[0] for line in constraints(VERSIONS)}
    assert {"torch", "transformer-engine", "megatron-core", "nvidia-modelopt"} <= pinned
    for command in re.findall(r"pip install ((?:[^&\n]|\\\n)*)", TEXT.replace("\\\n", " ")):
        words = command.split()
        if "--requirement" in words:
            name = words[words.index("--requirement") + 1]
            lines = (ROOT / "requirements" / name).read_text().splitlines()
            assert all("==" in line for line in lines if line and line[0] != "#"), name
        elif "./apex" not in words:
            assert "--constraint" in words, command
    assert not re.search(r"[=<>]=\d", re.sub(r"^#.*", "", TEXT, flags=re.M))


def test_apex_is_a_commit_and_what_it_copies_is_there() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", VERSIONS.part("apex").version or "")
    for sources in re.findall(r"^COPY (.*) \./$", TEXT, re.M):
        assert all((ROOT / source).is_file() for source in sources.split())


def test_versions_print_themselves_before_anything_is_installed() -> None:
    command = [sys.executable, "-S", str(ROOT / "opo_megatron/environment/versions.py")]
    printed = subprocess.run([*command, "apex"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == VERSIONS.part("apex").version
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "torch==2.13.0\n" in printed and "apex" not in printed
