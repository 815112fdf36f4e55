"""Conversion between Hugging Face folders and Megatron checkpoints, one tensor in memory at a time.

`convert` and `export` are collectives of all ranks of the parallel layout; each rank reads its own shards,
and in `convert` writes them too.  `verify` runs both models on the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.checkpoint.weights import CheckpointShards, build_meta_chunks, save_weights
from opo_megatron.config.schema import Config, ModelConfig
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.errors import UserError
from opo_megatron.policy.model import padded_vocab_size
from opo_megatron.policy.policy import Policy
from opo_megatron.utils.atomic_dir import new_folder
from opo_megatron.weights.fp8_folder import BlockFp8
from opo_megatron.weights.hf_folder import HfWriter, read_weights, write_companions
from opo_megatron.weights.param_mapping import Parameter, Stages, parameters
from opo_megatron.weights.safetensors_file import TensorInfo
from opo_megatron.weights.stream import Bucket, read_shard, stream_weights

BUCKET_BYTES = 32 * 2**20
"""Size of a bucket sent between ranks, unless one tensor is larger."""

VERIFY_LENGTHS = (3, 9, 17, 32)
VERIFY_TOLERANCE = 1e-3
"""Maximum |Δ log-probability| in float32; about 1e-5 is typical on CPUs."""

Log = Callable[[str], None]


def convert(
    source: Path, target: Path, config: Config, parallel: Parallel, dtype: torch.dtype | None, log: Log
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint, which `policy.init_from` reads.

    Args:
        dtype: of the written weights; None keeps each tensor's.
    """
    model, policy = config.policy.model, config.policy
    stored = read_weights(source, model)

    def dtype_of(parameter: Parameter) -> torch.dtype:
        return dtype or stored[parameter.tensors[0][0][0]].dtype

    mapping = _param_mapping(config, parallel)
    _check_types(mapping, {name: tensor.dtype for name, tensor in stored.items()})
    progress = _Progress(_bytes(mapping, dtype_of) // parallel.world_size, "read", log)

    def read(parameter: Parameter) -> Tensor:
        shard = read_shard(parameter, parallel, stored.__getitem__)
        progress.add(shard.nbytes)
        return shard

    assert model.vocab_size is not None
    with new_folder(target, is_writer=parallel.rank == 0) as partial:
        chunks = build_meta_chunks(policy, model.vocab_size, parallel)
        save_weights(partial, chunks, mapping, parallel, read, dtype_of)
        if parallel.rank == 0:
            write_companions(partial, model, {n: dtype or t.dtype for n, t in stored.items()}, source)


def export(
    source: Path,
    target: Path,
    config: Config,
    parallel: Parallel,
    dtype: torch.dtype | None,
    shard_bytes: int,
    companions: Sequence[Path | None],
    log: Log,
    blocks: BlockFp8 | None = None,
) -> None:
    """Export a Megatron checkpoint, of a run or converted, to a Hugging Face folder.

    Args:
        dtype: of the written weights; None keeps each parameter's.
        companions: folders that may have config.json and a tokenizer.
        blocks: FP8 quantization of the layers' matrices.
    """
    model, mapping = config.policy.model, _param_mapping(config, parallel)
    assert model.vocab_size is not None
    chunks = build_meta_chunks(config.policy, model.vocab_size, parallel)
    shards = CheckpointShards(source, chunks, mapping, parallel)
    infos = [
        TensorInfo(name, shape, dtype or shards.dtype(parameter))
        for parameter in mapping
        if not parameter.tied_duplicate
        for rank in parameter.tensors
        for name, shape in rank
    ]
    stream = stream_weights(shards, mapping, parallel, BUCKET_BYTES, to="rank0")
    if parallel.rank > 0:
        for _ in stream:
            pass
        return
    with new_folder(target) as partial:
        write_hf_folder(partial, model, infos, stream, shard_bytes, companions, log, blocks)


def write_hf_folder(
    folder: Path,
    model: ModelConfig,
    infos: Sequence[TensorInfo],
    stream: Iterator[Bucket],
    shard_bytes: int,
    companions: Sequence[Path | None],
    log: Log,
    blocks: BlockFp8 | None = None,
) -> None:
    """Write a weight stream in the order of `infos` to an empty folder."""
    dtypes = {info.name: info.dtype for info in infos}
    quantization = None if blocks is None else blocks.config
    write_companions(folder, model, dtypes, *companions, quantization=quantization)
    written = infos if blocks is None else blocks.infos(infos)
    types = {info.name: info.dtype for info in written}
    progress = _Progress(sum(info.nbytes for info in written), "written", log)
    with HfWriter(folder, written, shard_bytes) as writer:
        for name, tensor in (named for bucket in stream for named in bucket):
            for part, values in [(name, tensor)] if blocks is None else blocks.tensors(name, tensor):
                writer.write(part, values.to(types[part]))
                progress.add(values.numel() * types[part].itemsize)


def verify(checkpoint: Path, hf_folder: Path, config: Config, parallel: Parallel) -> float | None:
    """Largest |Δ log-probability| between both models on a few random prompts, in float32.

    Returns:
        None on all ranks but rank 0.

    Raises:
        UserError: without transformers, or if the models differ.
    """
    transformers = _transformers() if parallel.rank == 0 else None
    model = config.policy.model
    assert model.vocab_size is not None
    longest = min(model.max_sequence_length, max(VERIFY_LENGTHS))
    config = replace(config, policy=replace(config.policy, model=replace(model, max_sequence_length=longest)))
    policy = Policy(config, model.vocab_size, parallel, config.optimizer, None)
    policy.set_weights(CheckpointShards(checkpoint, policy.chunks, policy.param_mapping, parallel))
    rng = random.Random(0)
    rows = [[rng.randrange(model.vocab_size) for _ in range(min(n, longest))] for n in VERIFY_LENGTHS]
    batch = Rollouts.from_demonstrations([row[:1] for row in rows], [row[1:] for row in rows])
    schedule = policy.schedule(batch.sequence_lengths)
    log_probs = policy.log_probs(batch.select(schedule.samples_of(parallel.dp_rank)), schedule, 1.0)
    if transformers is None:
        return None
    transformers.utils.logging.disable_progress_bar()
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        hf_folder, dtype=torch.float32, local_files_only=True
    ).eval()
    expected = []
    with torch.no_grad():
        for row in (rows[i] for i in schedule.samples_of(parallel.dp_rank)):
            logits = hf_model(torch.tensor([row])).logits[0, :-1].double()
            expected.append(logits.log_softmax(-1).gather(1, torch.tensor(row[1:]).unsqueeze(1))[:, 0])
    largest = float((log_probs - torch.cat(expected)).abs().max())
    if not largest <= VERIFY_TOLERANCE:
        raise UserError(
            f"the log-probabilities of {checkpoint} and {hf_folder} differ by {largest:.2g}, more than "
            f"{VERIFY_TOLERANCE:g}; do not use the result"
        )
    return largest


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("--verify compares with transformers; run pip install 'opo-megatron[data]'") from None
    return transformers


