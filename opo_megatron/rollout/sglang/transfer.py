"""Three transports for a bucket of weights to an SGLang server.

    tensor        same node: one buffer in shared memory (a CUDA IPC handle on GPUs), whose handle is sent
                  by HTTP; every engine rank maps the same full tensors and copies its slice,
                  or maps and copies the tensors that it holds (`SliceTransfer`)
    distributed   any node: each tensor is broadcast to the engine's ranks (by NCCL on GPUs; by gloo on a CPU,
                  or where trainer and server share a GPU, which NCCL refuses)
    disk          a folder that both sides can read

Versions, sessions and flushing are in `engine.py`.  `send` prepares a bucket, and the slow part runs in a
thread: the trainer gathers the next bucket while this one is sent, and at most two buckets exist.  Shared
buffers are never reused, because a server may reply before it has copied.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from opo_megatron.config.choices import GroupBackend
from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.weights.buffers import bytes_of, views_of
from opo_megatron.weights.safetensors_file import FileWriter, TensorInfo

Bucket = Sequence[tuple[str, Tensor]]
GROUP = "opo_weights"


T_contra = TypeVar("T_contra", contravariant=True)


class Transfer(Protocol[T_contra]):
    """How one server receives buckets: of full tensors, or handles of slices."""

    def send(self, bucket: T_contra, /) -> Callable[[], None]:
        """Returns a function that sends the bucket; it runs in a thread."""
        ...

    def finish(self) -> None:
        """Called once all buckets have been sent."""
        ...

    def close(self) -> None:
        """Leave groups joined with the server."""
        ...


T = TypeVar("T")


class Sender(Generic[T]):
    """Sends buckets in order, each while the next is gathered.

    A failure does not interrupt the caller, who is inside a collective with other ranks: later buckets are
    dropped, and `finish` raises.
    """

    def __init__(self, transfer: Transfer[T]) -> None:
        self._transfer = transfer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._pending: Future[None] | None = None
        self._failure: EngineFailure | UserError | None = None

    def send(self, bucket: T) -> None:
        if self._failure is not None:
            return
        try:
            work = self._transfer.send(bucket)
            self._wait()
            self._pending = self._thread.submit(work)
        except (EngineFailure, UserError) as failure:
            self._failure = failure

    def finish(self) -> None:
        """Wait for the last bucket.

        Raises:
            EngineFailure: where any bucket did not arrive.
        """
        try:
            self._wait()
            if self._failure is None:
                self._transfer.finish()
        except (EngineFailure, UserError) as failure:
            self._failure = self._failure or failure
        finally:
            self._thread.shutdown()
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until the server has loaded what was sent; `finish` raises where it did not."""
        try:
            self._wait()
        except (EngineFailure, UserError) as failure:
            self._failure = failure

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def check_success(reply: Any, what: str) -> None:
    """Raise where a load failed: SGLang replies 200 with success=false."""
    if isinstance(reply, dict) and reply.get("success") is False:
        raise EngineFailure(f"the server did not accept {what}: {reply.get('message')}")


