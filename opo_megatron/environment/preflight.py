"""Checks of all nodes of a job, in under a minute, before a model is loaded.

    torchrun … -m opo_megatron preflight RECIPE key=value…

The first rank of each node checks GPUs, their ECC errors and free memory, free disk, installed versions
(`opo doctor`) and the recipe (`opo config`).  All ranks then exchange their problems, so that all exit alike:
with code 2, and rank 0 prints one line per problem.  Without problems they time an all-reduce; a bus
bandwidth below its minimum is a problem, too.

The minimums separate a broken link or a full disk from a working one; they are no measurements.  Environment
variables change them: OPO_MIN_ALL_REDUCE_GB_PER_S, OPO_MIN_FREE_DISK_GB, OPO_MIN_FREE_GPU_SHARE.
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
from opo_megatron.environment.doctor import collect, diagnose
from opo_megatron.environment.versions import read_versions
from opo_megatron.errors import EXIT_USER_ERROR, UserError

JOIN_SECONDS = 45
ROUNDS = 5
GPU_QUERY = "memory.free,memory.total,ecc.errors.uncorrected.volatile.total"


class Minimums(NamedTuple):
    """A node below one of these fails."""

    all_reduce_gb_per_s: float
    """Bus bandwidth over all ranks."""
    free_disk_gb: float
    """On the disk of run.dir."""
    free_gpu_share: float

    @classmethod
    def of(cls, uses_gpus: bool) -> Minimums:
        """The defaults, or the environment variables."""
        return cls(
            float(os.environ.get("OPO_MIN_ALL_REDUCE_GB_PER_S", 20.0 if uses_gpus else 0.001)),
            float(os.environ.get("OPO_MIN_FREE_DISK_GB", 100.0 if uses_gpus else 1.0)),
            float(os.environ.get("OPO_MIN_FREE_GPU_SHARE", 0.95)),
        )


def check_nodes(recipe: str, overrides: Sequence[str]) -> int:
    """Returns 0 if all nodes pass, else 2; a collective of all ranks."""
    started = time.monotonic()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = load_config(recipe, overrides, world_size)
    except UserError as error:  # the same on every rank: no need to communicate
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    problems = list(node_problems(config)) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    if any("torch" in problem.split() for problem in problems):
        print("\n".join(f"error: {socket.gethostname()}: {problem}" for problem in problems), file=sys.stderr)
        return EXIT_USER_ERROR
    return _collective_checks(config, problems, started)


def node_problems(config: Config) -> Iterator[str]:
    """The problems of this node, one sentence each."""
    uses_gpus = config.policy.device is Device.cuda or (
        config.policy.device is Device.auto and shutil.which("nvidia-smi") is not None
    )
    needs = ["gpu"] if uses_gpus else []
    needs += ["fp8"] if config.policy.fp8 is not None else []
    if config.rollout.engine is EngineName.sglang and not config.rollout.sglang.urls:
        needs.append("sglang")
    report = diagnose(collect(sglang_python=config.rollout.sglang.python), read_versions(), needs)
    for finding in report.findings:
        if finding.is_fatal:
            found = f"is {finding.found}" if finding.found else "is missing"
            yield f"{finding.part} {found}, expected {finding.wanted}; {finding.fix}"
    minimums = Minimums.of(uses_gpus)
    yield from _disk_problems(config, minimums.free_disk_gb)
    if uses_gpus:
        yield from _gpu_problems(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), minimums.free_gpu_share)


def _disk_problems(config: Config, minimum: float) -> Iterator[str]:
    folder = Path(config.run.dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < minimum:
        yield (
            f"run.dir={folder} has {free:.1f} GB free, below {minimum:g} GB; free space, or choose another"
        )
    if not os.access(existing, os.W_OK):
        yield f"run.dir={folder} cannot be written; choose another"


def _gpu_problems(ranks: int, minimum: float) -> Iterator[str]:
    query = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield f"nvidia-smi fails ({error}); exclude the node from the job"
        return
    rows = [line.split(", ") for line in result.stdout.strip().splitlines()]
    if len(rows) < ranks:
        yield f"nvidia-smi lists {len(rows)} GPUs for {ranks} ranks; exclude the node from the job"
    for index, (free, total, errors) in enumerate(rows):
        if float(free) < minimum * float(total):
            yield (
                f"GPU {index} has {free} of {total} MiB free, below the fraction {minimum:g}; stop the other "
                "processes that use it"
            )
        if errors.isdecimal() and int(errors) > 0:  # "[N/A]" where ECC is off
            yield f"GPU {index} reports {errors} uncorrected ECC errors; exclude the node from the job"


def _collective_checks(config: Config, problems: list[str], started: float) -> int:
    """Gather the problems of all ranks, and time an all-reduce; rank 0 prints."""
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
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, [f"{socket.gethostname()}: {problem}" for problem in problems])
        messages = [line for lines in gathered for line in lines]
        bandwidth = None
        if not messages and size > 1:
            bandwidth = _bus_bandwidth(uses_gpus, timeout)
            minimum = Minimums.of(uses_gpus).all_reduce_gb_per_s
            if bandwidth < minimum:
                messages.append(
                    f"the bus bandwidth of an all-reduce over {size} ranks is {bandwidth:.3g} GB/s, below "
                    f"OPO_MIN_ALL_REDUCE_GB_PER_S={minimum:g}; check the links between the nodes"
                )
        if rank == 0:
            for line in messages:
                print(f"error: {line}", file=sys.stderr)
            rate = "" if bandwidth is None else f", all-reduce {bandwidth:.3g} GB/s"
            verdict = f"{len(messages)} problems" if messages else "fit"
            print(f"preflight: {size} ranks{rate}, {time.monotonic() - started:.1f} s: {verdict}", flush=True)
        return EXIT_USER_ERROR if messages else 0
    finally:
        dist.destroy_process_group()


def _bus_bandwidth(uses_gpus: bool, timeout: timedelta) -> float:
    """Bus bandwidth of an all-reduce in GB/s, 2 (n − 1)/n · bytes / (slowest rank's time); a collective."""
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
    started = _now(uses_gpus)
    for _ in range(ROUNDS):
        dist.all_reduce(tensor, group=group)
    seconds = torch.tensor((_now(uses_gpus) - started) / ROUNDS, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 2 * (size - 1) / size * tensor.nbytes / float(seconds) / 1e9


def _now(uses_gpus: bool) -> float:
    import torch

    if uses_gpus:
        torch.cuda.synchronize()
    return time.monotonic()
