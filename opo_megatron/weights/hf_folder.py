"""Hugging Face folders: check all tensors before reading any, and write new folders tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from opo_megatron.config.architecture import hf_config
from opo_megatron.config.json_fields import read_json_object
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UnreadableWeights, UserError
from opo_megatron.weights.param_mapping import EMBEDDING, HEAD, hf_shapes
from opo_megatron.weights.safetensors_file import FileWriter, StoredTensor, TensorInfo, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
DEFAULT_SHARD_BYTES = 4 * 2**30

_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
)
"""Other files of a usable model, copied unchanged."""


def read_weights(
    folder: Path, model: ModelConfig, described_by: str = "its config.json"
) -> dict[str, StoredTensor]:
    """Every tensor of the model by its name; only headers are read.

    Args:
        model: resolved, with its vocabulary.
        described_by: the source of `model`, for error messages.

    Raises:
        UserError: naming a file or tensor that is missing, truncated, unexpected or of the wrong shape.
    """
    assert model.vocab_size is not None
    expected = hf_shapes(model, model.vocab_size)
    stored: dict[str, StoredTensor] = {}
    for path, names in _files(folder).items():
        tensors = read_header(path)
        if missing_in_file := sorted((names or set()) - tensors.keys()):
            raise UnreadableWeights(f"{path} lacks {missing_in_file[0]}, which the index places in it")
        if duplicates := sorted(stored.keys() & tensors.keys()):
            reason = f"{path} and {stored[duplicates[0]].path} both hold {duplicates[0]}"
            raise UnreadableWeights(reason, "download them again")
        stored |= tensors
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{folder} lacks {_summary(missing)}, which {described_by} requires")
    if extra := sorted(name for name in stored.keys() - expected.keys() if not _is_ignored(name, model)):
        raise UserError(f"{folder} holds {_summary(extra)}, which {described_by} does not have")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].path} holds {name} with shape {list(stored[name].shape)}, but "
                f"{described_by} requires {list(shape)}"
            )
    return {name: stored[name] for name in expected}


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files → their tensors according to the index, None without an index."""
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8-sig"))["weight_map"]
            files: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                placed = files.setdefault(folder / file, set())
                assert placed is not None
                placed.add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnreadableWeights(f"{folder / INDEX} cannot be read ({error})") from None
        for path in files:
            if not path.exists():
                raise UnreadableWeights(f"{path} is missing, which {INDEX} names")
        return files
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    raise _no_weights(folder)


def _no_weights(folder: Path) -> UnreadableWeights:
    """Why a folder's weights are not found: what is there instead."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards := [name for name in names if _SHARD.search(name)]:
        reason = f"{folder} has weights in shards ({shards[0]}) without {INDEX}, which says what is in which"
        return UnreadableWeights(reason, f"download {INDEX} too")
    if ADAPTER in names:
        reason = f"{folder} has an adapter ({ADAPTER}), not a whole model"
        return UnreadableWeights(reason, "merge it into its base model, and name that folder")
    if names:
        reason = f"{folder} has {names[0]}, but neither {WEIGHTS} nor {INDEX}"
        return UnreadableWeights(reason, f"rename a file that holds all weights to {WEIGHTS}")
    hint = "; weights in other formats are not read" if any(folder.glob("*.bin")) else ""
    reason = f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}"
    return UnreadableWeights(reason, "name a folder with safetensors")


def _is_ignored(name: str, model: ModelConfig) -> bool:
    """Tensors that some files hold but no model reads: a tied LM head, rotary frequencies of old Llamas."""
    return (name == HEAD and model.tie_embeddings) or name.endswith("rotary_emb.inv_freq")


def _summary(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


class HfWriter:
    """Writes tensors into files of limited size, one by one; the index comes last.

    A thread writes a tensor while the next one is computed, so two are in memory.  As a context manager it
    calls `finish` at the end, and only closes its file after an error.
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorInfo], shard_bytes: int = DEFAULT_SHARD_BYTES):
        """
        Args:
            folder: exists, empty.
            tensors: in the order of the `write` calls.
            shard_bytes: maximum data bytes per file; a larger tensor has its own file.
        """
        self._folder = folder
        self._shards = _shards(tensors, shard_bytes)
        count = len(self._shards)
        self._names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            self._names = [WEIGHTS]
        self._current = -1
        self._writer: FileWriter | None = None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; its memory must not change until the next call."""
        self._wait()
        if self._writer is None or self._writer.is_complete:
            self._advance()
        assert self._writer is not None
        self._pending = self._thread.submit(self._writer.write, name, tensor)

    def _wait(self) -> None:
        """Wait for the last tensor; re-raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _advance(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._current += 1
        path = self._folder / self._names[self._current]
        self._writer = FileWriter(path, self._shards[self._current])

    def close(self) -> None:
        """Close the open file, complete or not."""
        self._thread.shutdown()
        if self._writer is not None:
            self._writer.close()

    def finish(self) -> None:
        """Close the last file and write the index.

        Raises:
            ValueError: when an announced tensor was not written.
        """
        self._wait()
        self.close()
        if self._current + 1 < len(self._shards) or self._writer is None or not self._writer.is_complete:
            raise ValueError("not all tensors were written")
        if len(self._shards) == 1:
            return
        placed = zip(self._shards, self._names, strict=True)
        weight_map = {info.name: name for shard, name in placed for info in shard}
        total = sum(info.nbytes for shard in self._shards for info in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def write_companions(
    target: Path,
    model: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    *sources: Path | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, generation settings and tokenizer, which make `target` a complete model.

    Args:
        dtypes: of the weights, by tensor name; config.json gets that of the embedding.
        sources: folders to copy from, the first with a file wins; without any config.json, one is
            written from `model`.
        quantization: the `quantization_config` of config.json.
    """
    dtype = str(dtypes[EMBEDDING]).removeprefix("torch.")
    folders = [source for source in sources if source is not None]
    source = next((folder / "config.json" for folder in folders if (folder / "config.json").exists()), None)
    raw = hf_config(model, dtype) if source is None else read_json_object(source)
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    changed = raw | ({key: dtype} if raw.get(key, dtype) != dtype else {})
    if quantization is not None:
        changed["quantization_config"] = dict(quantization)
    if source is not None and changed == raw:
        shutil.copyfile(source, target / "config.json")
    else:
        (target / "config.json").write_text(_json(changed))
    copy_companions(target, folders)


def copy_companions(target: Path, folders: Sequence[Path]) -> None:
    """Copy generation settings and tokenizer that `target` lacks; the first folder wins."""
    for folder in folders:
        for path in sorted({path for pattern in _COMPANIONS for path in folder.glob(pattern)}):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
