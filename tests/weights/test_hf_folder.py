"""Hugging Face folders: slices, checks before loading, no partial folders."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opo_megatron.errors import UserError
from opo_megatron.utils.atomic_dir import new_folder
from opo_megatron.weights import safetensors_file
from opo_megatron.weights.hf_folder import INDEX, WEIGHTS, HfWriter, read_weights
from opo_megatron.weights.safetensors_file import FileWriter, TensorInfo, read_header
from tests.support.hf_models import (
    LLAMA,
    QWEN3,
    VOCAB_SIZE,
    assert_same_tensors,
    save_random_model,
    tensors_of,
)

MODEL = replace(LLAMA, vocab_size=VOCAB_SIZE)
TIED = replace(QWEN3, vocab_size=VOCAB_SIZE)
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random_model("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_random_model("llama", tmp_path, shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces tensors of an unsharded folder; None removes one."""
    tensors = load_file(folder / WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


# ---------------------------------------------------------------------- slices


@pytest.mark.parametrize("scratch", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_of_a_file_are_slices_of_its_tensor(
    dtype: torch.dtype, scratch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "SCRATCH_BYTES", scratch)
    full = torch.randn(13, 9).to(dtype)
    save_file({"a": torch.ones(3), "b": full}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["b"]
    assert (stored.shape, stored.dtype) == ((13, 9), dtype)
    for index in (
        slice(None),
        slice(4, 9),
        slice(4, 4),
        slice(13, 13),
        (slice(None), slice(3, 8)),
        (slice(2, 5), slice(None)),
        (slice(2, 5), slice(0, 1)),
    ):
        assert torch.equal(stored[index], full[index])


def test_written_files_are_read_by_safetensors_and_by_read_header(tmp_path: Path) -> None:
    tensors = {
        "x": torch.randn(5, 3),
        "y": torch.randn(7).bfloat16(),
        "z": torch.randn(4, 6).t(),
        "empty": torch.empty(0, 3),
    }
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    writer = FileWriter(tmp_path / "x.safetensors", infos)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    assert_same_tensors(load_file(tmp_path / "x.safetensors"), tensors)
    assert_same_tensors({n: t[:] for n, t in read_header(tmp_path / "x.safetensors").items()}, tensors)


def test_an_unannounced_tensor_is_an_error(tmp_path: Path) -> None:
    writer = FileWriter(tmp_path / "x", [TensorInfo("a", (2,), torch.float32)])
    with pytest.raises(ValueError, match="announced"):
        writer.write("b", torch.ones(2))


# ---------------------------------------------------------------------- reading


def test_all_tensors_of_a_sharded_folder_are_read(sharded: Path) -> None:
    assert_same_tensors({n: t[:] for n, t in read_weights(sharded, MODEL).items()}, tensors_of(sharded))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing"):
        read_weights(sharded, MODEL)


@pytest.mark.parametrize("keep", [0.5, 0.0, 10])
def test_a_truncated_file_is_named(folder: Path, keep: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(UserError, match=r"model\.safetensors.*download it again"):
        read_weights(folder, MODEL)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, {NORM: torch.ones(31)})
    with pytest.raises(UserError, match=r"model\.norm\.weight with shape \[31\].* \[32\]"):
        read_weights(folder, MODEL)


def test_missing_and_unexpected_tensors_are_named(folder: Path) -> None:
    rewrite(folder, {NORM: None})
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight"):
        read_weights(folder, MODEL)
    rewrite(folder, {NORM: torch.ones(32), "model.extra.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"holds model\.extra\.weight"):
        read_weights(folder, MODEL)


def test_an_unsupported_dtype_is_named(folder: Path) -> None:
    rewrite(folder, {NORM: torch.ones(32).to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match=r"model\.norm\.weight as F8_E4M3; supported are F32, BF16, F16"):
        read_weights(folder, MODEL)


def test_a_wrong_index_is_detected(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{second} lacks {name}"):
        read_weights(sharded, MODEL)
    for content in ("{}", "[]", "null", '{"weight_map": null}', '{"weight_map": {"a": 1}}', "{", ""):
        (sharded / INDEX).write_text(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_weights(sharded, MODEL)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            "model-00001-of-00002 model-00002-of-00002",
            f"shards (model-00001-of-00002.safetensors) without {INDEX}",
        ),
        ("model-00002-of-00002", f"shards (model-00002-of-00002.safetensors) without {INDEX}"),
        ("model-00001-of-00001", f"download {INDEX} too"),
        ("adapter_model model-00001-of-00002", f"download {INDEX} too"),
        ("adapter_model", "has an adapter (adapter_model.safetensors), not a whole model; merge it"),
        ("consolidated", f"has consolidated.safetensors, but neither {WEIGHTS} nor {INDEX}; rename"),
        ("weights", f"rename a file that holds all weights to {WEIGHTS}"),
        ("", f"has neither {WEIGHTS} nor {INDEX}; name a folder with safetensors"),
    ],
)
def test_a_folder_whose_weights_are_not_found_says_what_is_there(
    files: str, words: str, tmp_path: Path
) -> None:
    for name in files.split():
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path, MODEL)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_sharded_folder_without_its_index_names_the_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(UserError, match=rf"has weights in shards .* without {INDEX}.*; download {INDEX} too"):
        read_weights(sharded, MODEL)


def test_a_folder_without_safetensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="other formats are not read"):
        read_weights(tmp_path, MODEL)


def test_a_tied_head_and_rotary_frequencies_in_the_file_are_ignored(tmp_path: Path) -> None:
    save_random_model("qwen3, tied", tmp_path)
    ignored = {
        "lm_head.weight": torch.ones(VOCAB_SIZE, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    rewrite(tmp_path, dict(ignored))
    assert not ignored.keys() & read_weights(tmp_path, TIED).keys()
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        rewrite(tmp_path, {"lm_head.weight": None})
        read_weights(tmp_path, replace(TIED, tie_embeddings=False))


# ---------------------------------------------------------------------- writing


def write_all(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    writer = HfWriter(folder, infos, shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()


@pytest.mark.parametrize("shard_bytes", [1, 500, 10_000, 2**30])
def test_shards_hold_at_most_their_size_and_all_tensors(shard_bytes: int, tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i, 3) for i in range(1, 20)}
    write_all(tmp_path, tensors, shard_bytes)
    assert_same_tensors(tensors_of(tmp_path), tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    for path in files:
        stored = load_file(path)
        assert len(stored) == 1 or sum(t.nbytes for t in stored.values()) <= shard_bytes
    if len(files) == 1:
        assert files[0].name == WEIGHTS and not (tmp_path / INDEX).exists()
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_a_folder_gets_its_name_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as partial:
        assert partial.is_dir() and not target.exists()
    assert target.is_dir() and not partial.exists()


def test_an_interrupted_write_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_non_empty_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="choose another name"), new_folder(tmp_path / "out"):
        pass


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def write(file: object, data: memoryview) -> None:
        nonlocal written
        written += len(data)
        if written > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(data)  # type: ignore[attr-defined]

    monkeypatch.setattr(safetensors_file, "write_bytes", write)
    with pytest.raises(UserError, match="is full") as error, new_folder(tmp_path / "out") as partial:
        write_all(partial, {f"t{i}": torch.randn(20, 3) for i in range(40)}, 1000)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
