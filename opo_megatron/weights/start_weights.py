"""The weights that OPO began with: `<run.dir>/start_weights`, safetensors by Hugging Face name.

Written once, when step 0 is reached, straight from the weight stream: a file per bucket and an index
as Hugging Face writes it, so that no rank ever holds the whole model.  Read back tensor by tensor,
each rank only what its own part of the model is made of.  What was measured against them (the KL of
the policy to its start) so survives a resume, under any parallel layout.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.policy.parallel import Parallel
from opo_megatron.rollout.engine import NamedTensors
from opo_megatron.weights.table import hf_shapes

FOLDER = "start_weights"
INDEX = "model.safetensors.index.json"


class StartWeights:
    """Writes, takes over and reads the start weights of one run.  Called with a name, it gives a tensor."""

    def __init__(self, run_dir: Path, parallel: Parallel, model: ModelConfig, vocab_size: int) -> None:
        self.folder, self.parallel = run_dir / FOLDER, parallel
        self._shapes = hf_shapes(model, vocab_size)
        self._files: dict[str, str] | None = None
        """Name → file, once the index has been read."""

    def write(self, buckets: NamedTensors) -> None:
        """Replace the folder as a whole; a collective of all ranks, of which the first writes."""
        self._files = None
        partial = self._make_partial()
        files: dict[str, str] = {}
        for number, bucket in enumerate(buckets, 1):
            if partial is None:
                continue
            name = f"model-{number:05d}.safetensors"
            # Neighbours of a bucket share storage, which safetensors refuses.
            tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in bucket}
            save_file(tensors, partial / name, metadata={"format": "pt"})
            files |= dict.fromkeys(tensors, name)
        if partial is not None:
            size = sum(path.stat().st_size for path in partial.iterdir())
            index = {"metadata": {"total_size": size}, "weight_map": files}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        self._publish(partial)

    def take_over(self, run_dir: Path) -> None:
        """Go on with the start weights of the run in `run_dir`, copied where that is another run.

        Raises:
            UserError: where they are missing, damaged or another model's; nothing is written then.
        """
        self.check(run_dir)
        self._files = None
        if run_dir.resolve() == self.folder.parent.resolve():
            return
        partial = self._make_partial()
        if partial is not None:
            shutil.copytree(run_dir / FOLDER, partial, dirs_exist_ok=True)
        self._publish(partial)

    def check(self, run_dir: Path) -> None:
        """Refuse what cannot be measured against, from the index and the files' headers alone."""
        folder = run_dir / FOLDER
        files = _read_index(folder)
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(files.values())):
            with _open(folder, file) as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        for name, shape in self._shapes.items():
            if found.get(name) != shape or name not in files:
                raise _unusable(folder, f"{name} is {found.get(name, 'missing')}, not {shape}")

    def __call__(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name: a `WeightSource`."""
        if self._files is None:
            self._files = _read_index(self.folder)
        if name not in self._files:
            raise _unusable(self.folder, f"{name} is missing")
        with _open(self.folder, self._files[name]) as tensors:
            try:
                return tensors.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _unusable(self.folder, f"{name}: {error}") from None

    def _make_partial(self) -> Path | None:
        """An empty folder to write into, on the rank that writes."""
        if self.parallel.rank != 0:
            return None
        partial = self.folder.with_name(FOLDER + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def _publish(self, partial: Path | None) -> None:
        """Give the complete folder its name, before any rank goes on."""
        if partial is not None:
            # A folder cannot replace one that holds something.
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(partial, self.folder)
        dist.barrier(group=self.parallel.cpu_group)


def _read_index(folder: Path) -> dict[str, str]:
    try:
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except FileNotFoundError:
        raise _unusable(folder, f"it has no {INDEX}" if folder.is_dir() else "it does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(folder, f"{INDEX}: {error!r}") from None


def _open(folder: Path, file: str) -> Any:
    try:
        return safe_open(folder / file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _unusable(folder, f"{file}: {error}") from None


def _unusable(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the start weights in {folder}, which observe.kl=eval measures against, cannot be used ({reason}); "
        "bring the folder back, or set observe.kl=off"
    )
