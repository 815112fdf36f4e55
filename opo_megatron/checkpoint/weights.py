"""The weights of a Megatron checkpoint: written tensor by tensor, read from any parallel layout.

Megatron saves and loads models in memory.  Conversion builds the model on the meta device, with shapes but
no data; its `sharded_state_dict` describes the checkpoint's tensors, which are converted one at a time.
The written folder is a regular `dist_checkpointing` folder.  Checkpoints of runs can be read too; their
optimizer state is ignored.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.futures import Future

from opo_megatron import __version__
from opo_megatron.checkpoint.torch_dist import save_with
from opo_megatron.config.schema import PolicyConfig
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import UserError
from opo_megatron.policy.model import build_chunks
from opo_megatron.weights.param_mapping import Parameter
from opo_megatron.weights.safetensors_file import write_bytes

WEIGHTS_FILE = "opo_weights.json"
"""Marks a folder with weights only, not of a run."""
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

Read = Callable[[Parameter], Tensor]
DtypeOf = Callable[[Parameter], torch.dtype]


def holds_weights(folder: Path) -> bool:
    """Whether `folder` is a weights-only Megatron checkpoint."""
    return (folder / WEIGHTS_FILE).exists()


class _ShapesOnly(GPTModel):  # type: ignore[misc]
    """A model on the meta device: no embedding to synchronize between pipeline stages."""

    def _is_in_embd_group(self) -> bool:
        return False


def build_meta_chunks(policy: PolicyConfig, vocab_size: int, parallel: Parallel) -> list[GPTModel]:
    """This rank's model chunks, with shapes but no data."""
    with torch.device("meta"):
        return build_chunks(
            policy, vocab_size, parallel.pp_rank, parallel.dp_size, parallel.device, _ShapesOnly
        )


# ---------------------------------------------------------------------- writing


def save_weights(
    folder: Path,
    chunks: Sequence[GPTModel],
    mapping: Sequence[Parameter],
    parallel: Parallel,
    read: Read,
    dtype_of: DtypeOf,
) -> None:
    """Write a weights-only checkpoint into an empty folder; a collective of all ranks.

    Args:
        chunks: on the meta device.
        read: returns this rank's shard of a parameter; called once per parameter that this rank writes
            (twice in a row for gate and up, which the checkpoint stores separately).
    """
    parameters = {}
    for parameter in mapping:
        if parameter.stage == parallel.pp_rank:
            weight = chunks[parameter.chunk].get_parameter(parameter.mcore_name)
            weight.data = weight.data.to(dtype_of(parameter))
            parameters[_storage(weight)] = parameter
    state = {f"model{i}": chunk.sharded_state_dict(metadata=dict(METADATA)) for i, chunk in enumerate(chunks)}
    sums = torch.serialization.get_crc32_options()
    try:
        # Checksums take as long as writing, and torch.load does not verify them.
        torch.serialization.set_crc32_options(False)
        save_with(_LazySave(parameters, read).write, state, folder)
    except torch_checkpoint.api.CheckpointException as error:
        # Not a subclass of Exception; the failure of one rank is raised on all.
        first = next(iter(error.failures.values()))[0]
        raise first from None
    finally:
        torch.serialization.set_crc32_options(sums)
    if parallel.rank == 0:
        versions = {"opo_megatron": __version__, "torch": torch.__version__}
        (folder / WEIGHTS_FILE).write_text(json.dumps({"versions": versions}, indent=2) + "\n")


def _storage(tensor: Tensor) -> int:
    """Identifies the storage of a meta tensor, which has no address."""
    return int(tensor.untyped_storage()._cdata)


class _LazySave:
    """Megatron's `torch_dist` format, reading each tensor when it is written."""

    def __init__(self, parameters: dict[int, Parameter], read: Read) -> None:
        self._parameters, self._read = parameters, read
        self._latest: tuple[int, Tensor] | None = None

    def write(self, state: dict[str, Any], folder: Path) -> None:
        planner = _LazyPlanner(self._data_of, flatten_state_dict=False)
        torch_checkpoint.save(state, storage_writer=_StreamingWriter(folder), planner=planner)

    def _data_of(self, view: Tensor) -> Tensor:
        """The data of a view of a parameter on the meta device."""
        key = _storage(view)
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # freed before the next one is read
            parameter = self._parameters[key]
            self._latest = key, self._read(parameter).to(view.dtype).contiguous()
        return self._latest[1].as_strided(view.shape, view.stride(), view.storage_offset())


