"""Children that anybody's code forks have default handlers, and their signals are not the parent's."""

from __future__ import annotations

import subprocess
import sys

import pytest

PARENT = """
import concurrent.futures, faulthandler, multiprocessing, os, signal, threading, time
from opo_megatron.resilience.second_signal import SecondSignal
from opo_megatron.utils.signals import SignalHandlers, undo_in_children

received = []
handlers = SignalHandlers((signal.SIGTERM, signal.SIGUSR1), lambda number, frame: received.append(number))
handlers.install()
second = SecondSignal(announces=True)
second.listen()
faulthandler.register(signal.SIGUSR2, open(os.devnull, "w"))
undo_in_children(faulthandler, lambda: faulthandler.unregister(signal.SIGUSR2))
context = multiprocessing.get_context("fork")

def ends_by(number, pid):
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number

def fork():
    if (pid := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    return pid

{case}
assert received == [], received  # of a child's signals
os.kill(os.getpid(), signal.SIGUSR1)
assert received == [signal.SIGUSR1], received  # the parent still has its handlers
second.close()
handlers.restore()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
"""
CHILDREN = {
    "a process that is terminated": """
process = context.Process(target=time.sleep, args=(60,))
process.start()
process.terminate()
process.join()
assert process.exitcode == -signal.SIGTERM
""",
    "a pool that is terminated": """
pool = context.Pool(2)
pool.apply_async(time.sleep, (60,))
pool.terminate()
pool.join()
""",
    "an executor whose workers are killed": """
executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
waiting = executor.submit(time.sleep, 60)
while not executor._processes:
    time.sleep(0.01)
for process in executor._processes.values():
    process.terminate()
assert isinstance(waiting.exception(10), concurrent.futures.process.BrokenProcessPool)
""",
    "a fork told to stop like a run": "ends_by(signal.SIGUSR1, fork())",
    "a fork asked for its stacks": "ends_by(signal.SIGUSR2, fork())",
    "a fork interrupted at once, twenty times": "for _ in range(20): ends_by(signal.SIGTERM, fork())",
    "a fork of a thread": """
pids = []
thread = threading.Thread(target=lambda: pids.append(fork()))
thread.start()
thread.join()
ends_by(signal.SIGTERM, pids[0])
""",
    "a fork of a fork": """
receiver, sender = os.pipe()
if (pid := os.fork()) == 0:
    ends_by(signal.SIGTERM, fork())
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
""",
}


@pytest.mark.parametrize("case", CHILDREN.values(), ids=CHILDREN)
def test_a_forked_child_has_the_handlers_from_before(case: str) -> None:
    script = PARENT.replace("{case}", case)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