def _param_mapping(config: Config, parallel: Parallel) -> list[Parameter]:
    model = config.policy.model
    assert model.vocab_size is not None
    padded = padded_vocab_size(config.policy, model.vocab_size, parallel.dp_size)
    stages = Stages(model.num_layers, parallel.pp_size, parallel.vpp_size)
    return parameters(model, model.vocab_size, stages, parallel.ep_size, padded)


def _check_types(mapping: Sequence[Parameter], dtypes: dict[str, torch.dtype]) -> None:
    """Check that all tensors of each Megatron parameter have the same type."""
    for parameter in mapping:
        names = [name for rank in parameter.tensors for name, _ in rank]
        for name in names:
            if dtypes[name] != dtypes[names[0]]:
                raise UserError(
                    f"{names[0]} is stored as {dtypes[names[0]]} and {name} as {dtypes[name]}, which become "
                    "one parameter; choose a type with --dtype"
                )


def _bytes(mapping: Sequence[Parameter], dtype_of: Callable[[Parameter], torch.dtype]) -> int:
    return sum(p.numel * dtype_of(p).itemsize for p in mapping if not p.tied_duplicate)


class _Progress:
    """Logs one line per tenth of the bytes."""

    def __init__(self, total: int, verb: str, log: Log) -> None:
        self._total, self._verb, self._log, self._done, self._logged = total, verb, log, 0, 0

    def add(self, count: int) -> None:
        self._done += count
        tenth = min(10, 10 * self._done // max(1, self._total))
        if tenth > self._logged:
            self._logged = tenth
            done = min(self._done, self._total)
            self._log(f"{10 * tenth:3d} %  {done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB {self._verb}")
