"""What a data file is by its first bytes, where its name says something else."""

from __future__ import annotations

from pathlib import Path

from opo_megatron.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"PK\x03\x04", "a zip archive", "unpack it with unzip"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data", "fetch the data with git lfs pull"),
    (b"<!doctype html", "a web page, not the data", "download the file itself"),
    (b"<html", "a web page, not the data", "download the file itself"),
    (b"ARROW1", "an Arrow file", "save it as Parquet"),
)
"""First bytes in lower case, what they mean, and the remedy."""


def check_format(path: Path, start: bytes) -> None:
    """
    Args:
        start: the first bytes of the file.

    Raises:
        UserError: for a format that is not read, or not under this name.
    """
    lower = start.lstrip().lower()
    for first, what, remedy in _FORMATS:
        if start.startswith(first) or lower.startswith(first):
            raise UserError(f"{path} is {what}; {remedy}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        pandas = f"pandas.read_csv('{path}').to_json('{path.stem}.jsonl', orient='records', lines=True)"
        how = f", for example with {pandas}" if suffix == ".csv" else ""
        raise UserError(f"{path} is neither .jsonl nor .parquet; convert it to one of them{how}")
    if suffix == ".parquet":
        if lower[:1] in (b"{", b"["):
            right = path.with_suffix(".json" if lower[:1] == b"[" else ".jsonl")
            raise UserError(f"{path} is JSON text, not Parquet; name it {right}")
    elif start.startswith(b"PAR1"):
        raise UserError(f"{path} is a Parquet file; name it {path.with_suffix('.parquet')}")
    elif b"\0" in start[:2]:
        raise UserError(f"{path} is UTF-16 text; convert it to UTF-8")
