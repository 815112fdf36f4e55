"""The launcher of ranks: environment, signals, exit codes, no orphaned processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opo_megatron.distributed import launch
from opo_megatron.distributed.launch import run_ranks
from tests.support.paths import ROOT

PYTHON = [sys.executable, "-S", "-c"]  # -S: ranks start in 10 ms
SLEEP = "import os, time; open(os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(60)"


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def written(name: str) -> str:
    path = Path(name)
    return path.read_text() if path.exists() else ""


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_parent(code: str, nproc: int, before: str = "") -> subprocess.Popen[bytes]:
    """Starts a parent of `nproc` ranks of `code`; returns it once every rank has written its file."""
    run = f"run_ranks({[*PYTHON, code]!r}, {nproc})"
    script = f"import sys; from opo_megatron.distributed import launch; {before}sys.exit(launch.{run})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    wait_for(lambda: all(written(str(rank)) for rank in range(nproc)))
    time.sleep(0.1)  # the ranks may write before the parent has installed its handlers
    return parent


def test_every_rank_gets_the_variables_of_torch_distributed(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS OPO_CHILD"
    code = (
        f"import os; open(os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names.split()!r}))"
    )
    assert run_ranks([*PYTHON, code], 2, threads_per_rank=3) == 0
    first, second = written("0").split(), written("1").split()
    port = first[5]
    assert first == ["0", "0", "2", "2", "127.0.0.1", port, "3", "1"]
    assert second == ["1", "1", "2", "2", "127.0.0.1", port, "3", "1"]
    assert int(port) > 1023


def test_omp_num_threads_of_the_user_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    code = "import os; open('threads', 'w').write(os.environ['OMP_NUM_THREADS'])"
    assert run_ranks([*PYTHON, code], 1, threads_per_rank=2) == 0
    assert written("threads") == "5"


def test_the_first_failing_rank_sets_the_exit_code_and_stops_the_rest():
    code = (
        "import os, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        "open(str(rank), 'w').write(str(os.getpid()))\n"
        "if rank == 1:\n"
        "    while not all(os.path.exists(str(r)) for r in range(3)): time.sleep(0.01)\n"
        "    sys.exit(7)\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    assert run_ranks([*PYTHON, code], 3) == 7
    assert time.monotonic() - start < 10
    assert not any(is_alive(int(written(str(rank)))) for rank in range(3))


def test_the_earlier_of_two_failures_is_reported():
    # Rank 0 fails as a consequence of rank 1, shortly after it.
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': open('failed', 'w').close(); sys.exit(2)\n"
        "while not os.path.exists('failed'): time.sleep(0.01)\n"
        "time.sleep(0.5); sys.exit(1)\n"
    )
    assert run_ranks([*PYTHON, code], 2) == 2


def test_preempted_ranks_are_waited_for_and_a_failure_is_reported(monkeypatch):
    monkeypatch.setattr(launch.stop_ranks, "__defaults__", (0.2,))
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(75)\n"
        "time.sleep(0.6); open('0', 'w').write('closed'); sys.exit({})\n"
    )
    for last, expected in ((75, 75), (0, 75), (1, 1)):
        assert run_ranks([*PYTHON, code.format(last)], 2) == expected
        assert written("0") == "closed"
        Path("0").unlink()


def test_a_rank_killed_by_a_signal_is_named_and_gives_128_plus_its_number(capfd):
    assert run_ranks([*PYTHON, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], 1) == 137
    assert capfd.readouterr().err == "error: rank 0 was killed by SIGKILL; the other ranks are stopped\n"


UNTOLD = {
    "returns 0": ("sys.exit(0)", 0),
    "leaves like os._exit": ("tell('its last step (17 of 60)'); os._exit(0)", 0),
    "pretends to have saved": ("tell('its last step (17 of 60)'); os._exit(75)", 75),
    "pretends to hang": ("tell('its last step (17 of 60)'); os._exit(76)", 76),
    "fails in silence": ("tell('its last step (17 of 60)'); os._exit(7)", 7),
    "changes its code at the end": ("tell('exit 0'); atexit.register(os._exit, 3)", 3),
    "lets a library exit": ("ctypes.CDLL(None).exit(0)", 0),
}
TELLING = (
    "import atexit, ctypes, os, sys\n"
    "def tell(text): os.pwrite(int(os.environ['OPO_OUTCOME_FD']), text.encode() + b'\\n', 0)\n"
    "if os.environ['RANK'] == '0':\n    tell('exit 0'); sys.exit(0)\n"
)


@pytest.mark.parametrize(("code", "exit_code"), UNTOLD.values(), ids=UNTOLD)
def test_a_rank_that_ends_without_having_come_to_its_end_has_failed(capfd, code, exit_code):
    assert run_ranks([*PYTHON, TELLING + code], 2, writes_outcome=True) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: rank 1 ended with exit code {exit_code} before ")
    assert error.count("\n") == 1 and "called exit; remove that call and repeat the command" in error
    assert ("before its last step (17 of 60): something" in error) == ("17 of 60" in code)


@pytest.mark.parametrize(
    ("told", "exit_code"),
    [("exit 0", 0), ("exit 75", 75), ("exit 76", 76), ("exit 2", 2), ("exit 130", 130), ("anything", 1)],
)
def test_the_exit_code_that_a_rank_wrote_is_its_outcome(told, exit_code):
    code = TELLING + f"tell({told!r}); sys.exit({exit_code})"
    assert run_ranks([*PYTHON, code], 2, writes_outcome=True) == exit_code


def test_what_ranks_tell_does_not_depend_on_a_folder(monkeypatch, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    code = TELLING + f"import shutil; shutil.rmtree({str(folder)!r}); os.chdir('/'); tell('exit 0')"
    assert run_ranks([*PYTHON, code], 2, writes_outcome=True) == 0
    assert not folder.exists()


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_period(monkeypatch):
    monkeypatch.setattr(launch.stop_ranks, "__defaults__", (0.5,))
    code = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    while not os.path.exists('1'): time.sleep(0.01)\n"
        "    sys.exit(4)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open('1', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    assert run_ranks([*PYTHON, code], 2) == 4
    assert not is_alive(int(written("1")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_to_the_parent_reach_every_rank_once(number):
    code = (
        "import os, signal, sys, time\n"
        "got = []\n"
        f"signal.signal({int(number)}, lambda n, f: got.append(n))\n"
        "open(os.environ['RANK'], 'w').write('ready')\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "open('got' + os.environ['RANK'], 'w').write(str(got))\n"
    )
    parent = start_parent(code, 2)
    parent.send_signal(number)
    assert parent.wait(timeout=20) == 0
    assert written("got0") == written("got1") == f"[{int(number)}]"


def test_ranks_killed_by_a_forwarded_signal_give_128_plus_its_number():
    parent = start_parent(SLEEP, 2)
    parent.terminate()
    assert parent.wait(timeout=20) == 128 + signal.SIGTERM


def test_a_second_interrupt_kills_ranks_that_ignore_the_first():
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "open(os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = start_parent(code, 2)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    parent.wait(timeout=20)
    assert not any(is_alive(int(written(str(rank)))) for rank in range(2))


def test_a_second_sigterm_kills_ranks_that_ignore_both(monkeypatch):
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    shorter = "launch.REPEAT_SECONDS, launch.stop_ranks.__defaults__ = 0.2, (0.3,); "
    parent = start_parent(code, 2, before=shorter)
    for _ in range(2):  # together they are one
        parent.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    time.sleep(0.3)
    assert parent.poll() is None
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=20) == 128 + signal.SIGTERM
    assert not any(is_alive(int(written(str(rank)))) for rank in range(2))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_ranks_die_with_a_killed_parent():
    parent = start_parent(SLEEP, 2)
    pids = [int(written(str(rank))) for rank in range(2)]
    assert all(map(is_alive, pids))
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_signal_handlers_of_the_caller_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    assert run_ranks([*PYTHON, "pass"], 1) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_nonexistent_command_raises_file_not_found():
    with pytest.raises(FileNotFoundError):
        run_ranks(["no-such-program"], 2)
