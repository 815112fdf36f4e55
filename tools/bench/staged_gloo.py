"""A process group that stages every tensor through host memory and lets gloo communicate.

NCCL refuses two ranks on one GPU.  With this one, 2 to 4 ranks share a card, so that every parallel layout
can be compared with a single rank on it:

    register()
    dist.init_process_group(BACKEND)        # Megatron's groups inherit it

It is equipment of tests, not a backend for training: each operation waits for the current stream, copies its
inputs to the host, and its results back.  Otherwise it keeps what callers rely on with NCCL: an operation
starts after the work queued on the current stream; results may be read on the stream that was current in
`wait`; sends do not wait for their receiver, so two ranks may send to each other before either receives.
Reductions are gloo's, so a CPU gets gloo's numbers bit for bit; bytes of FP8 travel as they are.

Left out: reductions that gloo lacks (AVG), `recv` from any source, and futures of work handles.
"""

# mypy: disable-error-code="override, assignment"
# torch calls these methods with the option objects of C++; its stub declares overloads of them too.

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import BarrierOptions, ProcessGroupGloo, Work

BACKEND = "staged"
_BYTE_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that gloo does not know; it moves their bytes."""


def register() -> None:
    """Make `BACKEND` known to torch.distributed in this process."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, StagedGloo, devices=["cpu", "cuda"])


class StagedWork(Work):
    """Handle of operations in flight; `wait` copies their results to where the caller wants them."""

    def __init__(self, works: Sequence[Any], results: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """
        Args:
            works: handles to wait for.
            results: (tensor of the caller, its host copy).
        """
        super().__init__()
        self._works, self._results = list(works), list(results)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(*([timeout] if timeout else []))
        for target, host in self._results:
            # `.data`: as with NCCL, a tensor that autograd has saved does not count as modified.
            _bytes(target.data).copy_(host.view(target.shape))
        self._works, self._results = [], []
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works) and self.wait()


class _Staging:
    """Host copies of one operation's tensors."""

    def __init__(self) -> None:
        self.results: list[tuple[Tensor, Tensor]] = []

    def read(self, tensor: Tensor) -> Tensor:
        """A copy, after all work queued on the current stream."""
        return _bytes(tensor.detach()).to("cpu", copy=True)

    def write(self, tensor: Tensor) -> Tensor:
        """A buffer that is copied to `tensor` in the end."""
        host = torch.empty_like(_bytes(tensor.detach()), device="cpu")
        self.results.append((tensor, host))
        return host

    def update(self, tensor: Tensor) -> Tensor:
        """A copy that replaces `tensor` in the end."""
        self.results.append((tensor, self.read(tensor)))
        return self.results[-1][1]


class StagedGloo(dist.ProcessGroup):
    """See the module's docstring.  torch calls the methods, under names that differ between versions."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo = dist.ProcessGroup(store, rank, size)
        kind, backend = dist.ProcessGroup.BackendType.GLOO, ProcessGroupGloo(store, rank, size, timeout)
        backend._set_sequence_number_for_group()
        self._gloo._register_backend(torch.device("cpu"), kind, backend)
        self._gloo._set_default_backend(kind)
        self._in_block: list[StagedWork] | None = None

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        return self._launch(lambda host: self._gloo.allreduce([*map(host.update, tensors)], *_given(opts)))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        return self._launch(
            lambda host: self._gloo.allreduce_coalesced([*map(host.update, tensors)], *_given(opts))
        )

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        return self._launch(lambda host: self._gloo.reduce([*map(host.update, tensors)], *_given(opts)))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        return self._launch(lambda host: self._gloo.broadcast([*map(host.update, tensors)], *_given(opts)))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        return self._launch(
            lambda host: self._gloo.allgather(
                [[*map(host.write, part)] for part in outputs], [*map(host.read, inputs)], *_given(opts)
            )
        )

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> StagedWork:
        return self._launch(
            lambda host: self._gloo._allgather_base(host.write(output), host.read(input), *_given(opts))
        )

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> StagedWork:
        """One by one: of tensors of several types, as FP8 values and their scales, gloo makes garbage."""
        pairs = list(zip(outputs, inputs, strict=True))
        return self._launch(
            lambda host: [self._gloo._allgather_base(host.write(one), host.read(own)) for one, own in pairs]
        )

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> StagedWork:
        return self._launch(
            lambda host: self._gloo.reduce_scatter(
                [*map(host.write, outputs)], [[*map(host.read, part)] for part in inputs], *_given(opts)
            )
        )

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> StagedWork:
        return self._launch(
            lambda host: self._gloo._reduce_scatter_base(host.write(output), host.read(input), *_given(opts))
        )

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> StagedWork:
        return self._launch(
            lambda host: self._gloo.reduce_scatter_tensor_coalesced(
                [*map(host.write, outputs)], [*map(host.read, inputs)], *_given(opts)
            )
        )

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> StagedWork:
        return self._launch(
            lambda host: self._gloo.alltoall_base(
                host.write(output), host.read(input), output_sizes, input_sizes, *_given(opts)
            )
        )

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        """Lists of tensors of any shape, as one exchange of their elements."""

        def exchange(host: _Staging) -> Any:
            sent = torch.cat([host.read(tensor).flatten() for tensor in inputs])
            received = sent.new_empty(sum(tensor.numel() for tensor in outputs))
            sizes = [[tensor.numel() for tensor in part] for part in (outputs, inputs)]
            host.results += zip(outputs, received.split(sizes[0]), strict=True)
            return self._gloo.alltoall_base(received, sent, *sizes, *_given(opts))

        return self._launch(exchange)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        return self._launch(
            lambda host: self._gloo.gather(
                [[*map(host.write, part)] for part in outputs], [*map(host.read, inputs)], *_given(opts)
            )
        )

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> StagedWork:
        return self._launch(
            lambda host: self._gloo.scatter(
                [*map(host.write, outputs)], [[*map(host.read, part)] for part in inputs], *_given(opts)
            )
        )

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> StagedWork:
        return self._launch(lambda host: self._gloo.send([*map(host.read, tensors)], destination, tag))

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> StagedWork:
        return self._launch(lambda host: self._gloo.recv([*map(host.write, tensors)], source, tag))

    def barrier(self, opts: Any = None) -> StagedWork:
        options = BarrierOptions()  # the caller's may name a GPU
        return self._launch(lambda host: self._gloo.barrier(options))

    # Names of torch before 2.13.
    _allgather_base, allgather_into_tensor_coalesced = all_gather_single, all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _launch(self, operation: Callable[[_Staging], Any]) -> StagedWork:
        """Start `operation` on host copies; it gets them from the staging, and returns gloo's handles."""
        host = _Staging()
        started = operation(host)
        work = StagedWork(started if isinstance(started, list) else [started], host.results)
        if self._in_block is not None:
            self._in_block.append(work)
        return work

    def _start_coalescing(self, device: torch.device) -> None:
        self._in_block = []

    def _end_coalescing(self, device: torch.device) -> StagedWork:
        works, self._in_block = self._in_block or [], None
        return StagedWork(works)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in _BYTE_TYPES else tensor


def _given(opts: Any) -> tuple[Any, ...]:
    return () if opts is None else (opts,)
