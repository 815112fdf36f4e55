"""Is every node fit to train this recipe?  Asked by all ranks, in under a minute, before a model is loaded.

    torchrun … -m opo_megatron preflight RECIPE key=value…

Each node is looked at by its first rank: GPUs, their ECC errors and free memory, free disk, installed
versions (`opo doctor`) and the recipe (`opo config`).  All ranks then tell each other what they found, so
that all end alike: with exit code 2 and one line per problem, said by rank 0.  Where nothing was found they
time an all-reduce; a bus bandwidth below the floor is a problem as well.

The floors tell a broken link or a full disk from a working one; they are no measurements.  Variables move
them: OPO_MIN_ALL_REDUCE_GB_PER_S, OPO_MIN_FREE_DISK_GB, OPO_MIN_FREE_GPU_SHARE.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from opo_megatron.config import Config, load_config
from opo_megatron.config.choices import Device, EngineName
from opo_megatron.environment.doctor import judge, look
from opo_megatron.environment.versions import read_versions
from opo_megatron.errors import EXIT_USER_ERROR, UserError

JOIN_SECONDS = 45
ROUNDS = 5
GPU_QUERY = "memory.free,memory.total,ecc.errors.uncorrected.volatile.total"


class Floors(NamedTuple):
    """Below these a node is not fit."""

    all_reduce_gb_per_s: float
    """Bus bandwidth over all ranks."""
    free_disk_gb: float
    """Where run.dir is."""
    free_gpu_share: float

    @classmethod
    def of(cls, uses_gpus: bool) -> Floors:
        """The defaults, or what the environment says."""
        return cls(
            float(os.environ.get("OPO_MIN_ALL_REDUCE_GB_PER_S", 20.0 if uses_gpus else 0.001)),
            float(os.environ.get("OPO_MIN_FREE_DISK_GB", 100.0 if uses_gpus else 1.0)),
            float(os.environ.get("OPO_MIN_FREE_GPU_SHARE", 0.95)),
        )


def check_nodes(recipe: str, overrides: Sequence[str]) -> int:
    """Returns 0 where all nodes are fit, 2 where one is not; a collective of all ranks."""
    started = time.monotonic()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = load_config(recipe, overrides, world_size)
    except UserError as error:  # the same on every rank, which need not meet to say so
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    problems = list(node_problems(config)) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    if any("torch" in problem.split() for problem in problems):
        print("\n".join(f"error: {socket.gethostname()}: {problem}" for problem in problems), file=sys.stderr)
        return EXIT_USER_ERROR
    return _together(config, problems, started)


def node_problems(config: Config) -> Iterator[str]:
    """What makes this node unfit, one sentence each."""
    uses_gpus = config.policy.device is Device.cuda or (
        config.policy.device is Device.auto and shutil.which("nvidia-smi") is not None
    )
    needs = ["gpu"] if uses_gpus else []
    needs += ["fp8"] if config.policy.fp8 is not None else []
    if config.rollout.engine is EngineName.sglang and not config.rollout.sglang.urls:
        needs.append("sglang")
    report = judge(look(sglang_python=config.rollout.sglang.python), read_versions(), needs)
    for finding in report.findings:
        if finding.is_fatal:
            found = f"is {finding.found}" if finding.found else "is missing"
            yield f"{finding.part} {found}, wanted is {finding.wanted}; {finding.fix}"
    floors = Floors.of(uses_gpus)
    yield from _disk_problems(config, floors.free_disk_gb)
    if uses_gpus:
        yield from _gpu_problems(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), floors.free_gpu_share)


def _disk_problems(config: Config, floor: float) -> Iterator[str]:
    folder = Path(config.run.dir).absolute()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(above).free / 1e9
    if free < floor:
        yield f"run.dir={folder} has {free:.1f} GB free, below {floor:g} GB; free some, or choose another"
    if not os.access(above, os.W_OK):
        yield f"run.dir={folder} cannot be written; choose another"


def _gpu_problems(ranks: int, floor: float) -> Iterator[str]:
    query = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield f"nvidia-smi does not answer ({error}); take the node out of the job"
        return
    rows = [line.split(", ") for line in answer.stdout.strip().splitlines()]
    if len(rows) < ranks:
        yield f"{len(rows)} GPUs are seen for {ranks} ranks; take the node out of the job"
    for index, (free, total, errors) in enumerate(rows):
        if float(free) < floor * float(total):
            yield (
                f"GPU {index} has {free} of {total} MiB free, below a share of {floor:g}; another process "
                "holds the rest"
            )
        if errors.isdecimal() and int(errors) > 0:  # "[N/A]" where ECC is off
            yield f"GPU {index} counts {errors} uncorrected ECC errors; take the node out of the job"


def _together(config: Config, problems: list[str], started: float) -> int:
    """Tell all ranks what this one found; rank 0 speaks for all."""
    import torch
    import torch.distributed as dist

    uses_gpus = config.policy.device is not Device.cpu and torch.cuda.is_available()
    timeout = timedelta(seconds=JOIN_SECONDS)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        found: list[Any] = [None] * size
        dist.all_gather_object(found, [f"{socket.gethostname()}: {problem}" for problem in problems])
        said = [line for lines in found for line in lines]
        speed = None
        if not said and size > 1:
            speed = _bus_bandwidth(uses_gpus, timeout)
            floor = Floors.of(uses_gpus).all_reduce_gb_per_s
            if speed < floor:
                said.append(
                    f"all-reduce over {size} ranks moves {speed:.3g} GB/s, below "
                    f"OPO_MIN_ALL_REDUCE_GB_PER_S={floor:g}; look at the links between the nodes"
                )
        if rank == 0:
            for line in said:
                print(f"error: {line}", file=sys.stderr)
            rate = "" if speed is None else f", all-reduce {speed:.3g} GB/s"
            verdict = f"{len(said)} problems" if said else "fit"
            print(f"preflight: {size} ranks{rate}, {time.monotonic() - started:.1f} s: {verdict}", flush=True)
        return EXIT_USER_ERROR if said else 0
    finally:
        dist.destroy_process_group()


def _bus_bandwidth(uses_gpus: bool, timeout: timedelta) -> float:
    """GB/s of an all-reduce, 2 (n − 1)/n · bytes / time, the slowest rank's; a collective."""
    import torch
    import torch.distributed as dist

    size = dist.get_world_size()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if uses_gpus else torch.device("cpu")
    )
    if uses_gpus:
        torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl" if uses_gpus else "gloo", timeout=timeout)
    tensor = torch.zeros(2**27 if uses_gpus else 2**20, dtype=torch.float32, device=device)
    dist.all_reduce(tensor, group=group)
    begun = _now(uses_gpus)
    for _ in range(ROUNDS):
        dist.all_reduce(tensor, group=group)
    seconds = torch.tensor((_now(uses_gpus) - begun) / ROUNDS, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 2 * (size - 1) / size * tensor.nbytes / float(seconds) / 1e9


def _now(uses_gpus: bool) -> float:
    import torch

    if uses_gpus:
        torch.cuda.synchronize()
    return time.monotonic()
