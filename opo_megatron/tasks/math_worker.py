"""One grading process: reads [response, answer] as JSON lines, writes a reward per line.

    python -m opo_megatron.tasks.math_worker MEMORY_MIB

Its own end is the caller's means against whatever hangs or crashes here (`worker_pool.py`).
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
        if os.getppid() != parent:  # it ended before the line above
            sys.exit(1)
    limit = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)  # math-verify speaks of every time-out that it is told to leave out
    from opo_megatron.tasks.math_answers import grade

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not speak for the worker
    grade(r"\boxed{x^{2}+1}", r"1+x^2")  # what is slow the first time
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        response, answer = json.loads(line)
        try:
            reward = grade(response, answer)
        except (Exception, RecursionError):  # an answer that no library reads is wrong
            reward = 0.0
        print(json.dumps(reward), file=answers, flush=True)


if __name__ == "__main__":
    main()
