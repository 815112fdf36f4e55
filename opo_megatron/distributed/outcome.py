"""What a rank tells the process that waits for it: how far it is, and at the end its exit code.

An exit code alone proves nothing: anybody's code in a rank may call `os._exit(0)`, a library may call `exit`.
So a rank's last act is to write the code that it ends with.  The launcher and slurm/rank.sh believe no other.

Both files are inherited as open descriptors: nothing depends on a folder that may be deleted or changed.
"""

from __future__ import annotations

import fcntl
import os
import time

OUTCOME = "OPO_OUTCOME_FD"
"""Environment variable with the descriptor of a rank's file: "its last step (17 of 60)", then "exit 0"."""
ERROR_CLAIM = "OPO_ERROR_FD"
"""Environment variable with the descriptor of all ranks' file: the rank that claims it prints its error."""

_ahead = "the end of its command"
_descriptors: dict[str, int] = {}
"""The launcher's files by their environment variables; empty for a process that nobody waits for."""
_owner = os.getpid()


def start_command(name: str) -> None:
    """Called by a command before anything else; children of this process do not inherit the files."""
    global _owner
    _owner = os.getpid()
    _descriptors.clear()
    for variable in (OUTCOME, ERROR_CLAIM):
        if (value := os.environ.pop(variable, None)) is not None:
            _descriptors[variable] = int(value)
            os.set_inheritable(int(value), False)
    set_ahead(f"the end of `opo {name}`")


def set_ahead(what: str) -> None:
    """What this rank has not reached yet."""
    global _ahead
    _ahead = what
    _write(what)


def set_step(step: int, last: int) -> None:
    """OPO step `step` of `last` is done."""
    set_ahead(f"its last step ({max(step, 0)} of {last})" if step < last else "the end of `opo train`")


def write_exit(code: int) -> None:
    """Write the exit code, as this process's last act."""
    _write(exit_line(code))


def exit_line(code: int) -> str:
    return f"exit {code}"


def ended_early(
    who: str, code: int, ahead: str | None = None, caller: str = "something in its process"
) -> str:
    """The sentence about a process that somebody's call of exit ended.

    Args:
        ahead: what it had not reached; None is this process's.
    """
    return (
        f"{who} ended with exit code {code} before {ahead or _ahead}: {caller} called exit; remove that call "
        "and repeat the command (a run resumes with resume=auto)"
    )


def ended_by_second(name: str) -> str:
    """The line about a process that a second signal ended."""
    return f"ended by a second {name}, without saving; resume=auto resumes from the last checkpoint"


def claim_error(code: int) -> bool:
    """Whether this rank prints its error: it is alone, or the first one that has any.

    Args:
        code: that it will exit with; ranks that lose it exit with the same one.
    """
    return ERROR_CLAIM not in _descriptors or claim(_descriptors[ERROR_CLAIM], code)


def claim(descriptor: int, code: int) -> bool:
    """Whether this process is the first to claim the file."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    try:
        if os.fstat(descriptor).st_size:
            return False
        os.write(descriptor, str(code).encode())
        return True
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)


def claimed_code(seconds: float) -> int | None:
    """The exit code of the rank (or launcher) that prints an error within this time; None without one."""
    deadline = time.monotonic() + seconds
    while ERROR_CLAIM in _descriptors:
        if code := os.pread(_descriptors[ERROR_CLAIM], 10, 0):
            return int(code)
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    return None


def prints_alone() -> bool:
    """Whether no launcher prints an error of several ranks once."""
    return ERROR_CLAIM not in _descriptors


def _write(text: str) -> None:
    if OUTCOME not in _descriptors or os.getpid() != _owner:  # a forked child is not the rank
        return
    line = f"{text}\n".encode()
    os.pwrite(_descriptors[OUTCOME], line, 0)
    os.ftruncate(_descriptors[OUTCOME], len(line))
