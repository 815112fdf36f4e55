"""A Python interpreter that nothing gets out of, for the tool `python`.

`unshare` gives it user, process, network, mount and IPC namespaces of its own: it sees no process, network or
mount of the machine, and when its first process is killed the kernel kills all others.  `sandbox_init.py`
runs first in there: it makes a root that has only the interpreter, read-only, and a temporary folder in
memory, drops all capabilities, forbids to start processes, and sets limits.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from opo_megatron.errors import UserError

INIT = Path(__file__).with_name("sandbox_init.py")
NAMESPACES = (
    *("--user", "--map-root-user", "--pid", "--net", "--mount", "--ipc", "--uts"),
    *("--fork", "--kill-child=KILL"),
)
LONGEST_OUTPUT = 64 * 2**10
"""Bytes that are read; a program that writes more is ended."""


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0
    memory_mib: int = 512


def run_python(code: str, limits: Limits) -> str:
    """What a program prints, errors included, and why it was ended where it was."""
    program = shutil.which("unshare")
    if program is None:
        raise FileNotFoundError("the program unshare is missing")
    command = [program, *NAMESPACES, sys.executable, "-I", "-S", str(INIT)]
    command += [str(limits.seconds), str(limits.memory_mib), sys.base_prefix]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            output, ending = _communicate(process, code.encode(errors="replace"), limits.seconds)
        finally:
            process.kill()
    return output.decode(errors="replace") + ending


def _communicate(process: subprocess.Popen[bytes], code: bytes, seconds: float) -> tuple[bytes, str]:
    """The output, and a line on why there is no more."""
    assert process.stdin is not None and process.stdout is not None
    end, output = time.monotonic() + seconds, b""
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    with suppress(BrokenPipeError):
                        code = code[os.write(key.fd, code) :]
                        if code:
                            continue
                    selector.unregister(process.stdin)
                    with suppress(BrokenPipeError):
                        process.stdin.close()
                    continue
                part = os.read(key.fd, 2**16)
                output += part
                if not part:
                    return output, ""
                if len(output) > LONGEST_OUTPUT:
                    return output[:LONGEST_OUTPUT], "\nError: ended, because it printed too much"
    return output, f"\nError: ended after {seconds:g} seconds"


@cache
def check_sandbox() -> None:
    """
    Raises:
        UserError: where this machine has no user namespaces, or a part of the sandbox does not work.
    """
    try:
        output = run_python("print(6 * 7)", Limits(seconds=30.0))
    except FileNotFoundError as error:
        output = str(error)
    if output != "42\n":
        raise UserError(
            "task.environment_options.tools has python, whose sandbox does not work on this machine "
            f"({' '.join(output.split())[-200:]}); allow user namespaces (sysctl "
            "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or remove python"
        )
