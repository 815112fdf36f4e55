"""A grading worker: reads [response, answer, context] as JSON lines, writes a reward per line.

    python -m opo_megatron.tasks.math_worker MEMORY_MIB math|math_strict

If it hangs or crashes, the caller kills and replaces it (`worker_pool.py`).
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl
            sys.exit(1)
    limit = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)  # math-verify warns about every disabled timeout
    from opo_megatron.tasks.math_answers import grade, strict_grade

    grader = {"math": grade, "math_strict": strict_grade}[sys.argv[2]]
    replies, sys.stdout = sys.stdout, sys.stderr  # keep what libraries print out of the replies
    grader(r"\boxed{x^{2}+1}", r"1+x^2")  # the first call is slow
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        try:
            reward = grader(*json.loads(line))
        except (Exception, RecursionError):  # an answer that the library cannot parse is wrong
            reward = 0.0
        print(json.dumps(reward), file=replies, flush=True)


if __name__ == "__main__":
    main()
