"""A server that is killed or hangs: the run goes on, and what is drawn does not depend on it."""

from __future__ import annotations

import os
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
    """The server's whole group would die; here only its main process, as the kernel's OOM killer does."""
    pid = int((run_dir / "sglang" / "server_0.pid").read_text())
    if number == signal.SIGSTOP:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)


@contextmanager
def while_asked(path: str, times: tuple[int, ...], act: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `act` while the n-th request of a path is with the server, for every n of `times`."""
    post, lock, count, done = Client.post, threading.Lock(), [0], list[int]()

    def watched(self: Client, asked: str, *args: object, **body: object) -> object:
        if asked == path:
            with lock:
                count[0] += 1
                number = count[0]
            if number in times:
                done.append(number)
                threading.Timer(0.02, act).start()
        return post(self, asked, *args, **body)  # type: ignore[arg-type]

    Client.post = watched  # type: ignore[method-assign,assignment]
    try:
        yield done
    finally:
        Client.post = post  # type: ignore[method-assign]


def drawn(run_dir: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and sample indices of every step."""
    files = sorted((run_dir / "rollouts").glob("step_*.safetensors"))
    steps = [Rollouts.load(file) for file in files]
    return [(step.prompt_ids.tolist(), step.sample_indices.tolist()) for step in steps]


def test_a_run_with_a_server_killed_three_times_has_unbiased_lengths(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(small_config(*settings(undisturbed)))
    with (
        # Posts of /generate: probe, 16 of the evaluation, probe, 16 of a step, …
        while_asked("/generate", (25, 70), lambda: kill(killed)) as generating,
        while_asked("/update_weights_from_tensor", (4,), lambda: kill(killed)) as updating,
    ):
        train(small_config(*settings(killed)))
    assert generating == [25, 70] and updating == [4]
    assert len(drawn(undisturbed)) == STEPS
    assert drawn(killed) == drawn(undisturbed)
    assert processes_of(undisturbed) == [] and processes_of(killed) == []


def lengths_of(run: Run, kills: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Response lengths of SAMPLES draws, and of those that had ended when the server was killed."""
    run_dir, kept, ended = Path(run.config.run.dir), list[int](), list[int]()
    draws = max(1, kills)
    post, alive = Client.post, threading.Event()

    def watched(self: Client, path: str, *args: object, **body: object) -> object:
        answer = post(self, path, *args, **body)  # type: ignore[arg-type]
        if path == "/generate" and alive.is_set():
            ended.extend(len(one["output_ids"]) for one in answer)  # type: ignore[attr-defined]
            if kills and len(ended) >= SAMPLES // draws // 3:
                alive.clear()
                kill(run_dir)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Client, "post", watched)
        # One request a post, so that short answers come back first.
        patch.setattr(sglang_engine, "POSTS_PER_CALL", SAMPLES // draws)
        for draw in range(draws):
            count = SAMPLES // draws
            requests = [GenerationRequest(i, i, 0, (1 + i % 7, 3, 5)) for i in range(count)]
            before = len(ended)
            alive.set()
            rollouts = run.generation.generate(requests, Sampling(200, (4,), (draw,)), "test")
            alive.clear()
            assert len(ended) > before or not kills
            kept.extend(rollouts.response_lengths.tolist())
    return kept, ended


@pytest.mark.timeout(600)
def test_lengths_do_not_depend_on_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = ("policy.model.max_sequence_length=256", "rollout.sglang.max_running_requests=1024")
    config = small_config(*settings(tmp_path / "run", *roomy))
    with open_run(config) as run:
        run.generation.synchronize()
        undisturbed, _ = lengths_of(run, 0, monkeypatch)
        killed, ended = lengths_of(run, 2, monkeypatch)
        assert run.generation.failures == 2
    assert len(undisturbed) == len(killed) == SAMPLES
    assert ks_2samp(undisturbed, killed).pvalue > 1e-3
    # What had ended before the kills is another distribution: keeping it would have been found out.
    assert len(ended) > 500 and ks_2samp(undisturbed, ended).pvalue < 1e-9


def test_a_server_that_hangs_is_started_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with open_run(small_config(*settings(run_dir, "rollout.sglang.timeout_seconds=15"))) as run:
        run.generation.synchronize()
        requests = [GenerationRequest(i, i, 0, (1, 3, 5)) for i in range(32)]
        started = time.monotonic()
        with while_asked("/generate", (1,), lambda: kill(run_dir, signal.SIGSTOP)) as hung:
            rollouts = run.generation.generate(requests, Sampling(60, (), (1,)), "test")
        assert hung == [1] and run.generation.failures == 1 and len(rollouts) == 32
        assert time.monotonic() - started > 15
    assert processes_of(run_dir) == []
