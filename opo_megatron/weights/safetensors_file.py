"""The safetensors format, read slice by slice and written tensor by tensor.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data.
Reads allocate only the requested slice; with a memory map, every touched page would count as memory of
the process.  The header is written first, which needs all shapes but no tensor, so that only one tensor
is in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from opo_megatron.errors import UnreadableWeights, UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Supported types of weights, by their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}
"""Types that can be written; FP8 is for engines and is never read back."""

SCRATCH_BYTES = 16 * 2**20
"""Size of the buffer for reading columns of a matrix."""
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; indexing reads a slice."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Where its bytes begin in the file."""

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """A slice of rows, or of rows and columns, with step 1.

        Columns are cut from whole rows, read in blocks: the disk reads the same pages either way.
        """
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        first, last, _ = rows.indices(self.shape[0])
        row_numel, last = math.prod(self.shape[1:]), max(first, last)
        with self.path.open("rb", buffering=0) as file:
            if columns == slice(None):
                return self._read(file, first * row_numel, (last - first, *self.shape[1:]))
            left, right, _ = columns.indices(self.shape[1])
            part = torch.empty(last - first, right - left, dtype=self.dtype)
            block = max(1, SCRATCH_BYTES // (row_numel * self.dtype.itemsize))
            for begin in range(first, last, block):
                end = min(begin + block, last)
                whole = self._read(file, begin * row_numel, (end - begin, row_numel))
                part[begin - first : end - first] = whole[:, left:right]
            return part

    def _read(self, file: IO[bytes], start: int, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype)
        if tensor.numel():
            file.seek(self.offset + start * self.dtype.itemsize)
            memory = _bytes(tensor)
            while len(memory):
                count = file.readinto(memory)  # type: ignore[attr-defined]
                if not count:
                    raise UnreadableWeights(f"{self.path} ends in the middle of a tensor")
                memory = memory[count:]
        return tensor


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file; only the header is read.

    Raises:
        UserError: for a file that is missing, truncated or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
        end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=8 + length)
    except FileNotFoundError:
        raise UnreadableWeights(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableWeights(f"{path} is not a readable safetensors file ({error})") from None
    if end != size:
        raise UnreadableWeights(f"{path} has {size} bytes but its header requires {end}")
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path} holds {name} as {entry['dtype']}; supported are {', '.join(DTYPES)}")
    tensor = StoredTensor(
        path, DTYPES[entry["dtype"]], tuple(entry["shape"]), data + entry["data_offsets"][0]
    )
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(tensor.shape) * tensor.dtype.itemsize:
        raise ValueError(f"the size of {name} does not match its shape")
    return tensor


@dataclass(frozen=True)
class TensorInfo:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FileWriter:
    """Writes one file, its tensors in the announced order."""

    def __init__(self, path: Path, tensors: Iterable[TensorInfo], is_durable: bool = True) -> None:
        """Args:
        is_durable: whether `close` waits for the disk.
        """
        self.path, self.expected, self._is_durable = path, list(tensors), is_durable
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in self.expected:
            end = offset + info.nbytes
            entry = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
            header[info.name], offset = entry, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb", buffering=0)
        self._next = 0
        write_bytes(self._file, memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            ValueError: when it is not the announced one.
        """
        info = self.expected[self._next]
        if (info.name, info.shape, info.dtype) != (name, tuple(tensor.shape), tensor.dtype):
            raise ValueError(
                f"{name} {list(tensor.shape)} {tensor.dtype} was written where {info} was announced"
            )
        write_bytes(self._file, _bytes(tensor.detach().cpu().contiguous()))
        self._next += 1

    @property
    def is_complete(self) -> bool:
        return self._next == len(self.expected)

    def close(self) -> None:
        """Close the file; a complete, durable one is flushed to disk first."""
        if not self._file.closed:
            with self._file:
                if self.is_complete and self._is_durable:
                    os.fsync(self._file.fileno())


def write_bytes(file: IO[bytes], data: memoryview) -> None:
    """Write all of `data`; the only place that writes weights to disk."""
    while len(data):
        data = data[file.write(data) :]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
