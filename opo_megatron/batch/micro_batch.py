"""Ragged rollouts → micro-batches under a token budget, balanced over data-parallel ranks.

Sequences are rows padded on the right, or concatenated in a single row (`packing.py`).  The schedule is
computed from all lengths of the batch, identically on every rank, and also assigns samples to
data-parallel ranks.  All ranks have the same number of micro-batches.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from opo_megatron.batch.packing import bin_pack, context_positions, packed_params, segments_of
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.choices import Packing
from opo_megatron.config.schema import PolicyConfig

MICRO_BATCH_TOKENS = 100
"""Fixed cost of a micro-batch, in tokens: kernel launches, or Python on a CPU."""


@dataclass(frozen=True)
class MicroBatchPlan:
    """The samples of every micro-batch of every data-parallel rank."""

    assignment: list[list[list[int]]]
    """[data-parallel rank][micro-batch][sequence] → sample; an empty micro-batch has no sequences."""
    shape: tuple[int, int] | None = None
    """(rows, padded length) of every micro-batch where the pipeline schedule needs one shape, else None.
    Lengths exclude the last token of a sequence, which is only a target."""
    packed: bool = False
    """Whether the sequences of a micro-batch are concatenated in a single row."""
    alignment: int = 1
    """Packed sequences are padded to a multiple of this."""
    forward_only: MicroBatchPlan | None = None
    """Schedule of samples that run forward only, after the others: measured, not trained on."""

    def samples_of(self, dp_rank: int) -> list[int]:
        """The samples of a data-parallel rank, in the order of its micro-batches."""
        own = [sample for rows in self.assignment[dp_rank] for sample in rows]
        return own if self.forward_only is None else own + self.forward_only.samples_of(dp_rank)

    @property
    def count(self) -> int:
        """Micro-batches per data-parallel rank that run forward and backward."""
        return len(self.assignment[0])

    def padded_tokens(self, lengths: Sequence[int], multiple: int = 1, token_multiple: int = 1) -> list[int]:
        """Tokens of each rank's micro-batches, padding included, for sequences of `lengths` tokens.

        Args:
            multiple, token_multiple: as in `build_micro_batches`.
        """

        def size(rows: list[int]) -> int:
            needed = [padded_length(lengths[i], self.alignment) for i in rows]
            return math.prod(_shape(needed, self, multiple, token_multiple))

        return [sum(map(size, batches)) for batches in self.assignment]


def schedule_for(policy: PolicyConfig, lengths: Sequence[int], dp_size: int) -> MicroBatchPlan:
    """The schedule for a recipe's pipeline, token budget and packing."""
    interleaved = policy.virtual_pipeline_model_parallel_size is not None
    return schedule_micro_batches(
        lengths,
        dp_size,
        policy.max_tokens_per_micro_batch,
        fixed_shape=interleaved,
        multiple=policy.pipeline_model_parallel_size if interleaved else 1,
        packed=policy.packing is Packing.thd,
        alignment=sequence_alignment(policy),
    )


def sequence_alignment(policy: PolicyConfig) -> int:
    """Alignment of packed sequences, which gives context-parallel ranks equal chunks."""
    return 1 if policy.context_parallel_size == 1 else 2 * policy.context_parallel_size


def padded_length(length: int, alignment: int) -> int:
    """Padded length of a sequence of `length` tokens, without the last one, which is only a target."""
    needed = max(0, length - 1)
    return needed + -needed % alignment


