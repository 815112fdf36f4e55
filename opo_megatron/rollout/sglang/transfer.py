"""Three ways of a bucket of full tensors into an SGLang server.

    tensor        same node: one buffer in shared memory (a CUDA IPC handle on GPUs), whose name travels
                  by HTTP; every engine rank maps the same full tensors and takes its slice
    distributed   any node: each tensor is broadcast to the engine's ranks (gloo, NCCL on GPUs)
    disk          a folder that both sides see

Each knows nothing of versions, sessions or flushing: that is `engine.py`.  `send` takes a bucket and
hands what takes time to a thread: so the trainer gathers the next bucket while this one is on its way,
and at most two buckets exist.  Shared buffers are never used again, for a server may answer before it
has copied.
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
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.weights.safetensors_file import FileWriter, TensorInfo

Bucket = Sequence[tuple[str, Tensor]]
GROUP = "opo_weights"


class Transfer(Protocol):
    """How one server gets a bucket."""

    def send(self, bucket: Bucket) -> Callable[[], None]:
        """Return what brings the bucket to the server; that runs in a thread."""
        ...

    def finish(self) -> None:
        """What is left to do once all buckets have been sent."""
        ...

    def close(self) -> None:
        """Leave what was joined with the server."""
        ...


class Sender:
    """Sends buckets one behind the other, each while the next is gathered.

    A failure does not interrupt the caller, who is inside a collective with other ranks: the rest of
    the stream is dropped, and `finish` raises.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._pending: Future[None] | None = None
        self._failure: EngineFailure | UserError | None = None

    def send(self, bucket: Bucket) -> None:
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

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def check_success(answer: Any, what: str) -> None:
    """SGLang answers 200 with success=false where a load failed."""
    if isinstance(answer, dict) and answer.get("success") is False:
        raise EngineFailure(f"the server did not take {what}: {answer.get('message')}")


class TensorTransfer:
    """By shared memory on one machine."""

    def __init__(self, client: Client, engine_ranks: int, device: torch.device) -> None:
        """Args:
        device: where the policy's weights are.

        Raises:
            UserError: where memory of that device cannot be shared.
        """
        self._client, self._engine_ranks = client, engine_ranks
        if device.type == "cuda":
            check_allocator(os.environ)
        torch.multiprocessing.set_sharing_strategy("file_system")  # descriptors would need a common secret
        with redirect_stdio():
            self._first = torch.zeros(1).share_memory_()  # starts torch's shared-memory helper

    def send(self, bucket: Bucket) -> Callable[[], None]:
        named = _copy_shared(bucket)
        text = _pickled(named)
        body: dict[str, Any] = {"serialized_named_tensors": [text] * self._engine_ranks, "flush_cache": False}

        def work(named: list[tuple[str, Tensor]] = named) -> None:
            # `named` keeps the memory until the server has answered.
            check_success(self._client.post("/update_weights_from_tensor", **body), "a bucket of weights")

        return work

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def check_allocator(environment: Mapping[str, str]) -> None:
    """Refuse an allocator whose memory has no CUDA IPC handle.

    Raises:
        UserError: naming the variable.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").replace(" ", "").lower():
            raise UserError(
                f"{name}={environment[name]} allocates memory that CUDA IPC cannot share; take "
                "expandable_segments out of it, or set rollout.sglang.transport=distributed"
            )


def _copy_shared(bucket: Bucket) -> list[tuple[str, Tensor]]:
    """The tensors as views of one new buffer that another process can map; types may differ."""
    device = bucket[0][1].device
    ends = list(accumulate(_aligned(tensor.nbytes) for _, tensor in bucket))
    if device.type == "cpu":
        # `share_memory_` would move what a usual tensor holds: a copy, and pages of both.
        storage = torch.UntypedStorage._new_shared(ends[-1])
        buffer = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    else:
        buffer = torch.empty(ends[-1], dtype=torch.uint8, device=device)
    named = []
    for (name, tensor), begin in zip(bucket, [0, *ends], strict=False):
        view = buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        named.append((name, view))
    return named


def _aligned(size: int) -> int:
    """Bytes up to where the next tensor may begin."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


