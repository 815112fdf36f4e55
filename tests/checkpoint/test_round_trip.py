"""Every family in one process: bitwise Hugging Face round trips, log-probabilities as in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opo_megatron.build import vocabulary_of
from opo_megatron.checkpoint.convert import convert, export
from opo_megatron.distributed.process_groups import destroy_model_parallel, initialize, shutdown
from opo_megatron.errors import UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.tasks.base import Task
from opo_megatron.weights.safetensors_file import read_header
from tests.support.hf_models import (
    FAMILIES,
    PROMPTS,
    VOCAB_SIZE,
    assert_same_tensors,
    log_probs_of,
    save_random_model,
    tensors_of,
)
from tests.support.round_trip import config_from, policy_from, run_layouts


@pytest.fixture(autouse=True)
def shutdown_groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_bitwise_and_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_random_model(family, folder, shard_size="30KB")
    (results,) = run_layouts(folder, tmp_path, 1, [[]])
    assert_same_tensors(tensors_of(tmp_path / "exported0"), tensors_of(folder))
    difference = torch.tensor(results["log_probs"]) - torch.tensor(log_probs_of(model))
    assert float(difference.abs().max()) <= 1e-5
    assert (tmp_path / "exported0" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("family", ["llama, scaled, tied", "qwen2", "qwen3_moe, not normalised"])
def test_the_local_engine_agrees_with_the_policy(family: str, tmp_path: Path) -> None:
    save_random_model(family, tmp_path / "model")
    config = config_from(tmp_path / "model", tmp_path, 1)
    parallel = initialize(config)
    policy = policy_from(config, parallel)
    engine = LocalEngine(config.policy.model, VOCAB_SIZE, torch.float32, parallel.device, slots=4)
    engine.update_weights(policy.stream_weights(), 0)
    requests = [GenerationRequest(i, i, 0, tuple(prompt)) for i, prompt in enumerate(PROMPTS)]
    rollouts = engine.generate(requests, Sampling(max_tokens=12, stop_tokens=(0,), seed=(1,)))
    rollouts.rewards = torch.zeros(len(rollouts), dtype=torch.float64)
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    assert batch.engine_log_prob is not None
    assert float((policy.log_probs(batch, schedule, 1.0) - batch.engine_log_prob).abs().max()) <= 2e-5


def test_every_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    """A bf16 model with fp32 norms, as some published models."""
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    save_random_model("qwen3", folder)
    mixed = {n: t if t.dim() == 1 else t.bfloat16() for n, t in tensors_of(folder).items()}
    save_file(mixed, folder / "model.safetensors")
    run_layouts(folder, tmp_path, 1, [["policy.dtype=bf16"]])
    assert_same_tensors(tensors_of(tmp_path / "exported0"), mixed)


def test_convert_and_export_cast_to_the_given_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_random_model("qwen2", folder)
    config = config_from(folder, tmp_path, 1)
    parallel = initialize(config)
    convert(folder, tmp_path / "a", config, parallel, torch.bfloat16, print)
    export(tmp_path / "a", tmp_path / "b", config, parallel, torch.float32, 2**30, [tmp_path / "a"], print)
    expected = {n: t.bfloat16().float() for n, t in tensors_of(folder).items()}
    assert_same_tensors(tensors_of(tmp_path / "b"), expected)
    assert '"bfloat16"' in (tmp_path / "a" / "config.json").read_text()
    assert '"float32"' in (tmp_path / "b" / "config.json").read_text()


def test_fused_tensors_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    save_random_model("llama", folder)
    tensors = tensors_of(folder)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    save_file(tensors, folder / "model.safetensors")
    config = config_from(folder, tmp_path, 1)
    with pytest.raises(UserError, match=r"gate_proj.*up_proj.*--dtype"):
        convert(folder, tmp_path / "out", config, initialize(config), None, print)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_converting_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from opo_megatron.checkpoint import weights as weights_checkpoint

    def full(file: object, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "model"
    save_random_model("qwen3_moe", folder)
    config = config_from(folder, tmp_path, 1)
    parallel = initialize(config)
    monkeypatch.setattr(weights_checkpoint, "write_bytes", full)
    with pytest.raises(UserError, match="is full"):
        convert(folder, tmp_path / "out", config, parallel, None, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    from opo_megatron.checkpoint.weights import CheckpointShards

    for family in ("llama", "qwen3"):
        save_random_model(family, tmp_path / family)
    config = config_from(tmp_path / "llama", tmp_path, 1)
    convert(tmp_path / "llama", tmp_path / "out", config, initialize(config), None, print)
    other = config_from(tmp_path / "qwen3", tmp_path, 1)
    destroy_model_parallel()
    parallel = initialize(other)
    policy = policy_from(other, parallel)
    with pytest.raises(UserError, match=r"another model|with shape"):
        CheckpointShards(tmp_path / "out", policy.chunks, policy.param_mapping, parallel)


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_random_model("llama", folder)
    config = config_from(folder, tmp_path, 1)
    initialize(config)

    class Fits(Task):
        vocab_size = VOCAB_SIZE - 3
        stop_tokens = (0, VOCAB_SIZE - 1)

    class TooMany(Task):
        vocab_size = VOCAB_SIZE + 1

    assert vocabulary_of(config, Fits) == VOCAB_SIZE  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"22 tokens.*vocab_size=21"):
        vocabulary_of(config, TooMany)  # type: ignore[arg-type]
    random_init = replace(config, policy=replace(config.policy, model=replace(config.policy.model)))
    random_init.policy.model.vocab_size = None
    with pytest.raises(UserError, match="stop token 20 is beyond the policy's vocabulary of 18 tokens"):
        vocabulary_of(random_init, Fits)  # type: ignore[arg-type]
    Fits.stop_tokens = (0,)  # type: ignore[assignment]
    assert vocabulary_of(random_init, Fits) == VOCAB_SIZE - 3  # type: ignore[arg-type]


def test_a_rank_reads_only_its_own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read per rank at TP 2: half of every matrix, all of the norms."""
    from opo_megatron.weights.param_mapping import Stages, parameters
    from opo_megatron.weights.safetensors_file import StoredTensor

    folder = tmp_path / "model"
    save_random_model("qwen3", folder)
    stored = read_header(folder / "model.safetensors")
    model = replace(FAMILIES["qwen3"], vocab_size=VOCAB_SIZE)
    sizes: list[int] = []
    read = StoredTensor.__getitem__

    def counted(self: StoredTensor, index: object) -> torch.Tensor:
        part = read(self, index)  # type: ignore[arg-type]
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", counted)
    for parameter in parameters(model, VOCAB_SIZE, Stages(model.num_layers)):
        tensors = [stored[name] for name, _ in parameter.tensors[0]]
        total = sum(4 * t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) for t in tensors)
        for rank in (0, 1):
            sizes.clear()
            parameter.sharding.split(tensors, rank, 2)
            if parameter.sharding.partition_dim is None:
                assert sum(sizes) == total
            else:
                assert abs(sum(sizes) - total / 2) <= 4 * 32  # one row of padding
