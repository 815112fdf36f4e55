"""The manifest of a checkpoint, written last: size and CRC-32 of every file.

Ranks compute and verify the checksums of different files in parallel.  CRC-32 detects every error burst of
up to 32 bits and all but one in 4·10⁹ other errors, and sizes detect truncated files.  It runs at 3 GB/s on
one core (SHA-256: 1.2 GB/s) and does not protect against tampering.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

MANIFEST = "manifest.json"
_BLOCK = 2**22
_RANKS_FILE = re.compile(r"__(\d+)_\d+\.distcp")


class Entry(TypedDict):
    """One file."""

    bytes: int
    crc32: str


Entries = dict[str, Entry]
"""File name → entry."""


def written_by(folder: Path, rank: int, world_size: int) -> list[str]:
    """The files that this rank wrote, according to their names; rank 0 owns all others."""

    def owner(name: str) -> int:
        match = _RANKS_FILE.fullmatch(name)
        return int(match.group(1)) if match and int(match.group(1)) < world_size else 0

    return sorted(path.name for path in folder.iterdir() if owner(path.name) == rank)


def entries_of(folder: Path, names: Iterable[str]) -> Entries:
    """Sizes and checksums of the files `names`."""
    return {name: _entry(folder / name) for name in names}


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest, which marks the folder as complete."""
    with (folder / MANIFEST).open("w") as file:
        file.write(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Entries:
    """
    Raises:
        ValueError: if it is missing or malformed.
    """
    try:
        entries: Entries = json.loads((folder / MANIFEST).read_text())
        for entry in entries.values():
            _ = entry["bytes"] + 1, entry["crc32"] + ""
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is malformed: {error!r}") from error
    return entries


def share_to_check(entries: Entries, rank: int, world_size: int) -> list[str]:
    """The files that this rank checks; bytes are balanced over ranks."""
    by_size = sorted(entries, key=lambda name: (-entries[name]["bytes"], name))
    return by_size[rank::world_size]


def find_damage(folder: Path, entries: Entries, names: Iterable[str]) -> str | None:
    """Description of the first file of `names` that differs from its entry; sizes are compared first."""
    to_check = list(names)
    for name in to_check:
        path, size = folder / name, entries[name]["bytes"]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    for name in to_check:
        if _entry(folder / name) != entries[name]:
            return f"{name} has other bytes than were written"
    return None


def _entry(path: Path) -> Entry:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": f"{checksum:08x}"}
