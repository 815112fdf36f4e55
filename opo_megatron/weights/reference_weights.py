"""The reference weights of the KL, OPO's initial weights: `<run.dir>/start_weights`, in Hugging Face format.

Written once at step 0, directly from the weight stream, so that no rank holds the whole model; each rank
reads back only the slices of its own shards.  So the KL to the initial policy keeps its reference when a
run resumes, under any parallel layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.errors import UnreadableWeights, UserError
from opo_megatron.utils.atomic_dir import atomic_dir
from opo_megatron.weights.hf_folder import HfWriter, read_weights
from opo_megatron.weights.param_mapping import Stages, parameters
from opo_megatron.weights.safetensors_file import StoredTensor, TensorInfo
from opo_megatron.weights.sharding import Sliceable
from opo_megatron.weights.stream import NamedTensors

FOLDER = "start_weights"


class ReferenceWeights:
    """Writes, copies and reads the reference weights of one run.  A `WeightSource`: call it with a name."""

    def __init__(self, run_dir: Path, parallel: Parallel, model: ModelConfig, vocab_size: int) -> None:
        self.folder, self.parallel = run_dir / FOLDER, parallel
        self._model = replace(model, vocab_size=vocab_size)
        self._stored: dict[str, StoredTensor] | None = None
        """By name; None before the files' headers are read."""

    def write(self, buckets: NamedTensors) -> None:
        """Replace the folder atomically; a collective of all ranks, where rank 0 writes."""
        self._stored = None
        with self._new_folder() as partial:
            stream = iter(buckets)
            first = next(stream)
            if self.parallel.rank > 0:
                for _ in stream:
                    pass
                return
            with HfWriter(partial, self._infos(first[0][1].dtype)) as writer:
                for bucket in chain([first], stream):
                    for name, tensor in bucket:
                        writer.write(name, tensor)

    @contextmanager
    def _new_folder(self) -> Iterator[Path]:
        """The new folder, which rank 0 moves into place before any rank continues."""
        with atomic_dir(self.folder, is_writer=self.parallel.rank == 0, replaces=True) as partial:
            yield partial
        dist.barrier(group=self.parallel.cpu_group)

    def _infos(self, dtype: torch.dtype) -> list[TensorInfo]:
        """Every tensor in streaming order, which depends on the number of expert-parallel ranks."""
        assert self._model.vocab_size is not None
        stages, experts = Stages(self._model.num_layers), self.parallel.ep_size
        mapping = parameters(self._model, self._model.vocab_size, stages, experts)
        return [
            TensorInfo(name, shape, dtype)
            for parameter in mapping
            for rank in parameter.tensors
            for name, shape in rank
        ]

    def adopt(self, run_dir: Path) -> None:
        """Use the reference weights of the run in `run_dir`, copied if that is another run.

        Raises:
            UserError: where they are missing, damaged or of another model; then nothing is written.
        """
        self.check(run_dir)
        self._stored = None
        if run_dir.resolve() == self.folder.parent.resolve():
            return
        with self._new_folder() as partial:
            if self.parallel.rank == 0:
                shutil.copytree(run_dir / FOLDER, partial, dirs_exist_ok=True)

    def check(self, run_dir: Path) -> None:
        """Check the files' headers in the run `run_dir`; raises as `adopt`."""
        self._read(run_dir / FOLDER)

    def __call__(self, name: str) -> Sliceable:
        """A stored tensor by its Hugging Face name."""
        if self._stored is None:
            self._stored = self._read(self.folder)
        return _Slices(self._stored[name], self.folder)

    def _read(self, folder: Path) -> dict[str, StoredTensor]:
        if not folder.is_dir():
            raise _unusable(folder, "it does not exist")
        try:
            return read_weights(folder, self._model, "the recipe")
        except UserError as error:
            raise _unusable(folder, error) from None


@dataclass(frozen=True)
class _Slices:
    """A stored tensor; reports a file that was lost after its header was read."""

    stored: StoredTensor
    folder: Path

    @property
    def shape(self) -> Sequence[int]:
        return self.stored.shape

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self.stored[index]
        except (UserError, OSError) as error:
            raise _unusable(self.folder, error) from None


def _unusable(folder: Path, reason: object) -> UserError:
    # The remedy for published files (download again) does not apply here.
    reason = reason.reason if isinstance(reason, UnreadableWeights) else reason
    return UserError(
        f"the reference weights in {folder}, which observe.kl=eval needs, cannot be used ({reason}); "
        "restore the folder, or set observe.kl=off"
    )