class TensorTransfer:
    """By shared memory on one node."""

    def __init__(self, client: Client, engine_ranks: int, device: torch.device) -> None:
        """Args:
        device: where the policy's weights are.

        Raises:
            UserError: where memory of that device cannot be shared between processes.
        """
        self._client, self._engine_ranks = client, engine_ranks
        self._first = start_sharing(device)

    def send(self, bucket: Bucket) -> Callable[[], None]:
        named = _copy_shared(bucket)
        text = pickled(named)
        body: dict[str, Any] = {"serialized_named_tensors": [text] * self._engine_ranks, "flush_cache": False}

        def work(named: list[tuple[str, Tensor]] = named) -> None:
            # `named` keeps the memory alive until the server has replied.
            check_success(self._client.post("/update_weights_from_tensor", **body), "a bucket of weights")

        return work

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class SliceTransfer:
    """By shared memory on one node: to each engine rank the tensors that it holds, by their own names."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def send(self, handles: Sequence[str]) -> Callable[[], None]:
        """Args:
        handles: of every engine rank's tensors, in rank order; the caller keeps their memory.
        """
        body: dict[str, Any] = {"serialized_named_tensors": list(handles), "load_format": "direct"}

        def work() -> None:
            reply = self._client.post("/update_weights_from_tensor", flush_cache=False, **body)
            check_success(reply, "a bucket of slices")

        return work

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def start_sharing(device: torch.device) -> Tensor:
    """Prepare this process to share memory of a device; returns shared memory that keeps it prepared.

    Raises:
        UserError: where memory of that device cannot be shared between processes.
    """
    if device.type == "cuda":
        check_allocator(os.environ)
    # File descriptors would need a shared auth key.
    torch.multiprocessing.set_sharing_strategy("file_system")
    with redirect_stdio():
        return torch.zeros(1).share_memory_()  # starts torch's shared-memory helper


def check_allocator(environment: Mapping[str, str]) -> None:
    """Raise for an allocator whose memory has no CUDA IPC handle.

    Raises:
        UserError: naming the variable.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").replace(" ", "").lower():
            raise UserError(
                f"{name}={environment[name]} allocates memory that CUDA IPC cannot share; remove "
                "expandable_segments from it, or set rollout.sglang.transport=distributed"
            )


def _copy_shared(bucket: Bucket) -> list[tuple[str, Tensor]]:
    """The tensors as views of one new buffer that another process can map; dtypes may differ."""
    infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in bucket]
    buffer = shared_buffer(bytes_of(infos), bucket[0][1].device)
    named = []
    for (name, tensor), view in zip(bucket, views_of(buffer, infos), strict=True):
        view.copy_(tensor)
        named.append((name, view))
    return named


def shared_buffer(size: int, device: torch.device) -> Tensor:
    """New memory that another process can map."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    # `share_memory_` of a normal tensor would copy it, and touch the pages of both.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload,no-any-return]


@contextlib.contextmanager
def redirect_stdio() -> Iterator[None]:
    """Processes started within it do not inherit this process's output.

    torch's shared-memory helper lives as long as the server; a reader of the trainer's output through a pipe
    would wait for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    devnull = os.open(os.devnull, os.O_WRONLY)
    originals = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        for stream in originals:
            os.dup2(devnull, stream)
        yield
    finally:
        for stream, original in originals.items():
            os.dup2(original, stream)
            os.close(original)
        os.close(devnull)


def pickled(named: list[tuple[str, Tensor]]) -> str:
    data = io.BytesIO()
    pickler = ForkingPickler(data)
    pickler.dispatch_table[Tensor] = _handle  # type: ignore[attr-defined]  # of this pickler only
    pickler.dump(named)
    return base64.b64encode(data.getbuffer()).decode()


def _handle(tensor: Tensor) -> Any:
    """torch's handle of a shared tensor, with the GPU's UUID in place of its index.

    The index differs between processes with other CUDA_VISIBLE_DEVICES; SGLang accepts either.
    """
    rebuild, arguments = reductions.reduce_tensor(tensor)
    if tensor.is_cuda:
        device = str(torch.cuda.get_device_properties(tensor.device).uuid)
        arguments = (*arguments[:_DEVICE_INDEX], device, *arguments[_DEVICE_INDEX + 1 :])
    return rebuild, arguments


_DEVICE_INDEX = 6
"""Index of the device among the arguments of torch's `rebuild_cuda_tensor`."""


