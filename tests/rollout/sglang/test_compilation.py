"""A server that compiles its kernels is waited for and shown; one that hangs is not."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opo_megatron.config.rollout import SglangConfig
from opo_megatron.errors import EngineFailure
from opo_megatron.rollout.sglang import compilation
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.compilation import LOG_SECONDS, LOG_SIGN, CompileWatch
from opo_megatron.rollout.sglang.engine import SglangEngine
from tests.support.web_server import web_server

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.argv[1], "60"]) if sys.argv[1:] else None
print("ready", flush=True)
time.sleep(60)
"""
"""A server's process, with a compiler as its child or alone."""


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[[str], str]:
    """A program of this name that runs for a while."""

    def make(name: str) -> str:
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_bytes(Path("/bin/sleep").read_bytes())
        program.chmod(0o700)
        return str(program)

    return make


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PARENT, *words]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        assert running[-1].stdout is not None and running[-1].stdout.readline() == "ready\n"
        return running[-1]

    yield start
    for one in running:
        os.killpg(one.pid, 9)
        one.wait()


def watch(pid: int, log: Path, limit: float = 60.0, begin: int = 0) -> CompileWatch:
    if not log.exists():
        log.touch()
    return CompileWatch("server_0", pid, log, limit, begin)


@pytest.mark.parametrize("name", ["nvcc", "ninja", "cicc", "ptxas", "cc1plus"])
def test_a_compiler_among_its_processes_is_shown(
    name: str, process: Any, compiler: Any, tmp_path: Path
) -> None:
    seen = watch(process(compiler(name)).pid, tmp_path / "log")
    assert str(seen.activity()).startswith(f"SGLang server_0 compiles its kernels ({name})  0 s")


@pytest.mark.parametrize("name", [None, "python3", "sleep", "nvidia-smi", "ninjas"])
def test_other_processes_are_no_sign(name: str | None, process: Any, compiler: Any, tmp_path: Path) -> None:
    seen = watch(process(*([compiler(name)] if name else [])).pid, tmp_path / "log")
    assert seen.activity() is None


@pytest.mark.parametrize(
    ("line", "is_sign"),
    [
        ("[1/3] nvcc --generate-dependencies -O3 rope.cu", True),
        ("ninja: Entering directory `/home/user/.cache/tvm-ffi/sgl_kernel_rmsnorm'", True),
        ("INFO tvm_ffi.cpp: building fused_rope", True),
        ("[2026-11-27 10:00:00] Compiling DeepGEMM kernels, this may take a while", True),
        ("flashinfer.jit: JIT building module norm", True),
        ("Triton compilation of _fwd_kernel", True),
        ("[rank0] torch/_inductor/compile_fx.py: lowering", True),
        ("The server is fired up and ready to roll!", False),
        ("Prefill batch. #new-seq: 1, #cached-token: 0", False),
        ("enable_torch_compile=False, compilers=None", False),
        ("UserWarning: precompiled extension ignored", False),
    ],
)
def test_the_last_line_of_the_log_is_a_sign_while_it_is_new(
    line: str, is_sign: bool, process: Any, tmp_path: Path
) -> None:
    pid, log = process().pid, tmp_path / "log"
    log.write_text(f"starting\n{line}\n")
    assert (watch(pid, log).activity() is not None) is is_sign
    assert (LOG_SIGN.search(line.encode()) is not None) is is_sign
    assert watch(pid, log, begin=log.stat().st_size).activity() is None  # a line of an earlier process
    old = time.time() - LOG_SECONDS - 1
    os.utime(log, (old, old))
    assert watch(pid, log).activity() is None
    log.write_text(f"{line}\nthe next line\n")
    assert watch(pid, log).activity() is None


def test_a_process_that_is_gone_compiles_nothing(process: Any, tmp_path: Path) -> None:
    server, log = process(), tmp_path / "log"
    log.write_text("Compiling kernels\n")
    seen = watch(server.pid, log)
    assert seen.activity() is not None
    server.kill()
    time.sleep(0.2)  # a zombie, until it is waited for
    assert watch(server.pid, log).activity() is None


