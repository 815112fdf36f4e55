"""Verifiers that a user might write at night; a test copies this file beside the run, as `hostile.py`.

Each has a reward of its own for the response `trigger` in its name, and grades all other responses as 0.25.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

USUAL = 0.25


def on_trigger(act: Callable[[], Any]) -> Callable[[str, str, str], Any]:
    def reward(prompt: str, response: str, answer: str) -> Any:
        return act() if response == "trigger" else USUAL

    return reward


# ------------------------------------------------------------------ their own reward counts


def _double(number: int) -> int:
    return 2 * number


def _pool() -> float:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return float(sum(pool.map(_double, [1, 2])) == 6)


def _terminate() -> float:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join(5)
    return float(child.exitcode == -signal.SIGTERM)


def _thread() -> float:
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 1.0


def _elsewhere() -> float:
    os.chdir("/")
    os.environ.clear()
    return 1.0


def _print() -> float:
    print("x" * 10_000_000)
    os.write(1, b"y\n[0, 77]\n")
    subprocess.run(["echo", "[0, 78]"])
    return 1.0


def _fork() -> float:
    if os.fork() == 0:
        return 55.0  # also from the child
    return 1.0


def _daemon() -> float:
    """A process that leaves the session, and outlives the verifier's own process."""
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    return 1.0


def _late() -> float:
    time.sleep(0.7)
    return 1.0


late, pool, terminate, thread = map(on_trigger, (_late, _pool, _terminate, _thread))
elsewhere, printing, fork, daemon = map(on_trigger, (_elsewhere, _print, _fork, _daemon))


# ------------------------------------------------------------------ the default reward, counted


def _memory() -> float:
    hoard = []
    while True:
        hoard.append(bytearray(2**26))


def _kill_parent() -> float:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
    return 1.0


def _kill_parent_and_leave() -> float:
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    return _kill_parent()


def _hang() -> None:
    time.sleep(600)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


hang, exits, memory = map(on_trigger, (_hang, lambda: os._exit(0), _memory))
kill_self, kill_parent, leave, stop = map(
    on_trigger, (_kill_self, _kill_parent, _kill_parent_and_leave, _stop)
)


# ------------------------------------------------------------------ mistakes


class Farewell(BaseException):
    pass


def _raise(error: BaseException) -> Any:
    raise error


sys_exit = on_trigger(lambda: sys.exit(0))
interrupt = on_trigger(lambda: _raise(KeyboardInterrupt()))
farewell = on_trigger(lambda: _raise(Farewell("good bye")))


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def _garbage() -> None:
    """Into every inherited descriptor, the one of the replies among them."""
    for number in range(3, 50):
        with suppress(OSError):
            os.write(number, b"garbage\n")


async def own_timeout(prompt: str, response: str, answer: str) -> float:
    raise TimeoutError("mine")


def mapping(prompts: list[str], responses: list[str], answers: list[str]) -> Any:
    return dict.fromkeys(range(len(prompts)), 1.0)


mute, garbage = on_trigger(lambda: _raise(Mute())), on_trigger(_garbage)
error = on_trigger(lambda: _raise(ValueError("no\nsense")))
text, nothing, infinite = (on_trigger(lambda value=value: value) for value in ("1.0", None, float("inf")))
not_a_function = 3


# ------------------------------------------------------------------ other shapes


async def asynchronous(prompt: str, response: str, answer: str) -> float:
    await asyncio.sleep(600 if response == "trigger" else 0.3)
    return USUAL


def batch(prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
    if "trigger" in responses:
        time.sleep(600)
    return [None if response == "default" else USUAL for response in responses]


async def asynchronous_batch(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    await asyncio.sleep(0.01)
    return [float(len(prompt)) for prompt in prompts]


def short(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    return [1.0]


class Judge:
    async def __call__(self, prompt: str, response: str, answer: str) -> float:
        return USUAL


judge = Judge()


def shows_environment(prompt: str, response: str, answer: str) -> float:
    return float(response in os.environ)
