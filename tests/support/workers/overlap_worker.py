"""One rank of a tiny step: overlap_worker.py OUTPUT SEED|none [override]…; rank 0 writes the step's metrics.

With a seed the step overlaps with the generation of a streaming engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from opo_megatron.tasks.lift import LiftTask
from opo_megatron.train import opo_step
from tests.support.overlapped_run import a_run
from tests.support.tiny_run import easy_reward

output, seed, overrides = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
LiftTask.reward = easy_reward  # type: ignore[method-assign]
with a_run(output.with_suffix(".run"), *overrides, seed=None if seed == "none" else int(seed)) as run:
    opo_step(run, 1)
    if run.parallel.rank == 0:
        output.write_text(json.dumps(run.files.metrics.read()[-1]))