def test_compiling_for_ever_is_hanging(
    process: Any, compiler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that a killed compiler left behind blocks the next one without end."""
    monkeypatch.setattr(compilation, "INTERVAL_SECONDS", 0.05)
    seen = watch(process(compiler("ninja")).pid, tmp_path / "log", limit=0.3)
    started = time.monotonic()
    while seen.activity() is not None:
        assert time.monotonic() - started < 20
        time.sleep(0.02)
    assert time.monotonic() - started >= 0.3


def test_other_ranks_of_the_machine_look_for_themselves(process: Any, compiler: Any, tmp_path: Path) -> None:
    seen = pickle.loads(pickle.dumps(watch(process(compiler("nvcc")).pid, tmp_path / "log")))
    assert "server_0 compiles its kernels (nvcc)" in seen.activity()


def test_requests_wait_for_compiling_and_not_for_hanging() -> None:
    with web_server(200, '{"ok": true}', delay=0.5) as url:
        with pytest.raises(EngineFailure, match=r"did not reply for 0\.1 seconds"):
            Client(url, 0.1).post("/generate")
        patient = Client(url, 0.1, is_compiling=lambda: True)
        assert patient.post("/generate") == {"ok": True}
        with pytest.raises(EngineFailure, match=r"did not reply for 0\.2 seconds"):
            patient.post("/destroy_weights_update_group", timeout=0.2)  # a limit of its own


def test_time_without_compiling_counts() -> None:
    """It compiles for a while, and then hangs."""
    asked: list[float] = []

    def compiles() -> bool:
        asked.append(time.monotonic())
        return len(asked) <= 3

    with web_server(200, "{}", delay=1.5) as url, pytest.raises(EngineFailure, match="did not reply for"):
        Client(url, 0.1, is_compiling=compiles).post("/generate")
    assert len(asked) >= 4


def test_a_health_check_does_not_wait(process: Any) -> None:
    assert Client("http://127.0.0.1:9", 60.0, is_compiling=lambda: True).is_healthy() is False


def engine_of(seen: CompileWatch) -> tuple[SglangEngine, list[str], list[str]]:
    engine, shown, logged = SglangEngine.__new__(SglangEngine), list[str](), list[str]()
    engine._watch, engine._announced = seen, set()
    engine._show_status, engine._log = shown.append, logged.append
    return engine, shown, logged


def test_the_run_shows_every_second_and_logs_once_for_each_process(
    process: Any, compiler: Any, tmp_path: Path
) -> None:
    engine, shown, logged = engine_of(watch(process(compiler("nvcc")).pid, tmp_path / "log"))
    assert all(engine._shows_compiling() for _ in range(3))
    assert len(shown) == 3 and "compiles its kernels (nvcc)" in shown[0]
    assert logged == ["SGLang server_0 compiles its kernels, which takes about a minute; the run waits"]
    engine._watch = watch(process(compiler("ninja")).pid, tmp_path / "log")  # restarted
    assert engine._shows_compiling() and len(logged) == 2
    engine._watch = watch(process().pid, tmp_path / "log")
    assert not engine._shows_compiling() and len(shown) == 4


def test_a_server_that_compiles_is_alive(
    process: Any, compiler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opo_megatron.rollout.sglang.server import Server

    server = Server.__new__(Server)
    server.settings, server.url, server.key = SglangConfig(), "http://127.0.0.1:9", "key"
    for words, is_alive in ((compiler("nvcc"),), True), ((), False):
        server._process = process(*words)
        server.watch = watch(server._process.pid, tmp_path / "log")
        assert server.is_alive() is is_alive
    server._process = SimpleNamespace(poll=lambda: 1)  # type: ignore[assignment]
    assert not server.is_alive()