class DistributedTransfer:
    """By broadcast in a process group of this process and the engine's ranks."""

    def __init__(self, client: Client, engine_ranks: int, port: int, backend: GroupBackend) -> None:
        """Join a new group with the server; a collective of this process and the engine's ranks."""
        self._client, host = client, client.address_towards()
        timeout = timedelta(seconds=client.timeout)
        size = 1 + engine_ranks
        store = dist.TCPStore(host, port, size, is_master=True, timeout=timeout, wait_for_workers=False)
        with ThreadPoolExecutor(1) as thread:
            joined = thread.submit(
                client.post,
                "/init_weights_update_group",
                master_address=host,
                master_port=port,
                rank_offset=1,
                world_size=size,
                group_name=GROUP,
                backend=backend.value,
            )
            # The same prefixes as torch's group helper uses on the server's side.
            prefixed: Any = store
            for prefix in (GROUP, f"{GROUP}/", _STORE_PREFIXES[backend]):
                prefixed = dist.PrefixStore(prefix, prefixed)
            try:
                if backend is GroupBackend.gloo:
                    self._group: Any = dist.ProcessGroupGloo(prefixed, 0, size, timeout)
                else:
                    options = dist.ProcessGroupNCCL.Options()
                    options._timeout = timeout
                    self._group = dist.ProcessGroupNCCL(prefixed, 0, size, options)
            except RuntimeError as error:
                raise EngineFailure(f"could not join a process group with {client.url}: {error}") from error
            check_success(joined.result(), "a process group for weights")
        self._store = store

    def send(self, bucket: Bucket) -> Callable[[], None]:
        named = [(name, tensor.detach().contiguous()) for name, tensor in bucket]
        # Tensor by tensor: a flattened bucket costs a copy on the server, which concatenates empty tensors
        # to get the flat buffer, and one more here.
        body: dict[str, Any] = {
            "names": [name for name, _ in named],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
            "group_name": GROUP,
            "flush_cache": False,
        }

        def work(named: list[tuple[str, Tensor]] = named) -> None:
            with ThreadPoolExecutor(1) as thread:
                reply = thread.submit(self._client.post, "/update_weights_from_distributed", **body)
                try:
                    broadcasts = [
                        self._group.broadcast([tensor], _broadcast_options()) for _, tensor in named
                    ]
                    for broadcast in broadcasts:
                        broadcast.wait()
                except RuntimeError as error:
                    raise EngineFailure(f"the broadcast to {self._client.url} failed: {error}") from error
                check_success(reply.result(), "a bucket of weights")

        return work

    def finish(self) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(EngineFailure):
            self._client.post("/destroy_weights_update_group", timeout=10.0, group_name=GROUP)


def group_backend(chosen: GroupBackend | None, device: torch.device) -> GroupBackend:
    """The library that sends weights from this device, `chosen` or the usual one.

    Raises:
        UserError: for NCCL on a CPU.
    """
    if chosen is GroupBackend.nccl and device.type == "cpu":
        raise UserError(
            "rollout.sglang.distributed_backend=nccl, but this run's weights are on a CPU, whose memory NCCL "
            "does not read; set rollout.sglang.distributed_backend=gloo"
        )
    return chosen or (GroupBackend.gloo if device.type == "cpu" else GroupBackend.nccl)


_STORE_PREFIXES = {GroupBackend.gloo: "cpu/", GroupBackend.nccl: "cuda/"}
"""torch makes the backend of a group under the name of the first device that the library serves."""


def _broadcast_options() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options


class DiskTransfer:
    """By safetensors files in a folder that both sides can read; loaded by the server at the end."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client, self._folder = client, folder
        self._files = 0

    def send(self, bucket: Bucket) -> Callable[[], None]:
        """Write one file; the server reads all of them in `finish`."""
        if self._files == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        self._files += 1
        path = self._folder / f"model-{self._files:05d}.safetensors"
        infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in bucket]

        def work() -> None:
            with contextlib.closing(FileWriter(path, infos, is_durable=False)) as writer:
                for name, tensor in bucket:
                    writer.write(name, tensor)

        return work

    def finish(self) -> None:
        self._files = 0
        reply = self._client.post(
            "/update_weights_from_disk",
            model_path=str(self._folder.resolve()),
            load_format="auto",
            flush_cache=False,
        )
        check_success(reply, f"the weights in {self._folder}")
        shutil.rmtree(self._folder)

    def close(self) -> None:
        pass
