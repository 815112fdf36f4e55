"""The set of versions in `versions.toml`: its reader, and pip constraints.

    python opo_megatron/environment/versions.py            constraints, one NAME==VERSION per line
    python opo_megatron/environment/versions.py apex       the version of one part

Needs only Python, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "versions.toml"


@dataclass(frozen=True)
class Part:
    """One package of the set."""

    name: str
    """Name of the distribution."""
    needed: str
    """always | gpu | choice"""
    costs: str
    """What does not work without it."""
    version: str | None = None
    """The tested version."""
    at_least: str | None = None
    below: str | None = None
    module: str | None = None
    """The imported module; default the distribution's name."""
    extra: str | None = None
    """The extra of opo-megatron that installs it."""
    install: str | None = None
    why: str = ""
    git: str | None = None
    """Its source, if not the registry."""
    useless_with: str | None = None
    """The package that makes this one unnecessary."""

    @property
    def wanted(self) -> str:
        """The accepted versions, as text."""
        if self.at_least and self.below:
            return f"{self.at_least} or newer, below {self.below}"
        return self.version or "any"

    def accepts(self, version: str) -> bool:
        """Whether this version is in the set; a local part such as `+cpu` is ignored."""
        public = version.partition("+")[0]
        if self.at_least and self.below:
            return numbers(self.at_least) <= numbers(public) < numbers(self.below)
        return self.version is None or public == self.version

    @property
    def fix(self) -> str:
        """The command that installs the right version."""
        if self.install is not None:
            return self.install
        if self.extra is not None:
            return f"pip install 'opo-megatron[{self.extra}]'"
        if self.version is not None:
            return f"pip install {self.name}=={self.version}"
        return f"pip install '{self.name}>={self.at_least},<{self.below}'"


@dataclass(frozen=True)
class Versions:
    """The content of `versions.toml` for one Python."""

    python: tuple[str, str]
    """(at least, below)."""
    default_python: str
    """The documented one."""
    cuda: dict[str, str]
    packages: tuple[Part, ...]
    sglang: tuple[Part, ...]
    """SGLang's own environment."""

    def part(self, name: str) -> Part:
        return next(part for part in self.packages if part.name == name)


def read_versions(file: Path = FILE, python: str | None = None) -> Versions:
    """Read the set.

    Args:
        python: the version it is for; default this interpreter's.
    """
    raw = tomllib.loads(file.read_text(encoding="utf-8"))
    running = python or ".".join(map(str, sys.version_info[:2]))
    return Versions(
        python=(raw["python"]["at_least"], raw["python"]["below"]),
        default_python=raw["python"]["default"],
        cuda=raw["cuda"],
        packages=tuple(Part(name, **_entry_for(running, **entry)) for name, entry in raw["packages"].items()),
        sglang=tuple(Part(name, needed="choice", **entry) for name, entry in raw["sglang"].items()),
    )


def _entry_for(
    python: str, python_below: dict[str, dict[str, str]] | None = None, **entry: str
) -> dict[str, str]:
    """An entry with what differs on this Python."""
    for bound, differing in (python_below or {}).items():
        if numbers(python) < numbers(bound):
            entry |= differing
    return entry


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparisons."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def constraints(versions: Versions) -> list[str]:
    """Pip constraints for the trainer's environment."""
    return [f"{part.name}=={part.version}" for part in versions.packages if part.version and part.git is None]


if __name__ == "__main__":
    versions = read_versions()
    print("\n".join([versions.part(name).version or "" for name in sys.argv[1:]] or constraints(versions)))
