"""Steps that overlap with a real server's generation: kills of the run and of the server change nothing."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL

import pytest

from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.server import free_port
from tests.support.fixtures import RECIPE, SMALL_MODEL
from tests.support.interrupted import assert_same_run, attempts
from tests.support.servers import processes_of, sglang_python
from tests.support.tiny_run import rows

LIMIT = 2400
"""Seconds of a run that starts six servers, on a machine that others use too."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT + 100)]

KILLS, SAMPLES = 5, 6 * 4
COMMAND = (
    *SMALL_MODEL,
    "policy.max_tokens_per_micro_batch=64",
    "resume=auto",
    "warm_start.steps=0",
    f"train.steps={KILLS + 2}",
    "rollout.prompts_per_step=6",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=48",  # some are long enough to train meanwhile
    "rollout.engine=sglang",
    "rollout.sglang.exact=true",
    "rollout.overlap=true",
    "rollout.overlap_order=prompt",
    "on_policy.tolerance=0",
    "optimizer.schedule=cosine",
    "eval.every_steps=0",
    "eval.problems=8",
    "observe.kl=off",
    "checkpoint.every_steps=1",  # every attempt ends in its second step, one later than the attempt before
)


@pytest.fixture(scope="module")
def command() -> tuple[str, ...]:
    return (*COMMAND, f"rollout.sglang.python={sglang_python()}")


@pytest.fixture(scope="module")
def uninterrupted(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert attempts(run_dir, command=command, timeout=LIMIT) == [0]
    steps = rows(run_dir)[1:]
    assert {row["on_policy/logprob_diff_max"] for row in steps} == {0.0}
    assert min(row["overlap/cuts"] for row in steps) > 1
    orders = [row.get("overlap_order") for row in rows(run_dir, "audit.jsonl")]
    assert orders == [None, *(KILLS + 2) * ["prompt"]]
    return run_dir


@pytest.mark.parametrize("continues", ["true", "false"])
def test_a_step_whose_server_is_killed_is_continued_or_begins_anew(
    continues: str, command: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    command = (*command, f"rollout.sglang.continue_responses={continues}")
    faults = ["server", [f"streamed {SAMPLES // 8}"]]
    assert attempts(tmp_path / "run", faults, command=command, timeout=LIMIT) == [0, 0]
    metrics = rows(tmp_path / "run")
    failures = {row["step"]: row["run/engine_failures"] for row in metrics}
    assert failures == {0: 0, 1: 0} | dict.fromkeys(range(2, KILLS + 3), 1)
    kept = {row["step"] for row in metrics if row["run/tokens_continued"]}
    assert kept == ({2} if continues == "true" else set())
    lost = {row["step"] for row in rows(tmp_path / "run", "timeline.jsonl") if "lost" in row["ranks"][0]}
    assert lost == (set() if continues == "true" else {2})
    assert_same_run(tmp_path / "run", uninterrupted)
    assert processes_of(tmp_path / "run") == []


def test_five_kills_inside_streamed_steps_change_nothing(
    command: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    """Of the events of a step, which are its responses, its parts and its update."""
    events = sorted(random.Random(5).sample(range(1, SAMPLES + 4), KILLS))
    schedules = [[f"streamed {event}", int(SIGKILL)] for event in events]
    codes = attempts(tmp_path / "run", *schedules, command=command, timeout=LIMIT)
    assert codes == [-SIGKILL] * KILLS + [0]
    assert_same_run(tmp_path / "run", uninterrupted)
    timeline = [row["step"] for row in rows(tmp_path / "run", "timeline.jsonl")]
    assert timeline == [*range(1, KILLS + 3)]


def an_external_server(
    folder: Path, number: int, command: tuple[str, ...]
) -> tuple[subprocess.Popen[bytes], str]:
    """A server of `opo serve`, and its address."""
    port = free_port()
    argv = [sys.executable, "-m", "opo_megatron", "serve", str(RECIPE), *command, "policy.device=cpu"]
    argv += ["policy.model.vocab_size=17", f"rollout.sglang.api_key_file={folder / 'key'}"]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / f"{number}.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    client, deadline = Client(f"http://127.0.0.1:{port}", 60), time.monotonic() + 300
    while not client.is_healthy():
        assert process.poll() is None and time.monotonic() < deadline, (folder / f"{number}.log").read_text()
        time.sleep(0.5)
    return process, client.url


def test_a_step_goes_on_with_the_external_servers_that_still_answer(
    command: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "sglang").mkdir(parents=True)
    servers = []
    try:
        for number in range(2):
            servers.append(an_external_server(tmp_path, number, command))
        # The fault kills the process of this file.
        (tmp_path / "run" / "sglang" / "server_0.pid").write_text(f"{servers[0][0].pid}\n")
        urls = f"rollout.sglang.urls=[{','.join(url for _, url in servers)}]"
        external = (*command, urls, f"rollout.sglang.api_key_file={tmp_path / 'key'}")
        external = (*external, "rollout.sglang.transport=distributed")
        faults = ["server", [f"streamed {SAMPLES // 8}"]]
        codes = attempts(tmp_path / "run", faults, command=external, timeout=LIMIT)
        assert codes == [0, 2], "of another attempt, all servers have to answer at the start"
        assert servers[0][0].poll() is not None and servers[1][0].poll() is None
    finally:
        for process, _ in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)
            process.wait()
    metrics = rows(tmp_path / "run")
    assert {row["step"] for row in metrics if row["run/tokens_continued"]} == {2}
    assert metrics[-1]["run/engine_failures"] == 1
    assert_same_run(tmp_path / "run", uninterrupted)
