"""The Python sandbox: programs compute, and nothing of them gets out."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from opo_megatron.errors import UserError
from opo_megatron.tasks import python_sandbox
from opo_megatron.tasks.python_sandbox import LONGEST_OUTPUT, Limits, check_sandbox, run_python

try:
    check_sandbox()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

LIMITS = Limits(seconds=5.0, memory_mib=300)
OUT = f"/tmp/opo_sandbox_{os.getpid()}"


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(6 * 7)", "42\n"),
        ("import math\nmath.comb(10, 3)", "120\n"),
        ("x = 3\nx ** 2", "9\n"),
        ("from fractions import Fraction\nprint(Fraction(1, 3) + 1)", "4/3\n"),
        ("open('a', 'w').write('hello')\nprint(open('/tmp/a').read())", "hello\n"),
        ("", ""),
    ],
)
def test_a_program_computes_and_its_last_value_is_shown(code: str, output: str) -> None:
    assert run_python(code, LIMITS) == output


HOSTILE = {
    "nested": ("eval('(' * 500 + '1' + ')' * 500)", "SyntaxError"),
    "fork": ("import os\nos.fork()", "PermissionError"),
    "fork bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: raise SystemExit('no')", "no"),
    "clone": ("import ctypes\nprint(ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0))", "-1"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo out'])", "PermissionError"),
    "subprocess": ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"),
    "output": ("print('x' * 10**6)", "printed too much"),
    "network": ("import socket\nsocket.create_connection(('1.1.1.1', 80), 1)", "unreachable"),
    "file outside": ("open('/etc/x', 'w')", "Error"),
    "read-only": ("open('/usr/x', 'w')", "Read-only"),
    "dot dot": (f"import os\nos.chdir('..')\nopen('{OUT}'.replace('/tmp', ''), 'w')", "Error"),
    "read secrets": ("open('/etc/passwd').read()", "FileNotFoundError"),
    "processes": ("import os\nos.listdir('/proc')", "FileNotFoundError"),
    "parent": ("import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nprint('ok')", ""),
    "memory": ("x = [0] * 10**9", "MemoryError"),
    "disk": ("open('a', 'wb').write(b'x' * 10**9)", "Error"),
    "unshare": ("import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))", "-1"),
    "mount": ("import ctypes\nprint(ctypes.CDLL(None).mount(b'a', b'/usr', b'tmpfs', 0, None))", "-1"),
    "environment": ("import os\nprint([k for k in os.environ if 'OPO' in k or 'PATH' in k])", "[]"),
    "no syntax": ("def f(:", "SyntaxError"),
    "exit": ("import os\nos._exit(3)", ""),
    "segfault": ("import ctypes\nctypes.string_at(0)", ""),
    "stack": ("def f(): return f()\nf()", "RecursionError"),
    "input": ("print(repr(input()))", "EOFError"),
    "surrogates": ("print('\\ud800')", "UnicodeEncodeError"),
    "zero byte": ("print(1)\0", "Error"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_an_error_and_nothing_else(name: str) -> None:
    code, words = HOSTILE[name]
    output = run_python(code, LIMITS)
    assert words in output and len(output) < LONGEST_OUTPUT + 200
    assert not Path(OUT).exists()


@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(99)"])
def test_an_endless_program_is_ended(code: str) -> None:
    started = time.monotonic()
    assert "ended after 0.3 seconds" in run_python(code, Limits(0.3, 300))
    assert time.monotonic() - started < 2


def test_a_machine_without_namespaces_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_sandbox, "NAMESPACES", ("--no-such-namespace",))
    with pytest.raises(UserError, match=r"whose sandbox does not work on this machine.*no-such-namespace"):
        check_sandbox.__wrapped__()


@pytest.mark.slow
def test_a_thousand_hostile_programs_leave_nothing_and_reach_nobody() -> None:
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.signal(number, lambda one, _: received.append(one)) for number in numbers]
    rng, cases = random.Random(0), [*HOSTILE.values(), ("while True: pass", "ended after")]
    children = set(_children())
    try:
        for _ in range(1000):
            code, words = rng.choice(cases)
            started = time.monotonic()
            assert words in run_python(code, Limits(0.5, 300)) or words == ""
            assert time.monotonic() - started < 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert received == [] and not Path(OUT).exists()
    assert set(_children()) == children


def _children() -> list[int]:
    return [int(one) for one in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
