"""HF → policy → HF, and HF → checkpoint → HF, under parallel layouts: for one process and for ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.build import start_policy
from opo_megatron.checkpoint.convert import convert, export
from opo_megatron.config import Config, load_config
from opo_megatron.config.schema import OptimizerConfig
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects, initialize
from opo_megatron.policy.policy import Policy
from opo_megatron.weights.hf_folder import DEFAULT_SHARD_BYTES
from tests.support.hf_models import PROMPTS, tensors_of


def write_recipe(work: Path) -> None:
    (work / "recipe.yaml").write_text(
        "run: {dir: unused}\nrollout: {max_response_tokens: 8}\n"
        "policy: {max_tokens_per_micro_batch: 40, head_chunk_tokens: 16, weight_bucket_mib: 0.01}\n"
    )


def config_from(folder: Path, work: Path, world_size: int, *overrides: str) -> Config:
    """A recipe that starts from the model in `folder`."""
    recipe = work / "recipe.yaml"
    if not recipe.exists():
        write_recipe(work)
    return load_config(recipe, [f"policy.init_from={folder}", *overrides], world_size)


def policy_from(config: Config, parallel: Parallel) -> Policy:
    assert config.policy.model.vocab_size is not None
    return start_policy(config, parallel, config.policy.model.vocab_size, OptimizerConfig(), True)


def log_probs(policy: Policy, parallel: Parallel) -> list[float]:
    """log π of every token of PROMPTS but the first of each, on all ranks."""
    batch = Rollouts.from_demonstrations([p[:1] for p in PROMPTS], [p[1:] for p in PROMPTS])
    schedule = policy.schedule(batch.sequence_lengths)
    order = list(schedule.samples_of(parallel.dp_rank))
    values = policy.log_probs(batch.select(order), schedule, 1.0).split([len(PROMPTS[i]) - 1 for i in order])
    parts = all_gather_objects(parallel, dict(zip(order, values, strict=True)))
    by_prompt = {i: tensor for part in parts for i, tensor in part.items()}
    return [float(v) for i in range(len(PROMPTS)) for v in by_prompt[i]]


def check_stream(policy: Policy, parallel: Parallel, folder: Path) -> None:
    """The policy's weight stream equals the folder bit for bit: to all ranks, and to rank 0 alone."""
    expected = tensors_of(folder)
    for to in ("all", "rank0"):
        received: dict[str, torch.Tensor] = {}
        for bucket in policy.stream_weights(to):  # type: ignore[arg-type]
            assert to == "all" or parallel.rank == 0 or not bucket
            received |= {name: tensor.clone() for name, tensor in bucket}
        if to == "all" or parallel.rank == 0:
            assert received.keys() == expected.keys()
            wrong = [n for n, t in expected.items() if not torch.equal(received[n], t.to(received[n].dtype))]
            assert not wrong, f"{to}: {wrong[0]}"


def run_layouts(folder: Path, work: Path, world_size: int, layouts: list[list[str]]) -> list[dict[str, Any]]:
    """For each layout: weights from the folder, log-probabilities; a checkpoint that the next layout exports.

    Writes `work/exported<i>` for the comparison.
    """
    from opo_megatron.distributed.process_groups import destroy_model_parallel

    def quiet(line: str) -> None: ...

    results = []
    for i, overrides in enumerate(layouts):
        config = config_from(folder, work, world_size, *overrides)
        parallel = initialize(config)
        policy = policy_from(config, parallel)
        check_stream(policy, parallel, folder)
        results.append({"log_probs": log_probs(policy, parallel)})
        del policy
        convert(folder, work / f"checkpoint{i}", config, parallel, None, quiet)
        destroy_model_parallel()
    for i, overrides in enumerate(layouts):
        checkpoint = work / f"checkpoint{i - 1}" if i else work / f"checkpoint{len(layouts) - 1}"
        config = config_from(checkpoint, work, world_size, *overrides)
        parallel = initialize(config)
        target = work / f"exported{i}"
        export(checkpoint, target, config, parallel, None, DEFAULT_SHARD_BYTES, [checkpoint], quiet)
        check_stream(policy_from(config, parallel), parallel, folder)
        destroy_model_parallel()
    return results