_ALIGNMENT = 16
"""As SGLang's kernels want their operands, and more than any element."""


@contextlib.contextmanager
def redirect_stdio() -> Iterator[None]:
    """What starts here gets no output of this process.

    torch's shared-memory helper lives as long as the server does; whoever reads the trainer's output
    through a pipe would wait for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        for stream in kept:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, original in kept.items():
            os.dup2(original, stream)
            os.close(original)
        os.close(nowhere)


def _pickled(named: list[tuple[str, Tensor]]) -> str:
    data = io.BytesIO()
    pickler = ForkingPickler(data)
    pickler.dispatch_table[Tensor] = _handle  # type: ignore[attr-defined]  # of this pickler alone
    pickler.dump(named)
    return base64.b64encode(data.getbuffer()).decode()


def _handle(tensor: Tensor) -> Any:
    """torch's handle of a shared tensor, with a GPU named by its UUID.

    Its number differs between processes that see other devices, or the same in another order; SGLang
    takes either.
    """
    rebuild, arguments = reductions.reduce_tensor(tensor)
    if tensor.is_cuda:
        device = str(torch.cuda.get_device_properties(tensor.device).uuid)
        arguments = (*arguments[:_DEVICE], device, *arguments[_DEVICE + 1 :])
    return rebuild, arguments


_DEVICE = 6
"""Place of the device among the arguments of torch's `rebuild_cuda_tensor`."""


class DistributedTransfer:
    """By broadcast in a group of this process and the engine's ranks."""

    def __init__(self, client: Client, engine_ranks: int, port: int, device: torch.device) -> None:
        """Join a new group with the server; a collective of this process and the engine's ranks."""
        self._client, host = client, client.address_towards()
        backend = "gloo" if device.type == "cpu" else "nccl"
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
                backend=backend,
            )
            # The prefixes are those that torch's own group helper makes on the server's side.
            prefixed: Any = store
            for prefix in (GROUP, f"{GROUP}/", f"{device.type}/"):
                prefixed = dist.PrefixStore(prefix, prefixed)
            try:
                if backend == "gloo":
                    self._group: Any = dist.ProcessGroupGloo(prefixed, 0, size, timeout)
                else:
                    options = dist.ProcessGroupNCCL.Options()
                    options._timeout = timeout
                    self._group = dist.ProcessGroupNCCL(prefixed, 0, size, options)
            except RuntimeError as error:
                raise EngineFailure(f"no group could be joined with {client.url}: {error}") from error
            check_success(joined.result(), "part in a group for weights")
        self._store = store

    def send(self, bucket: Bucket) -> Callable[[], None]:
        named = [(name, tensor.detach().contiguous()) for name, tensor in bucket]
        # Tensor by tensor: for a flattened bucket the server would make the flat buffer by joining empty
        # tensors, which is another copy, and this side one more.
        body: dict[str, Any] = {
            "names": [name for name, _ in named],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
            "group_name": GROUP,
            "flush_cache": False,
        }

        def work(named: list[tuple[str, Tensor]] = named) -> None:
            with ThreadPoolExecutor(1) as thread:
                answer = thread.submit(self._client.post, "/update_weights_from_distributed", **body)
                try:
                    under_way = [self._group.broadcast([tensor], _from_first()) for _, tensor in named]
                    for broadcast in under_way:
                        broadcast.wait()
                except RuntimeError as error:
                    raise EngineFailure(f"the broadcast to {self._client.url} broke off: {error}") from error
                check_success(answer.result(), "a bucket of weights")

        return work

    def finish(self) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(EngineFailure):
            self._client.post("/destroy_weights_update_group", timeout=10.0, group_name=GROUP)


def _from_first() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options


class DiskTransfer:
    """By safetensors files in a folder that both sides see, read by the server as a whole."""

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
        answer = self._client.post(
            "/update_weights_from_disk",
            model_path=str(self._folder.resolve()),
            load_format="auto",
            flush_cache=False,
        )
        check_success(answer, f"the weights in {self._folder}")
        shutil.rmtree(self._folder)

    def close(self) -> None:
        pass
