"""The tensors of SGLang's ranks, and how each is cut out of the policy's shards.

An engine of t ranks holds slice e of every tensor on rank e: fused (queries, keys and values; gate and up;
all experts), with the vocabulary padded in its own way.  Where policy and engine have p and t tensor-parallel
ranks, one a multiple of the other, a slice is

    p ≤ t   a part of the shard of one policy rank
    p > t   joined from the shards of p/t consecutive ranks

except where paddings of the vocabulary differ: then it is cut out of all rows.  Of experts, it has those of
the engine rank's own expert-parallel block, wherever the policy holds them.

SGLang copies a slice by name (`load_format=direct`).  An unknown name or shape kills the server, another
type is cast and a missing tensor not noticed, so `check_slices` compares what will be sent with what the
engine has before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.kernels.fp8 import blocks
from opo_megatron.weights.fp8_folder import SCALE_SUFFIX, BlockFp8
from opo_megatron.weights.param_mapping import Parameter, Shape, Stages, parameters
from opo_megatron.weights.safetensors_file import TensorInfo
from opo_megatron.weights.sharding import Sharded, Sharding, Vocabulary


@dataclass(frozen=True)
class EngineSizes:
    """What decides which tensors the ranks of an engine hold."""

    tensor: int
    expert: int = 1
    fp8: BlockFp8 | None = None
    """How its weights are quantized; None where they have the policy's type."""

    @property
    def expert_tensor(self) -> int:
        """Ranks that share an expert."""
        return self.tensor // self.expert


