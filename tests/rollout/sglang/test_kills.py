"""A server that is killed or hangs: the run continues, and the samples do not depend on it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scipy.stats import ks_2samp

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.build import open_run
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang import engine as sglang_engine
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.continuation import Call
from opo_megatron.run import Run
from opo_megatron.train import train
from tests.support.fixtures import small_config
from tests.support.servers import processes_of, sglang_python

pytestmark = pytest.mark.slow
STEPS = 4
SAMPLES = 5120


def settings(run_dir: Path, *overrides: str) -> tuple[str, ...]:
    return (
        f"run.dir={run_dir}",
        "rollout.engine=sglang",
        f"rollout.sglang.python={sglang_python()}",
        "rollout.prompts_per_step=8",
        "warm_start.steps=0",
        f"train.steps={STEPS}",
        "eval.every_steps=0",
        "eval.problems=8",
        "observe.kl=off",
        "observe.tensorboard=false",
        *overrides,
    )


def kill(run_dir: Path, number: int = signal.SIGKILL) -> None:
    """Signals the server's main process alone, as the OOM killer does; SIGSTOP goes to its process group."""
    pid = int((run_dir / "sglang" / "server_0.pid").read_text())
    if number == signal.SIGSTOP:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)


@contextmanager
def during_request(path: str, indices: tuple[int, ...], act: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `act` while the n-th request of a path is in flight, for every n in `indices`."""
    post, lock, count, triggered = Client.post, threading.Lock(), [0], list[int]()

    def counted(self: Client, requested_path: str, *args: object, **body: object) -> object:
        if requested_path == path:
            with lock:
                count[0] += 1
                number = count[0]
            if number in indices:
                triggered.append(number)
                threading.Timer(0.02, act).start()
        return post(self, requested_path, *args, **body)  # type: ignore[arg-type]

    Client.post = counted  # type: ignore[method-assign,assignment]
    try:
        yield triggered
    finally:
        Client.post = post  # type: ignore[method-assign]


def sampled(run_dir: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and sample indices of every step."""
    files = sorted((run_dir / "rollouts").glob("step_*.safetensors"))
    steps = [Rollouts.load(file) for file in files]
    return [(step.prompt_ids.tolist(), step.sample_indices.tolist()) for step in steps]


def test_a_run_with_a_server_killed_three_times_has_unbiased_lengths(tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    train(small_config(*settings(uninterrupted)))
    with (
        # Requests to /generate: probe, 16 of the evaluation, probe, 16 of a step, …
        during_request("/generate", (25, 70), lambda: kill(killed)) as generating,
        during_request("/update_weights_from_tensor", (4,), lambda: kill(killed)) as updating,
    ):
        train(small_config(*settings(killed)))
    assert generating == [25, 70] and updating == [4]
    assert len(sampled(uninterrupted)) == STEPS
    assert sampled(killed) == sampled(uninterrupted)
    assert processes_of(uninterrupted) == [] and processes_of(killed) == []


def lengths_of(run: Run, kills: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Lengths of SAMPLES responses, and of those that had finished when the server was killed."""
    run_dir, lengths, finished_lengths = Path(run.config.run.dir), list[int](), list[int]()
    rounds = max(1, kills)
    post, recording = Client.post, threading.Event()

    def counted(self: Client, path: str, *args: object, **body: object) -> object:
        replies = post(self, path, *args, **body)  # type: ignore[arg-type]
        if path == "/generate" and recording.is_set():
            finished_lengths.extend(len(one["output_ids"]) for one in replies)  # type: ignore[attr-defined]
            if kills and len(finished_lengths) >= (round_index + 1) * SAMPLES // rounds // 2:
                recording.clear()
                os.killpg(int((run_dir / "sglang" / "server_0.pid").read_text()), signal.SIGKILL)
        return replies

    with monkeypatch.context() as patch:
        patch.setattr(Client, "post", counted)
        # One prompt per request, so that short responses return first.
        patch.setattr(sglang_engine, "POSTS_PER_CALL", SAMPLES // rounds)
        for round_index in range(rounds):
            count = SAMPLES // rounds
            requests = [GenerationRequest(i, i, 0, (1 + i % 7, 3, 5)) for i in range(count)]
            before = len(finished_lengths)
            recording.set()
            rollouts = run.generation.generate(requests, Sampling(200, (4,), (round_index,)), "test")
            recording.clear()
            assert len(finished_lengths) > before or not kills
            lengths.extend(rollouts.response_lengths.tolist())
    return lengths, finished_lengths


def tokens_sampled(log: str) -> int:
    """Tokens that a server's scheduler sampled, by its own log: one per request of every pass."""
    return sum(map(int, re.findall(r"(?:Decode batch, #running-req|Prefill batch, #new-seq): (\d+)", log)))


@pytest.mark.parametrize("continues", ["true", "false"])
@pytest.mark.timeout(600)
def test_response_lengths_do_not_depend_on_kills(
    continues: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers are killed when half of all responses have ended.  Where responses are continued, no token that
    was received is sampled again, and few are lost."""
    large = ("policy.model.max_sequence_length=256", "rollout.sglang.max_running_requests=1024")
    logs = ("rollout.sglang.options={log_level: info, decode_log_interval: 1}",)
    key = f"rollout.sglang.continue_responses={continues}"
    config = small_config(*settings(tmp_path / "run", *large, *logs, key))
    log, received = tmp_path / "run" / "sglang" / "server_0.log", list[int]()
    channels = Call.channels

    def counted(self: Call, clients: object) -> object:
        calls.append(self)
        return channels(self, clients)  # type: ignore[arg-type]

    with open_run(config) as run:
        run.generation.synchronize()
        uninterrupted, _ = lengths_of(run, 0, monkeypatch)
        begin, calls = len(log.read_text()), list[Call]()
        monkeypatch.setattr(Call, "channels", counted)
        killed, finished_lengths = lengths_of(run, 2, monkeypatch)
        assert run.generation.failures == 2 and len(calls) == 4
        received = [call.received.new_tokens for call in calls]
        sampled_tokens = tokens_sampled(log.read_text()[begin:])
        assert run.generation.tokens_continued == (received[0] + received[2] if continues == "true" else 0)
    print(f"{sum(killed)} tokens, {sampled_tokens} sampled, {received} received")  # shown where it fails
    assert len(uninterrupted) == len(killed) == SAMPLES
    assert ks_2samp(uninterrupted, killed).pvalue > 1e-2
    if continues == "true":
        assert sum(received) == sum(killed), "a token was received twice"
        assert 0 <= sampled_tokens - sum(killed) <= 0.05 * sampled_tokens
        assert min(received[0], received[2]) > 0.1 * sum(killed)
    else:
        assert sampled_tokens > 1.2 * sum(killed)
    # Responses that finished before the kills are biased: the test would detect it if they alone were kept.
    assert len(finished_lengths) > 500 and ks_2samp(uninterrupted, finished_lengths).pvalue < 1e-9


def test_a_server_that_hangs_is_restarted(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with open_run(small_config(*settings(run_dir, "rollout.sglang.timeout_seconds=15"))) as run:
        run.generation.synchronize()
        requests = [GenerationRequest(i, i, 0, (1, 3, 5)) for i in range(32)]
        started = time.monotonic()
        with during_request("/generate", (1,), lambda: kill(run_dir, signal.SIGSTOP)) as hung:
            rollouts = run.generation.generate(requests, Sampling(60, (), (1,)), "test")
        assert hung == [1] and run.generation.failures == 1 and len(rollouts) == 32
        assert time.monotonic() - started > 15
    assert processes_of(run_dir) == []


def compiling_interpreter(folder: Path) -> Path:
    """SGLang's interpreter, with a compiler among its children from the start."""
    compiler, interpreter = folder / "nvcc", folder / "python"
    shutil.copy("/bin/sleep", compiler)
    interpreter.write_text(f"#!/bin/sh\n'{compiler}' 600 &\nexec '{sglang_python()}' \"$@\"\n")
    interpreter.chmod(0o700)
    return interpreter


def test_a_server_that_compiles_is_neither_restarted_nor_hung(tmp_path: Path) -> None:
    """Stopped like one that hangs, for twice its time limit, but with a compiler among its processes."""
    run_dir, python = tmp_path / "run", compiling_interpreter(tmp_path)
    overrides = ("rollout.sglang.timeout_seconds=6", f"rollout.sglang.python={python}")
    with open_run(small_config(*settings(run_dir, *overrides))) as run:
        run.generation.synchronize()
        pid = int((run_dir / "sglang" / "server_0.pid").read_text())
        shown, status = list[str](), run.generation.display.status
        run.generation.display.status = lambda text, done=0.0: (shown.append(text), status(text, done))  # type: ignore[assignment,func-returns-value]

        def stop() -> None:
            kill(run_dir, signal.SIGSTOP)
            time.sleep(12)
            os.killpg(pid, signal.SIGCONT)

        requests = [GenerationRequest(i, i, 0, (1, 3, 5)) for i in range(32)]
        started = time.monotonic()
        with during_request("/generate", (1,), stop) as stopped:
            rollouts = run.generation.generate(requests, Sampling(60, (), (1,)), "test")
        assert stopped == [1] and len(rollouts) == 32 and time.monotonic() - started > 12
        assert run.generation.failures == 0
        assert int((run_dir / "sglang" / "server_0.pid").read_text()) == pid
        assert any("SGLang server_0 compiles its kernels (nvcc)" in text for text in shown)
    assert processes_of(run_dir) == []
