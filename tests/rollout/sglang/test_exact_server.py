"""Exact mode with a real server: its log-probabilities are the policy's, and its samples the run's."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.build import open_run
from opo_megatron.errors import EngineFailure
from opo_megatron.observe.metrics_file import MetricsFile
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.exact_batchings import RETRACTED
from opo_megatron.rollout.sglang.installation import SERVE
from opo_megatron.run import Run
from opo_megatron.train import opo_step
from opo_megatron.updates.sft import run_sft
from tests.support.fixtures import small_config
from tests.support.servers import processes_of, sglang_python

STOPS = (0, 7)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with a server of its own, which has passed the check of exact mode: one request, three, prompts
    in chunks, prefix hits, retraction."""
    run_dir = tmp_path_factory.mktemp("exact") / "run"
    config = small_config(
        f"run.dir={run_dir}",
        "rollout.engine=sglang",
        "rollout.sglang.exact=true",
        "on_policy.tolerance=0",
        f"rollout.sglang.python={sglang_python()}",
        "rollout.sglang.options.chunked_prefill_size=64",
        "rollout.sglang.max_running_requests=64",
        "rollout.prompts_per_step=4",
        "warm_start.steps=40",
        "observe.kl=off",
        "observe.tensorboard=false",
    )
    with open_run(config) as run:
        run_sft(run)
        run.generation.synchronize()
        yield run
    assert processes_of(run_dir) == []


def engine_of(run: Run) -> SglangEngine:
    assert isinstance(run.generation.engine, SglangEngine)
    return run.generation.engine


def local_engine(run: Run) -> LocalEngine:
    """The local engine in exact mode with the policy's weights."""
    cpu = torch.device("cpu")
    engine = LocalEngine(run.policy.config.model, run.policy.vocab_size, torch.float32, cpu, 16, exact=True)
    engine.update_weights(run.policy.stream_weights(), run.policy.version)
    return engine