def schedule_micro_batches(
    lengths: Sequence[int],
    dp_size: int,
    max_tokens: int,
    fixed_shape: bool = False,
    multiple: int = 1,
    packed: bool = False,
    alignment: int = 1,
) -> MicroBatchPlan:
    """Split samples of `lengths` tokens into micro-batches of at most `max_tokens` padded tokens.

    Samples are assigned in descending length, each to the least loaded rank, which balances tokens (with
    one shape for all: rows) over ranks.  Samples of similar length share a micro-batch, which keeps
    padding low.

    Args:
        fixed_shape: one shape for all (interleaved pipeline schedules cannot communicate shapes).
        multiple: the number of micro-batches per rank is a multiple of this.
        packed: concatenate sequences without padding, in micro-batches of nearly equal size.
        alignment: packed sequences are padded to a multiple of this.
    """
    if packed:
        needed = [padded_length(length, alignment) for length in lengths]
        if fixed_shape:
            max_tokens = max([max_tokens, *needed])
        assigned, width = bin_pack(needed, dp_size, max_tokens, multiple)
        return MicroBatchPlan(assigned, (1, width) if fixed_shape else None, packed=True, alignment=alignment)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [(0, rank) for rank in range(dp_size)]
    for sample in order:
        load, rank = heapq.heappop(loads)
        per_rank[rank].append(sample)
        heapq.heappush(loads, (load + (1 if fixed_shape else lengths[sample]), rank))
    if fixed_shape:
        longest = max(lengths, default=1)
        rows = max(1, max_tokens // longest)
        pieces = [[assigned[i : i + rows] for i in range(0, len(assigned), rows)] for assigned in per_rank]
    else:
        pieces = [partition(assigned, lengths, max_tokens) for assigned in per_rank]
    count = max(1, *(len(p) for p in pieces))
    count += -count % multiple
    if not fixed_shape:
        for piece in pieces:
            _split_until(piece, count)
    padded = [piece + [[] for _ in range(count - len(piece))] for piece in pieces]
    return MicroBatchPlan(padded, (rows, max(1, longest - 1)) if fixed_shape else None)


def partition(assigned: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split samples of descending length into runs of least cost; the first of a run sets its padded length.

    The cost of a run is rows × padded length + `MICRO_BATCH_TOKENS`.  Dynamic programming:
    best[i] = min over j < i of best[j] + cost(assigned[j:i]).
    """
    best, start = [0], [0]
    for i in range(1, len(assigned) + 1):
        least, split = math.inf, i - 1
        for j in range(i - 1, -1, -1):
            padded = lengths[assigned[j]] * (i - j)
            if padded > max_tokens and i - j > 1:
                break
            if best[j] + padded < least:
                least, split = best[j] + padded, j
        best.append(int(least) + MICRO_BATCH_TOKENS)
        start.append(split)
    pieces: list[list[int]] = []
    end = len(assigned)
    while end > 0:
        pieces.append(assigned[start[end] : end])
        end = start[end]
    return pieces[::-1]


def _split_until(pieces: list[list[int]], count: int) -> None:
    """Halve the largest piece until there are `count` pieces or none can be halved."""
    while len(pieces) < count:
        largest = max(range(len(pieces)), key=lambda i: len(pieces[i]), default=None)
        if largest is None or len(pieces[largest]) < 2:
            return
        rows = pieces[largest]
        pieces[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


@dataclass
class MicroBatch:
    """Model inputs and loss positions of this context-parallel rank."""

    tokens: Tensor
    """[b, s] input ids: rows padded on the right, or one row of packed sequences or this rank's shard."""
    position_ids: Tensor
    """[b, s], from 0 in every sequence."""
    loss_positions: Tensor
    """[n] flat positions in [b, s] whose next token is a response token, sequence by sequence."""
    targets: Tensor
    """[n] those response tokens."""
    token_indices: Tensor
    """[n] their indices among all response tokens of the data-parallel replica."""
    columns: dict[str, Tensor]
    """Their per-token columns, [n] each."""
    packed: PackedSeqParams | None = None
    """Boundaries of packed sequences."""
    routed_experts: Tensor | None = None
    """[b, s, layers, k]: the experts that the engine took for each token; padding has any tokens'."""


def build_micro_batches(
    batch: Rollouts,
    schedule: MicroBatchPlan,
    dp_rank: int,
    columns: dict[str, Tensor],
    multiple: int,
    device: torch.device,
    token_multiple: int = 1,
    context: tuple[int, int] = (0, 1),
) -> list[MicroBatch]:
    """The micro-batches of one rank.

    Args:
        batch: the samples `schedule.samples_of(dp_rank)`, in that order.
        columns: per-token columns [Σl] in the order of `batch`.
        multiple: the padded length is a multiple of this.
        token_multiple: rows × padded length is a multiple of this.
        context: (rank, size) of context parallelism, which requires packed sequences.
    """
    sequences = batch.sequences()
    lengths = batch.response_lengths.tolist()
    responses = batch.response_tokens.split(lengths)
    token_indices = torch.arange(batch.response_tokens.numel()).split(lengths)
    ragged = {name: values.split(lengths) for name, values in columns.items()}
    response_positions = batch.response_positions().split(lengths)
    experts: Sequence[Tensor] = ()
    if batch.routed_experts is not None:
        experts = batch.routed_experts.split(batch.input_lengths.tolist())
    micro_batches, begin = [], 0
    for rows in schedule.assignment[dp_rank]:
        part = range(begin, begin + len(rows))
        begin += len(rows)
        inputs = [sequences[i][:-1] for i in part]  # the last token of a sequence is only a target
        needed = [padded_length(sequences[i].numel(), schedule.alignment) for i in part]
        height, width = _shape(needed, schedule, multiple, token_multiple)
        starts = [sum(needed[:k]) if schedule.packed else k * width for k in range(len(needed))]
        tokens = torch.zeros(height * width, dtype=torch.int64)
        loss_positions = []
        for i, start, one in zip(part, starts, inputs, strict=True):
            tokens[start : start + one.numel()] = one
            loss_positions.append(start + response_positions[i] - 1)
        segments = segments_of(needed, width) if schedule.packed else [width] * height
        positions = torch.cat([torch.arange(length) for length in segments])
        micro = MicroBatch(
            tokens=tokens.view(height, width),
            position_ids=positions.view(height, width),
            loss_positions=_concat(loss_positions, torch.int64),
            targets=_concat([responses[i] for i in part], torch.int64),
            token_indices=_concat([token_indices[i] for i in part], torch.int64),
            columns={
                name: _concat([values[i] for i in part], torch.float32) for name, values in ragged.items()
            },
            packed=packed_params(segments, device, context[1]) if schedule.packed else None,
        )
        if batch.routed_experts is not None:
            own_experts = [experts[i] for i in part]
            none = batch.routed_experts[:0]
            micro.routed_experts = _padded_experts(own_experts, starts, (height, width), none)
        if context[1] > 1:
            micro = cp_shard(micro, context_positions(segments, *context))
        micro_batches.append(to_device(micro, device))
    return micro_batches


def _padded_experts(parts: list[Tensor], starts: list[int], shape: tuple[int, int], none: Tensor) -> Tensor:
    """[b, s, layers, k] of sequences that begin at `starts` of the flat micro-batch.

    Padding goes through the routers as well and needs k distinct experts: it takes those of real tokens in
    turn, which loads the experts as they do.

    Args:
        none: the experts of no token.
    """
    real = torch.cat([none, *parts])
    if not len(real):
        real = torch.arange(real.shape[2], dtype=real.dtype).expand(1, *real.shape[1:])
    padded = real[torch.arange(shape[0] * shape[1]) % len(real)]
    for start, one in zip(starts, parts, strict=True):
        padded[start : start + len(one)] = one
    return padded.view(*shape, *real.shape[1:])


def cp_shard(micro: MicroBatch, held: Tensor) -> MicroBatch:
    """The shard of a context-parallel rank that holds the positions `held` of the row."""
    local = torch.full((micro.tokens.numel(),), -1)
    local[held] = torch.arange(held.numel())
    loss_positions = local[micro.loss_positions]
    own = loss_positions >= 0
    return replace(
        micro,
        tokens=micro.tokens[:, held],
        position_ids=micro.position_ids[:, held],
        loss_positions=loss_positions[own],
        targets=micro.targets[own],
        token_indices=micro.token_indices[own],
        routed_experts=None if micro.routed_experts is None else micro.routed_experts[:, held],
        columns={name: values[own] for name, values in micro.columns.items()},
    )


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    tensors = {
        field.name: value.to(device)
        for field in fields(micro)
        if isinstance(value := getattr(micro, field.name), Tensor)
    }
    columns = {name: values.to(device) for name, values in micro.columns.items()}
    return replace(micro, **tensors, columns=columns)


def _shape(
    needed: Sequence[int], schedule: MicroBatchPlan, multiple: int, token_multiple: int
) -> tuple[int, int]:
    """(rows, padded length) of a micro-batch whose sequences have the padded lengths `needed`."""
    if schedule.shape is not None:
        height, width = schedule.shape
    elif schedule.packed:
        height, width = 1, sum(needed)
    else:
        height, width = len(needed), max(needed, default=0)
    height, width = max(1, height), max(1, width)
    alignment = math.lcm(multiple, schedule.alignment, token_multiple // math.gcd(token_multiple, height))
    return height, width + -width % alignment


def _concat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).to(dtype) if parts else torch.empty(0, dtype=dtype)
