"""One rank: `round_trip.run_layouts` of a Hugging Face folder under several parallel layouts.

hf_worker.py FOLDER WORK [override,override …]…
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from opo_megatron.distributed.process_groups import shutdown
from tests.support.round_trip import run_layouts


def main() -> None:
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    layouts = [a.split(",") if a else [] for a in sys.argv[3:]]
    results = run_layouts(folder, work, int(os.environ.get("WORLD_SIZE", "1")), layouts)
    if dist.get_rank() == 0:
        (work / "results.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
