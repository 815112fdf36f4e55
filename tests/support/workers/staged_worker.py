"""Every operation of the staged process group against gloo's own, in each rank; needs tools/ on PYTHONPATH.

An operation runs twice on equal inputs, on two groups of the same ranks; all tensors that it may write must
be equal bit for bit.  One process covers all of them: importing torch takes longer than the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bench.staged_gloo import BACKEND, register
from torch import Tensor

Case = Callable[[Any, int, int], list[Tensor]]
"""(group, rank, size) → what the operation wrote."""


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose sum depends on the order of summation."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(*shape, generator=generator) * 10.0 ** (rank % 4)).to(dtype)


def reduced(operation: Any = dist.ReduceOp.SUM, dtype: torch.dtype = torch.float32) -> Case:
    def case(group: Any, rank: int, size: int) -> list[Tensor]:
        tensor = values(rank, 1000, 3, dtype=dtype)
        dist.all_reduce(tensor, operation, group=group)
        return [tensor]

    return case


def reduced_coalesced(group: Any, rank: int, size: int) -> list[Tensor]:
    tensors = [values(rank, 7), values(rank + 10, 129)]
    with dist._coalescing_manager(group, async_ops=True) as pending:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    pending.wait()
    return tensors


def transposed(group: Any, rank: int, size: int) -> list[Tensor]:
    """A tensor that is not contiguous."""
    tensor = values(rank, 5, 4).t()
    dist.all_reduce(tensor, group=group)
    return [tensor]


def reduced_to_one(group: Any, rank: int, size: int) -> list[Tensor]:
    tensor = values(rank, 33)
    dist.reduce(tensor, size - 1, group=group)
    return [tensor] if rank == size - 1 else []


def broadcast(group: Any, rank: int, size: int) -> list[Tensor]:
    tensor = values(rank, 33)
    work = dist.broadcast(tensor, 1, group=group, async_op=True)
    assert work is not None
    while not work.is_completed():
        pass
    return [tensor]


def gathered(group: Any, rank: int, size: int) -> list[Tensor]:
    parts = [torch.empty(4, 3) for _ in range(size)]
    dist.all_gather(parts, values(rank, 4, 3), group=group)
    return parts


def gathered_into_tensor(dtype: torch.dtype) -> Case:
    def case(group: Any, rank: int, size: int) -> list[Tensor]:
        whole = torch.empty(4 * size, 3, dtype=dtype)
        part = values(rank, 4, 3).sigmoid().to(dtype)
        if group_is_gloo(group):  # which does not know FP8
            dist.all_gather_into_tensor(whole.view(torch.uint8), part.view(torch.uint8), group=group)
        else:
            dist.all_gather_into_tensor(whole, part, group=group)
        return [whole.view(torch.uint8)]

    return case


def group_is_gloo(group: Any) -> bool:
    return dist.get_backend(group) == "gloo"


def gathered_coalesced(with_device: bool) -> Case:
    """Transformer Engine names the device, Megatron does not."""

    def case(group: Any, rank: int, size: int) -> list[Tensor]:
        outputs = [torch.empty(2 * size), torch.empty(3 * size, 2)]
        device = torch.device("cpu") if with_device and not group_is_gloo(group) else None
        with dist._coalescing_manager(group, device, async_ops=True) as pending:
            dist.all_gather_into_tensor(outputs[0], values(rank, 2), group=group)
            dist.all_gather_into_tensor(outputs[1], values(rank, 3, 2), group=group)
        pending.wait()
        return outputs

    return case


def gathered_values_and_scales(group: Any, rank: int, size: int) -> list[Tensor]:
    """Bytes of FP8 with scales in fp32, and gradients in bf16, as one operation."""
    types = (torch.uint8, torch.float32, torch.bfloat16, torch.int64)
    inputs = [(values(rank, 2, 3).abs() * 9).to(dtype) for dtype in types]
    outputs = [torch.empty(2 * size, 3, dtype=dtype) for dtype in types]
    if group_is_gloo(group):  # which joins them to garbage
        for whole, part in zip(outputs, inputs, strict=True):
            dist.all_gather_into_tensor(whole, part, group=group)
        return outputs
    with dist._coalescing_manager(group, torch.device("cpu"), async_ops=True) as pending:
        for whole, part in zip(outputs, inputs, strict=True):
            dist.all_gather_into_tensor(whole, part, group=group)
    pending.wait()
    return outputs


def reduce_scattered(group: Any, rank: int, size: int) -> list[Tensor]:
    part = torch.empty(5, 2)
    dist.reduce_scatter_tensor(part, values(rank, 5 * size, 2), group=group)
    return [part]


def reduce_scattered_list(group: Any, rank: int, size: int) -> list[Tensor]:
    part = torch.empty(5)
    dist.reduce_scatter(part, list(values(rank, size, 5)), group=group)
    return [part]


def reduce_scattered_coalesced(group: Any, rank: int, size: int) -> list[Tensor]:
    parts = [torch.empty(5), torch.empty(64, 2)]
    with dist._coalescing_manager(group, async_ops=True) as pending:
        dist.reduce_scatter_tensor(parts[0], values(rank, 5 * size), group=group)
        dist.reduce_scatter_tensor(parts[1], values(rank, 64 * size, 2), group=group)
    pending.wait()
    return parts


def exchanged(uneven: bool) -> Case:
    def case(group: Any, rank: int, size: int) -> list[Tensor]:
        sent = [rank + to if uneven else 2 for to in range(size)]  # rank 0 sends itself nothing
        received = [source + rank if uneven else 2 for source in range(size)]
        output = torch.empty(sum(received), 3)
        splits = (received, sent) if uneven else (None, None)
        dist.all_to_all_single(output, values(rank, sum(sent), 3), *splits, group=group)
        return [output]

    return case


def exchanged_lists(group: Any, rank: int, size: int) -> list[Tensor]:
    outputs = [torch.empty(source + 1, rank + 1) for source in range(size)]
    inputs = [values(rank + to, rank + 1, to + 1) for to in range(size)]
    if group_is_gloo(group):
        works = [dist.isend(tensor, to, group) for to, tensor in enumerate(inputs) if to != rank]
        for source, tensor in enumerate(outputs):
            if source != rank:
                dist.recv(tensor, source, group)
        outputs[rank].copy_(inputs[rank])
        for work in works:
            assert work is not None
            work.wait()
    else:
        dist.all_to_all(outputs, inputs, group=group)
    return outputs


def ring(group: Any, rank: int, size: int) -> list[Tensor]:
    """All ranks send before they receive, as in a ring of attention; two messages, in order."""
    before, after = (rank - 1) % size, (rank + 1) % size
    received = [torch.empty(100_000), torch.empty(7)]
    operations = [dist.P2POp(dist.isend, values(rank, n), after, group) for n in (100_000, 7)]
    operations += [dist.P2POp(dist.irecv, tensor, before, group) for tensor in received]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def tagged(group: Any, rank: int, size: int) -> list[Tensor]:
    """Messages received in another order than they were sent."""
    received = [torch.empty(3), torch.empty(3)]
    if rank == 0:
        for work in [dist.isend(values(tag, 3), 1, group, tag) for tag in (5, 6)]:
            assert work is not None
            work.wait()
    elif rank == 1:
        dist.recv(received[1], 0, group, 6)
        dist.recv(received[0], 0, group, 5)
        return received
    return []


def scattered_and_collected(group: Any, rank: int, size: int) -> list[Tensor]:
    part = torch.empty(3)
    dist.scatter(part, list(values(9, size, 3)) if rank == 0 else None, 0, group=group)
    parts = [torch.empty(3) for _ in range(size)] if rank == 1 else None
    dist.gather(part + rank, parts, 1, group=group)
    dist.barrier(group)
    return [part, *(parts or [])]


def gathered_objects(group: Any, rank: int, size: int) -> list[Tensor]:
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": other} for other in range(size)]
    return []


CASES: dict[str, Case] = {
    "all-reduce": reduced(),
    "all-reduce, MAX": reduced(dist.ReduceOp.MAX),
    "all-reduce, bf16": reduced(dtype=torch.bfloat16),
    "all-reduce, not contiguous": transposed,
    "all-reduce, coalesced": reduced_coalesced,
    "reduce": reduced_to_one,
    "broadcast": broadcast,
    "all-gather": gathered,
    "all-gather into a tensor": gathered_into_tensor(torch.float32),
    "all-gather into a tensor, FP8": gathered_into_tensor(torch.float8_e4m3fn),
    "all-gather, coalesced": gathered_coalesced(False),
    "all-gather, coalesced by device": gathered_coalesced(True),
    "all-gather, coalesced, of several types": gathered_values_and_scales,
    "reduce-scatter of a tensor": reduce_scattered,
    "reduce-scatter of a list": reduce_scattered_list,
    "reduce-scatter, coalesced": reduce_scattered_coalesced,
    "all-to-all": exchanged(False),
    "all-to-all, uneven": exchanged(True),
    "all-to-all of lists": exchanged_lists,
    "a ring of sends and receives": ring,
    "tags": tagged,
    "scatter, gather, barrier": scattered_and_collected,
    "objects": gathered_objects,
}


def main() -> None:
    register()
    dist.init_process_group(BACKEND)
    rank, size = dist.get_rank(), dist.get_world_size()
    gloo, staged = dist.new_group(backend="gloo"), dist.new_group()
    assert dist.get_backend(staged) == BACKEND
    different = []
    for name, case in CASES.items():
        expected, results = case(gloo, rank, size), case(staged, rank, size)
        if len(results) != len(expected) or not all(map(torch.equal, results, expected)):
            different.append(name)
    assert not different, f"rank {rank}: staged and gloo differ in {different}"
    print(f"{len(CASES)} operations are equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
