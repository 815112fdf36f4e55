"""One rank; the last one's disk is full: converting and saving raise on all ranks.

full_disk_worker.py FOLDER WORK

Rank 0 writes the error message of each rank, by operation.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opo_megatron.checkpoint.convert import convert
from opo_megatron.checkpoint.progress import RunProgress
from opo_megatron.checkpoint.save import save
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    destroy_model_parallel,
    initialize,
    shutdown,
)
from opo_megatron.errors import UserError
from tests.support.fixtures import small_config, small_policy
from tests.support.round_trip import config_from

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LIMIT = 4096


@contextmanager
def full_disk(is_full: bool) -> Iterator[None]:
    """Files may not grow beyond LIMIT bytes: EFBIG stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def messages_of(write: Callable[[], None], parallel: Parallel) -> list[str]:
    """Every rank's error message while the last rank's disk is full."""
    message = "nothing"
    with full_disk(parallel.rank == WORLD_SIZE - 1):
        try:
            write()
        except UserError as error:
            message = str(error)
    return all_gather_objects(parallel, message)


def main() -> None:
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    layout = "policy.tensor_model_parallel_size=2"
    config = config_from(folder, work, WORLD_SIZE, layout)
    parallel = initialize(config)
    results = {
        "convert": messages_of(
            lambda: convert(folder, work / "out", config, parallel, None, lambda line: None), parallel
        )
    }
    destroy_model_parallel()
    run = small_config(layout, f"run.dir={work / 'run'}", world_size=WORLD_SIZE)
    parallel = initialize(run)
    policy = small_policy(run, parallel)
    results["save"] = messages_of(lambda: save(policy, run, RunProgress("step", 1)), parallel)
    if parallel.rank == 0:
        (work / "results.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
