"""A grading worker: reads jobs as JSON lines, calls the grader for each, writes a reply per job.

    python -m opo_megatron.tasks.grading_worker GRADER SECONDS MEMORY_MIB

GRADER is `math`, `math_strict` or a user's `package.module:function`.  The first line of output is [{"mode":
…}] (`call_mode`), or [{"failed": words}] where the grader cannot be loaded.  A line of input is a list of
jobs, each a list of arguments; replies are [index, reward], [index, null] for a job that gets the default
reward, or [index, {"error": words}] for a mistake in the grader.

The process that is started is only a guardian.  Its child runs the grader, which may do anything: hang,
crash, fork, kill itself or its parent.  When the child ends, the guardian kills all that it left behind.  If
the guardian is killed, the child is, too; the caller replaces both (`worker_pool.py`)."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from opo_megatron.tasks.guardian import become_subreaper, die_with_parent, kill_descendants
from opo_megatron.tasks.user_verifier import call, call_mode, described, load_function, source_hash

OWN = ("math", "math_strict")


def main() -> None:
    grader, seconds, memory_mib = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    die_with_parent(os.getppid(), signal.SIGTERM)
    become_subreaper()
    guardian = os.getpid()
    child = os.fork()
    if child:
        _guard(child)
    die_with_parent(guardian, signal.SIGKILL)
    if memory_mib:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what the grader prints, also from C and from its children, is no reply
    _serve(grader, seconds, replies)


# ------------------------------------------------------------------ the guardian


def _guard(child: int) -> None:
    """Wait for the child, then kill its descendants, whose parent is now this process; does not return."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(0)
    os.close(1)
    _, status = os.waitpid(child, 0)
    kill_descendants()
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


# ------------------------------------------------------------------ the child


def _serve(name: str, seconds: float, replies: TextIO) -> None:
    def send(*message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        function = _load(name)
    except BaseException as error:  # a user's module may raise anything
        send({"failed": described(error)})
        return
    send({"mode": call_mode(function), "source": None if name in OWN else source_hash(name, function)})
    for line in sys.stdin:
        call(function, json.loads(line), seconds, send)


def _load(name: str) -> Callable[..., Any]:
    if name not in OWN:
        return load_function(name)
    logging.disable(logging.CRITICAL)  # math-verify warns about every disabled timeout
    from opo_megatron.tasks.math_answers import grade, strict_grade

    grader: Callable[..., float] = grade if name == "math" else strict_grade
    grader(r"\boxed{x^{2}+1}", r"1+x^2")  # the first call is slow

    def graded(*job: str) -> float:
        try:
            return grader(*job)
        except (Exception, RecursionError):  # an answer that the library cannot parse is wrong
            return 0.0

    return graded


if __name__ == "__main__":
    main()