def requests(count: int, seed: int = 0) -> list[GenerationRequest]:
    """Prompts of 1 to 40 tokens, some of which begin with others."""
    rng = random.Random(seed)
    prompts: list[tuple[int, ...]] = []
    for i in range(count):
        begin = prompts[rng.randrange(i)][:20] if i % 3 == 2 else ()
        prompts.append((*begin, *(rng.randrange(17) for _ in range(rng.randint(1, 20)))))
    return [GenerationRequest(i // 2, i, i % 2, prompt) for i, prompt in enumerate(prompts)]


def assert_same(actual: Rollouts, expected: Rollouts) -> None:
    assert actual.responses() == expected.responses()
    assert torch.equal(actual.finish_reasons, expected.finish_reasons)
    assert actual.engine_log_prob is not None and expected.engine_log_prob is not None
    assert torch.equal(actual.engine_log_prob, expected.engine_log_prob)


SHARED = (
    "opo_megatron.kernels.exact",
    "opo_megatron.kernels.exact_digest",
    "opo_megatron.kernels.exact_sampling",
    "opo_megatron.kernels.rotary",
    "opo_megatron.rollout.local.decoder",
)


def test_files_that_the_server_shares_need_torch_alone() -> None:
    program = f"""
import importlib, runpy, sys
import torch
before = set(sys.modules)
runpy.run_path({str(SERVE)!r})["share_files"]()
for name in {SHARED!r}:
    importlib.import_module(name)
known = (*sys.stdlib_module_names, "torch", "torchvision", "vllm", "opo_megatron")
print(*(name for name in set(sys.modules) - before if name.partition(".")[0] not in known))
"""
    argv = [sglang_python(), "-c", program]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=True)
    assert result.stdout.strip() == ""


def test_three_steps_have_no_difference_at_all(run: Run) -> None:
    for step in (1, 2, 3):
        opo_step(run, step)
    rows = MetricsFile(Path(run.config.run.dir) / "metrics.jsonl").read()
    assert [row["on_policy/logprob_diff_max"] for row in rows] == [0.0, 0.0, 0.0]
    assert [row["on_policy/sync_diff_max"] for row in rows] == [0.0, 0.0, 0.0]
    assert max(row["grad_norm"] for row in rows) > 0


SAMPLINGS = {
    "temperature 1": Sampling(12, STOPS, (5, 1)),
    "temperature 0.7": Sampling(12, STOPS, (5, 2), temperature=0.7),
    "greedy": Sampling(12, STOPS, (5, 3), greedy=True),
    "top_k": Sampling(12, STOPS, (5, 4), top_k=3),
    "top_p": Sampling(12, STOPS, (5, 5), top_p=0.6, temperature=1.3),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_server_samples_what_the_local_engine_samples(run: Run, sampling: str) -> None:
    expected = local_engine(run).generate(requests(30), SAMPLINGS[sampling])
    assert_same(engine_of(run).generate(requests(30), SAMPLINGS[sampling]), expected)
    assert expected.response_lengths.unique().numel() > 3


def in_posts(engine: SglangEngine, parts: Sequence[Sequence[int]], at_once: bool) -> Rollouts:
    """Responses to the same 48 requests, posted in `parts`, in the order of the requests."""
    everything, sampling = requests(48), SAMPLINGS["temperature 1"]

    def post(part: Sequence[int]) -> Rollouts:
        return engine.generate([everything[i] for i in part], sampling)

    with ThreadPoolExecutor(len(parts) if at_once else 1) as threads:
        rollouts = Rollouts.concatenate(list(threads.map(post, parts)))
    order = [i for part in parts for i in part]
    return rollouts.select([order.index(i) for i in range(48)])


def test_retracted_requests_sample_the_same(run: Run) -> None:
    """`generate_batched` fails where the server retracts none."""
    engine, sampling = engine_of(run), Sampling(24, (), (5, 6))
    actual = engine.generate_batched(requests(40), sampling, RETRACTED)
    assert actual is not None
    assert_same(actual, local_engine(run).generate(requests(40), sampling))


def test_neither_arrival_order_nor_batch_size_nor_the_cache_changes_a_bit(run: Run) -> None:
    engine, order = engine_of(run), list(range(48))
    random.Random(1).shuffle(order)
    expected = in_posts(engine, [range(48)], at_once=True)
    alone = [[i] for i in order]
    threes = [order[i : i + 3] for i in range(0, 48, 3)]
    engine._clients[0].post("/flush_cache")
    for parts, at_once in ((alone, False), (alone, True), (threes, False), ([order], True)):
        assert_same(in_posts(engine, parts, at_once), expected)


# ---------------------------------------------------------------------- continuation


@pytest.mark.parametrize(
    "cuts", [(5, 1, 9), *(pytest.param(one, marks=pytest.mark.slow) for one in ((1,), (9,), (30,), (3, 3)))]
)
def test_responses_that_an_engine_failure_cuts_are_continued_bit_for_bit(
    run: Run, cuts: tuple[int, ...]
) -> None:
    """The engine fails when so many responses have ended, then the next call when so many more have."""
    engine, asked, sampling = engine_of(run), requests(40, 5), Sampling(24, STOPS, (11, *cuts))
    expected = engine.generate(asked, sampling)
    kept = 0
    for cut in cuts:
        ended: list[Rollouts] = []

        def fail(rollouts: Rollouts, ended: list[Rollouts] = ended, cut: int = cut) -> None:
            ended.append(rollouts)
            if sum(map(len, ended)) >= cut:
                raise EngineFailure("cut")

        with pytest.raises(EngineFailure, match="cut"):
            engine.generate(asked, sampling, deliver=fail)
        engine.recover()
        run.generation.synchronize()
        kept += engine.kept_tokens(sampling) or 0
    parts: list[Rollouts] = []
    assert_same(engine.generate(asked, sampling, deliver=parts.append), expected)
    assert len(parts[0]) >= cuts[-1], "those that had ended are delivered at once"
    assert sum(map(len, parts)) == len(asked)
    last = engine._continuation._last
    assert last is not None and last.received.new_tokens + kept == int(expected.response_lengths.sum())
    assert 0 < kept < int(expected.response_lengths.sum())


def test_what_is_kept_is_for_one_sampling_and_the_call_after_a_failure(run: Run) -> None:
    engine, asked, sampling = engine_of(run), requests(6, 5), Sampling(8, STOPS, (12,))
    engine.generate(asked, sampling)
    assert engine.kept_tokens(sampling) is None, "nothing has failed"
    engine.recover()
    assert engine.kept_tokens(sampling) is None, "the servers hold no weights"
    run.generation.synchronize()
    assert engine.kept_tokens(sampling) is not None
    assert engine.kept_tokens(replace(sampling, seed=(13,))) is None
    engine.generate(asked, replace(sampling, seed=(13,)))
    assert engine.kept_tokens(sampling) is None
    engine.recover()
    run.generation.synchronize()
    run.policy.version += 1
    try:
        run.generation.synchronize()
        assert engine.kept_tokens(replace(sampling, seed=(13,))) is None, "of other weights"
    finally:
        run.policy.version -= 1
        run.generation.synchronize()
