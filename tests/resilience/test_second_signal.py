"""A second SIGTERM or SIGINT ends a process at once, whatever its main thread does."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest

from opo_megatron.distributed.outcome import ended_by_second
from opo_megatron.resilience.second_signal import FIRST

SCRIPT = """
import ctypes, os, re, signal, socket, threading, time
from opo_megatron.resilience import second_signal
from opo_megatron.utils.signals import SignalHandlers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
second_signal.REPEAT_SECONDS = 0.2
second = second_signal.SecondSignal(announces=True)
SignalHandlers((signal.SIGTERM, signal.SIGUSR1), lambda number, frame: second.handled(number)).install()
second.listen()
print("ready", flush=True)
while True:
    try:
        {hang}
    except KeyboardInterrupt:
        pass
"""
HANGS = {
    "python": "pass",
    "sleep": "time.sleep(60)",
    "lock": "threading.Lock().acquire() and threading.Event().wait()",
    "library": "ctypes.CDLL(None).poll(None, 0, 60_000)",
    "socket": "socket.socketpair()[0].recv(1)",
    "pattern": "re.match('(a+)+b', 'a' * 60)",  # holds the interpreter lock, looks for signals
}


def hanging(how: str) -> subprocess.Popen[str]:
    """A process that hangs, once it listens."""
    command = [sys.executable, "-c", SCRIPT.format(hang=HANGS[how])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def signaled(process: subprocess.Popen[str], *numbers: int) -> tuple[int, list[str]]:
    """Exit code and lines, after these signals with time between them."""
    for number in numbers:
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(number)
    for _ in range(100):
        try:
            _, error = process.communicate(timeout=0.6)
            return process.returncode, error.splitlines()
        except subprocess.TimeoutExpired:  # on a busy machine two signals may be handled as one
            process.send_signal(numbers[-1])
    raise AssertionError("the signals did not end the process")


CASES = {how: (how, (SIGTERM, SIGTERM)) for how in HANGS} | {
    "interrupts": ("sleep", (SIGINT, SIGINT)),
    "an interrupt first": ("sleep", (SIGINT, SIGTERM)),
    "told to stop first": ("sleep", (SIGUSR1, SIGUSR1, SIGTERM, SIGTERM)),
}


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, list[str]]]:
    """How each case ends; they mostly wait, so all run at once."""
    with ThreadPoolExecutor(len(CASES)) as threads:
        results = threads.map(lambda case: signaled(hanging(case[0]), *case[1]), CASES.values())
        return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_second_signal_that_ends_a_process_always_does_and_says_so(
    ends: dict[str, tuple[int, list[str]]], case: str
) -> None:
    code, lines = ends[case]
    last = CASES[case][1][-1]
    assert code == 128 + last
    assert lines[-1] == ended_by_second(last.name) and set(lines[:-1]) <= {FIRST}


def test_signals_that_arrive_together_are_one() -> None:
    process = hanging("sleep")
    for _ in range(5):
        process.send_signal(SIGTERM)
        time.sleep(0.01)
    assert signaled(process, SIGTERM)[0] == 128 + SIGTERM  # it was still there
