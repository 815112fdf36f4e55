"""One rank: saves a policy after two steps under one parallel layout, or loads it under another.

    checkpoint_worker.py save|load RUN_DIR OUTPUT OVERRIDE[,OVERRIDE…]

Rank 0 writes every parameter, Adam moment and fp32 master weight, unsharded, under its Hugging Face name.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.checkpoint.load import load
from opo_megatron.checkpoint.progress import RunProgress
from opo_megatron.checkpoint.save import save
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects, initialize, shutdown
from opo_megatron.policy.policy import Policy
from tests.support.fixtures import ragged_rollouts, small_config, small_policy

STEPS = 2


def train(policy: Policy, parallel: Parallel, step: int) -> float:
    rollouts = ragged_rollouts(seed=step)
    rollouts.advantages = torch.linspace(-1, 1, len(rollouts), dtype=torch.float64)
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(parallel.dp_rank))
    return policy.train_step(batch, schedule, PolicyGradient(100.0, 1.0), lr=1e-2).grad_norm


def state_of(policy: Policy, parallel: Parallel) -> dict[str, Tensor]:
    """Optimizer state under Hugging Face names, gathered from all ranks."""
    distributed = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])[0]
    shards = {}
    for parameter in policy.param_mapping:
        if parameter.stage != parallel.pp_rank or parameter.tied_duplicate or parameter.is_expert:
            continue  # experts have their own optimizer, which the next step checks
        weight = policy.chunks[parameter.chunk].get_parameter(parameter.mcore_name)
        pieces = _pieces(distributed, weight)
        shards[parameter.tensors] = (parameter.sharding, parallel.tp_rank, weight.shape, pieces)
    full: dict[str, Tensor] = {}
    gathered = all_gather_objects(parallel, shards)
    for tensors in {key for part in gathered for key in part}:
        holders = [part[tensors] for part in gathered if tensors in part]
        sharding, size = holders[0][0], 1 + max(tp_rank for _, tp_rank, _, _ in holders)
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            shards_by_rank = []
            for rank in range(size):
                flat = torch.full((holders[0][2].numel(),), float("nan"))
                for _, tp_rank, _, pieces in holders:
                    if tp_rank == rank and pieces is not None:
                        start, values = pieces[0], pieces[1][kind]
                        flat[start : start + values.numel()] = values
                shards_by_rank.append(flat.view(holders[0][2]))
            names = [name for name, _ in tensors[0]]
            full |= {f"{kind}/{n}": t for n, t in zip(names, sharding.join(shards_by_rank), strict=True)}
    assert not any(t.isnan().any() for t in full.values())
    return full


def _pieces(optimizer: object, weight: Tensor) -> tuple[int, dict[str, Tensor]] | None:
    """(offset, tensors) of the range of `weight` whose optimizer state this data-parallel rank owns."""
    if weight not in optimizer.model_param_group_index_map:
        return None
    span = optimizer._get_model_param_range_map(weight)["param"]
    group, order = optimizer.model_param_group_index_map[weight]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    state = optimizer.optimizer.state[main]
    tensors = {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return span.start, {name: tensor.detach().flatten().clone() for name, tensor in tensors.items()}


def main() -> None:
    mode, run_dir, output, overrides = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4].split(",")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = small_config(*[o for o in overrides if o], world_size=world_size)
    config.run = replace(config.run, dir=run_dir, seed=1 if mode == "save" else 2)
    parallel = initialize(config)
    policy = small_policy(config, parallel)
    progress = RunProgress("step", STEPS)
    if mode == "save":
        for step in range(STEPS):
            train(policy, parallel, step)
        save(policy, config, progress)
    else:
        load(policy, config, Path(run_dir) / "checkpoints" / progress.folder)
    results = state_of(policy, parallel)
    results |= {name: tensor.clone() for bucket in policy.stream_weights() for name, tensor in bucket}
    results["version"] = torch.tensor(policy.version)
    # Adam's bias correction depends on the step count: one more step shows whether it was restored.
    results["next grad norm"] = torch.tensor(train(policy, parallel, STEPS))
    results |= {f"next/{name}": t.clone() for bucket in policy.stream_weights() for name, t in bucket}
    if parallel.rank == 0:
        torch.save(results, output)
    shutdown()


if __name__ == "__main__":
    main()
