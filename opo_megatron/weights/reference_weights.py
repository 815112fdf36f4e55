"""The weights that OPO began with: `<run.dir>/start_weights`, safetensors by Hugging Face name.

Written once, when step 0 is reached, straight from the weight stream, so that no rank ever holds the
whole model.  Read back slice by slice, each rank only what its own part of the model is made of.  What
was measured against them (the KL of the policy to its start) so survives a resume, under any parallel
layout.
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
    """Writes, takes over and reads the start weights of one run.  Called with a name, it gives a tensor."""

    def __init__(self, run_dir: Path, parallel: Parallel, model: ModelConfig, vocab_size: int) -> None:
        self.folder, self.parallel = run_dir / FOLDER, parallel
        self._model = replace(model, vocab_size=vocab_size)
        self._stored: dict[str, StoredTensor] | None = None
        """By name, once the files' headers have been read."""

    def write(self, buckets: NamedTensors) -> None:
        """Replace the folder as a whole; a collective of all ranks, of which the first writes."""
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
        """What takes the folder's place, on the first rank, before any rank goes on."""
        with atomic_dir(self.folder, is_writer=self.parallel.rank == 0, replaces=True) as partial:
            yield partial
        dist.barrier(group=self.parallel.cpu_group)

    def _infos(self, dtype: torch.dtype) -> list[TensorInfo]:
        """Every tensor, in the order of the stream, which that of the experts' ranks is part of."""
        assert self._model.vocab_size is not None
        stages, experts = Stages(self._model.num_layers), self.parallel.ep_size
        table = parameters(self._model, self._model.vocab_size, stages, experts)
        return [
            TensorInfo(name, shape, dtype) for row in table for rank in row.tensors for name, shape in rank
        ]

    def take_over(self, run_dir: Path) -> None:
        """Go on with the start weights of the run in `run_dir`, copied where that is another run.

        Raises:
            UserError: where they are missing, damaged or another model's; nothing is written then.
        """
        self.check(run_dir)
        self._stored = None
        if run_dir.resolve() == self.folder.parent.resolve():
            return
        with self._new_folder() as partial:
            if self.parallel.rank == 0:
                shutil.copytree(run_dir / FOLDER, partial, dirs_exist_ok=True)

    def check(self, run_dir: Path) -> None:
        """Refuse what cannot be measured against, from the files' headers alone."""
        self._read(run_dir / FOLDER)

    def __call__(self, name: str) -> Sliceable:
        """A tensor in the files, by its Hugging Face name: a `WeightSource`."""
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
    """A tensor whose file may have been lost since its header was read."""

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
    # What published files are mended by does not mend these.
    reason = reason.reason if isinstance(reason, UnreadableWeights) else reason
    return UserError(
        f"the start weights in {folder}, which observe.kl=eval measures against, cannot be used ({reason}); "
        "bring the folder back, or set observe.kl=off"
    )
