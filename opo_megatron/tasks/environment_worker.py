"""Processes of environments, forked from one that has imported what they need.

    python -m opo_megatron.tasks.environment_worker CONFIG        (`task` as JSON; stdin is a socket)

The first line of output is {"ready": hash of the source} or {"failed": words}.  Then every socket that
arrives on stdin gets a process of its own, which holds one environment at a time and replies to lines of
JSON:

    ["begin", prompt, opening, tokens]   a new environment is started, and given the policy's first turn
    ["respond", tokens]                  → ["given", tokens or null]
    ["reward"]                           → ["reward", number or null]

or ["failed", words] where the environment raised, after which the process ends.  It also ends, with all that
it started, when its socket is closed: between this process and the environment's is a guardian that waits
for either.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any, cast

from opo_megatron.config.rules.environment import is_own_environment
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.environment import Environment, load_environment, make_environment
from opo_megatron.tasks.guardian import become_subreaper, children, die_with_parent, kill_descendants
from opo_megatron.tasks.user_verifier import described, leave_forks, source_hash


def main() -> None:
    config = TaskConfig(**json.loads(sys.argv[1]))
    become_subreaper()
    control = socket.socket(fileno=os.dup(0))
    output = os.dup(1)
    _redirect_standard_streams()
    kind = _load(config, output)
    gc.freeze()  # forked processes share these pages
    guardians: set[int] = set()
    while True:
        byte, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not byte:
            break
        guardians = _reap(guardians)
        pid = os.fork()
        if pid == 0:
            control.close()
            os.close(output)
            _guard(config, kind, descriptors[0])
        guardians.add(pid)
        os.close(descriptors[0])
    kill_descendants()


def _redirect_standard_streams() -> None:
    """What an environment prints, from Python or C, goes to the errors; it has no input."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def _load(config: TaskConfig, output: int) -> Callable[[TaskConfig], Environment]:
    """The class; one object is made, so that what all share is loaded before the first fork."""
    message: dict[str, Any]
    try:
        kind = load_environment(config)
        make_environment(config)
        message = {
            "ready": source_hash(config.environment, kind) if is_own_environment(config.environment) else None
        }
    except UserError as error:
        message = {"failed": str(error)}
    os.write(output, json.dumps(message).encode() + b"\n")
    if "failed" in message:
        sys.exit(1)
    return kind


def _reap(guardians: set[int]) -> set[int]:
    """Those that still run; whatever else has become a child here was left by one that was killed."""
    for pid in set(children()) - guardians:
        os.kill(pid, signal.SIGKILL)
    try:
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            guardians.discard(pid)
    except ChildProcessError:
        return set()
    return guardians


# ------------------------------------------------------------------ the guardian


def _guard(config: TaskConfig, kind: Callable[[TaskConfig], Environment], descriptor: int) -> None:
    """Fork the environment's process, and clean up when it or the other end of its socket has ended.

    It does not depend on the process that it was forked from, which may be replaced while this one is used.
    """
    os.setsid()
    guardian, child = os.getpid(), os.fork()
    if child == 0:
        die_with_parent(guardian, signal.SIGKILL)
        _limit(config)
        try:
            with socket.socket(fileno=descriptor).makefile("rwb") as stream:
                _serve(config, kind, cast(IO[bytes], stream))
        finally:
            os._exit(0)
    signal.signal(signal.SIGTERM, _clean_up)
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.register(os.pidfd_open(child), select.POLLIN)
    poll.poll()
    _clean_up()


def _clean_up(*_: object) -> None:
    kill_descendants()
    os._exit(0)


def _limit(config: TaskConfig) -> None:
    if config.environment_memory_mib:
        resource.setrlimit(resource.RLIMIT_AS, (config.environment_memory_mib * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# ------------------------------------------------------------------ the environment's process


def _serve(config: TaskConfig, kind: Callable[[TaskConfig], Environment], stream: IO[bytes]) -> None:
    environment: Environment | None = None
    own_pid = os.getpid()
    for line in stream:
        question, *arguments = json.loads(line)
        reply: list[Any]
        try:
            if question == "begin":
                environment = kind(config)
                reply = _begun(environment, *arguments)
            elif question == "respond":
                assert environment is not None
                reply = ["given", _ints(environment.respond(*arguments))]
            else:
                assert environment is not None
                reward = environment.reward()
                reply = ["reward", None if reward is None else float(reward)]
            text = json.dumps(reply)
        except BaseException as error:  # a user's class may raise anything
            text = json.dumps(["failed", f"raised {described(error)} in {question}"])
        leave_forks(own_pid)
        stream.write(text.encode() + b"\n")
        stream.flush()


def _begun(
    environment: Environment, prompt: dict[str, Any], opening: list[int], tokens: list[int]
) -> list[Any]:
    fields = prompt | {"tokens": tuple(prompt["tokens"]), "messages": tuple(prompt["messages"])}
    start = _ints(environment.start(Prompt(**fields)))
    if start != opening:
        return ["wrong", "start returned other tokens than before for the same prompt"]
    return ["given", _ints(environment.respond(tokens))]


def _ints(tokens: Sequence[int] | None) -> list[int] | None:
    """Tokens as plain integers, from a tensor or an array too."""
    return None if tokens is None else [int(token) for token in tokens]


if __name__ == "__main__":
    main()