@dataclass(frozen=True)
class PolicySizes:
    """The parallel sizes of a policy that decide what its ranks hold."""

    tensor: int = 1
    expert_tensor: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Cut:
    """One parameter: slices of `engine` ranks out of shards of `policy` ranks."""

    sharding: Sharding
    policy: int
    engine: int

    @property
    def _boundaries_differ(self) -> bool:
        sharding = self.sharding
        return isinstance(sharding, Vocabulary) and not sharding.aligned(self.policy, self.engine)

    @property
    def _rows_of(self) -> Sharding:
        """Padding rows are rows like others where both sides have the same."""
        aligned = isinstance(self.sharding, Vocabulary) and not self._boundaries_differ
        return Sharded(0) if aligned else self.sharding

    @property
    def joins(self) -> bool:
        """Whether a slice needs shards of several policy ranks."""
        is_shard = self.sharding.partition_dim is not None
        return is_shard and self.policy > 1 and (self._boundaries_differ or self.policy > self.engine)

    def sources(self, part: int) -> range | None:
        """The policy ranks whose shards make up slice `part`; None where every rank has it."""
        if self.sharding.partition_dim is None:
            return None
        if self._boundaries_differ:
            return range(self.policy)
        if self.policy > self.engine:
            window = self.policy // self.engine
            return range(part * window, (part + 1) * window)
        owner = part * self.policy // self.engine
        return range(owner, owner + 1)

    def piece(self, shard: Tensor, part: int) -> list[Tensor]:
        """What one source contributes to slice `part`, as rows to be concatenated."""
        if self.joins:
            return [shard]
        sharding, tensors = self._rows_of, self._rows_of.join([shard])
        if self._boundaries_differ:
            return sharding.engine_rows(tensors, part, self.engine)
        per_shard = max(1, self.engine // self.policy)
        return sharding.engine_rows(tensors, part % per_shard, per_shard)

    def rows(self, pieces: Sequence[list[Tensor]], part: int) -> list[Tensor]:
        """Slice `part`, from the pieces of all its sources in order."""
        if not self.joins:
            (rows,) = pieces
            return rows
        tensors = self._rows_of.join([shard for (shard,) in pieces])
        if self._boundaries_differ:
            return self.sharding.engine_rows(tensors, part, self.engine)
        return self._rows_of.engine_rows(tensors, 0, 1)


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of the engine, and the policy's parameters that fill it: one, or one per local expert."""

    name: str
    parameters: tuple[Parameter, ...]

    @property
    def stage(self) -> int:
        return self.parameters[0].stage

    @property
    def is_expert(self) -> bool:
        return self.parameters[0].is_expert

    @property
    def experts(self) -> int:
        """Experts of the whole layer."""
        return sum(len(parameter.tensors) for parameter in self.parameters)

    def cut(self, policy: PolicySizes, engine: EngineSizes) -> Cut:
        sharding = self.parameters[0].sharding
        if self.is_expert:
            return Cut(sharding, policy.expert_tensor, engine.expert_tensor)
        return Cut(sharding, policy.tensor, engine.tensor)

    def part(self, rank: int, engine: EngineSizes) -> int:
        """Which slice of the tensor, or of each of its experts, engine rank `rank` holds."""
        return rank % engine.expert_tensor if self.is_expert else rank

    def own_experts(self, rank: int, engine: EngineSizes) -> range:
        """The experts of engine rank `rank`."""
        each = self.experts // engine.expert
        first = rank // engine.expert_tensor * each
        return range(first, first + each)

    def exchanges(self, policy: PolicySizes, engine: EngineSizes) -> bool:
        """Whether policy ranks send each other parts of their shards."""
        cut = self.cut(policy, engine)
        if not self.is_expert:
            return cut.joins
        return policy.expert > 1 or cut.joins or (engine.expert > 1 and policy.expert_tensor > 1)

    def infos(self, rows: Shape, dtype: torch.dtype, engine: EngineSizes) -> tuple[TensorInfo, ...]:
        """The tensors of every engine rank, from the shape of a slice: in FP8 also the scales."""
        shape = (self.experts // engine.expert, *rows) if self.is_expert else rows
        if not self.is_quantized(engine):
            return (TensorInfo(self.name, shape, dtype),)
        scales = (*shape[:-2], blocks(shape[-2]), blocks(shape[-1]))
        return (
            TensorInfo(self.name, shape, torch.float8_e4m3fn),
            TensorInfo(f"{self.name}{SCALE_SUFFIX}", scales, torch.float32),
        )

    def is_quantized(self, engine: EngineSizes) -> bool:
        names = [name for name, _ in self.parameters[0].tensors[0]]
        return engine.fp8 is not None and all(engine.fp8.quantizes(name) for name in names)


def engine_tensors(mapping: Sequence[Parameter]) -> list[EngineTensor]:
    """The engine's tensors in the order of the mapping; a tied one once."""
    streamed = [parameter for parameter in mapping if not parameter.tied_duplicate]
    groups = groupby(streamed, key=lambda parameter: parameter.engine_name)
    return [EngineTensor(name, tuple(group)) for name, group in groups]


def expected_tensors(
    model: ModelConfig, vocab_size: int, engine: EngineSizes, dtype: torch.dtype
) -> list[TensorInfo]:
    """What every engine rank has, from the model's Hugging Face tensors, whatever the policy's layout."""
    infos: list[TensorInfo] = []
    for tensor in engine_tensors(parameters(model, vocab_size, Stages(model.num_layers))):
        full = [torch.empty(shape, device="meta") for _, shape in tensor.parameters[0].tensors[0]]
        size = engine.expert_tensor if tensor.is_expert else engine.tensor
        rows = tensor.parameters[0].sharding.engine_rows(full, 0, size)
        infos.extend(tensor.infos(shape_of(rows), dtype, engine))
    return infos


def slice_infos(
    tensor: EngineTensor, shard: Shape, dtype: torch.dtype, policy: PolicySizes, engine: EngineSizes
) -> tuple[TensorInfo, ...]:
    """What is sent to every engine rank, cut out of shards of a shape."""
    cut = tensor.cut(policy, engine)
    piece = cut.piece(torch.empty(shard, device="meta"), 0)
    rows = cut.rows([piece] * len(cut.sources(0) or range(1)), 0)
    return tensor.infos(shape_of(rows), dtype, engine)


def shape_of(rows: Sequence[Tensor]) -> Shape:
    """Of their concatenation."""
    return (sum(part.shape[0] for part in rows), *rows[0].shape[1:])


def check_slices(sent: Iterable[TensorInfo], expected: Sequence[TensorInfo]) -> None:
    """Check that every engine rank is sent each of its tensors exactly once, in its shape and type.

    Raises:
        UserError: naming the first tensor that is not.
    """
    names = {info.name for info in expected}
    remaining = {info.name: info for info in expected}
    for info in sent:
        name = info.name
        if name not in names:
            raise _refused(f"which have no tensor {name}")
        if name not in remaining:
            raise _refused(f"which would be sent {name} twice")
        other = remaining.pop(name)
        if info.shape != other.shape:
            raise _refused(f"whose {name} is {list(other.shape)}, not {list(info.shape)}")
        if info.dtype != other.dtype:
            raise _refused(f"whose {name} has type {_words(other.dtype)}, not {_words(info.dtype)}")
    if remaining:
        raise _refused(f"which would not be sent {next(iter(remaining))}")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refused(what: str) -> UserError:
    return UserError(
        f"the weights cannot be sent as slices to the ranks of an SGLang server, {what}; set "
        "rollout.sglang.layout=full"
    )