class _LazyPlanner(MCoreSavePlanner):  # type: ignore[misc]
    def __init__(self, data_of: Callable[[Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._data_of = data_of

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return self._data_of(object) if isinstance(object, Tensor) else object


class _StreamingWriter(FileSystemWriter):
    """torch's writer without its references to written tensors; reads the next tensor while writing."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True, thread_count=1)

    def _write_data(self, planner: Any, file_queue: Any) -> Future[Any]:
        results = []
        while not file_queue.empty():
            path, key, items = file_queue.get()
            with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
                stream, pending = _Stream(file), None
                for item in items:
                    data = planner.resolve_data(item)  # while the previous one is being written
                    if pending is not None:
                        results.append(pending.result())
                    pending = pool.submit(self._write, stream, item, key, data)
                    del data
                if pending is not None:
                    results.append(pending.result())
                os.fsync(file.fileno())
        future: Future[Any] = Future()
        future.set_result(results)
        return future

    def _write(self, stream: _Stream, item: WriteItem, key: str, data: Any) -> Any:
        if isinstance(data, Tensor):
            # torch.save writes whole storages: alias the memory with a storage of the exact size.
            alias = torch.from_numpy(data.reshape(-1).view(torch.uint8).numpy())
            data = alias.view(data.dtype).view(data.shape)
        try:
            return _write_item(self.transforms, stream, data, item, key, SerializationFormat.TORCH_SAVE)
        except RuntimeError:  # torch.save hides the stream's error
            raise stream.error or RuntimeError(f"{key} cannot be written") from None


class _Stream(io.RawIOBase):
    """A file that keeps its write error."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            write_bytes(self._file, view)
        except OSError as error:
            self.error = error
            raise
        return len(view)


# ---------------------------------------------------------------------- reading


class CheckpointShards:
    """This rank's shards of the weights in a checkpoint of any layout (a `Shards` of the weight stream)."""

    def __init__(
        self, folder: Path, chunks: Sequence[GPTModel], mapping: Sequence[Parameter], parallel: Parallel
    ) -> None:
        """Check all of this rank's parameters and exchange their types; a collective of all ranks.

        Args:
            chunks: of this rank, on any device: only their shapes are used.

        Raises:
            UserError: when `folder` is not a checkpoint, or one of another model.
        """
        self._folder, self._reader = folder, FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, EOFError) as error:
            raise UserError(f"{folder} is not a Megatron checkpoint ({error})") from None
        self._stored = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._entries = [chunk.sharded_state_dict(metadata=dict(METADATA)) for chunk in chunks]
        own = {}
        for parameter in mapping:
            if parameter.stage == parallel.pp_rank:
                stored = [self._check(parameter, shard) for shard in self._shards(parameter)]
                own[parameter.tensors] = stored[0].properties.dtype
        self._dtypes = {k: v for part in all_gather_objects(parallel, own) for k, v in part.items()}

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._dtypes[parameter.tensors]

    def read(self, parameter: Parameter) -> Tensor:
        entry = self._entries[parameter.chunk][parameter.mcore_name]
        parts = [self._read(shard) for shard in self._shards(parameter)]
        if not isinstance(entry, ShardedTensorFactory):
            return parts[0]
        built = entry.build()
        merged: Tensor = entry.merge_fn(
            dict(zip(built, parts, strict=True)) if isinstance(built, dict) else parts
        )
        return merged

    def _shards(self, parameter: Parameter) -> list[ShardedTensor]:
        """The checkpoint's tensors of a parameter: one, or gate and up."""
        entry = self._entries[parameter.chunk][parameter.mcore_name]
        return list(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]

    def _check(self, parameter: Parameter, shard: ShardedTensor) -> TensorStorageMetadata:
        stored = self._stored.get(shard.key)
        if stored is None:
            raise UserError(f"the checkpoint {self._folder} lacks {shard.key}, so it is of another model")
        size = tuple(stored.size)
        # The vocabulary may be padded for another parallel layout.
        matches = size == tuple(shard.global_shape)
        if not matches and not (shard.allow_shape_mismatch and size[1:] == tuple(shard.global_shape)[1:]):
            raise UserError(
                f"the checkpoint {self._folder} holds {shard.key} with shape {list(size)}, but this model's "
                f"is {list(shard.global_shape)}"
            )
        return stored

    def _read(self, shard: ShardedTensor) -> Tensor:
        shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        offset = tuple(shard.global_offset)
        parts = self._parts(shard.key)
        if parts.get(offset) == shape:
            return self._load(shard.key, offset).reshape(shard.local_shape)
        result = torch.zeros(shape, dtype=self._stored[shard.key].properties.dtype)
        for begin, size in parts.items():
            target, source = _overlap(offset, shape, begin, size)
            if all(part.start < part.stop for part in target):
                result[target] = self._load(shard.key, begin)[source]
        return result.reshape(shard.local_shape)

    @cache  # noqa: B019  # keeps the object alive, of which there is one
    def _parts(self, key: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Offset → shape of every stored part of a tensor."""
        return {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._stored[key].chunks}

    def _load(self, key: str, offset: tuple[int, ...]) -> Tensor:
        info = self._metadata.storage_data[MetadataIndex(key, torch.Size(offset))]
        with (self._folder / info.relative_path).open("rb") as file:
            part: Tensor = torch.load(self._reader._slice_file(file, info), "cpu", weights_only=True)
        return part


def _overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], begin: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The intersection of two boxes, in the coordinates of each."""
    first, second = [], []
    for o, n, b, s in zip(offset, shape, begin, size, strict=True):
        low, high = max(o, b), min(o + n, b + s)
        first.append(slice(low - o, high - o))
        second.append(slice(low - b, high - b))
    return tuple(first), tuple(second)
