"""Real SGLang servers of a Qwen3-MoE in bf16: weights, recorded experts, and their replay in the policy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.probe import largest_difference, probe_requests, probe_sampling
from opo_megatron.rollout.sglang.balance import Balance
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.server import Server, write_model_config
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.weights.random_init import random_weights
from tests.support.fixtures import RECIPE, small_config
from tests.support.policies import parallel as parallel
from tests.support.servers import ROOT, processes_of, sglang_python

pytestmark = pytest.mark.slow

VOCAB = LiftTask.vocab_size
MODEL = [
    f"policy.model.{key}={value}"
    for key, value in {
        "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
        "num_layers": 8, "num_moe_experts": 32, "moe_router_topk": 2, "moe_ffn_hidden_size": 32,
        "max_sequence_length": 256,
    }.items()
]  # fmt: skip
SPLITS = [f"policy.model.{key}=128" for key in ("hidden_size", "moe_ffn_hidden_size")]
"""Sizes that a CPU server splits over two ranks."""
TOLERANCE = 0.15
"""Largest |Δ log π| of a token in bf16 with replayed experts."""


@dataclass
class Served:
    """A running server, and this process's policy, whose weights it gets."""

    server: Server
    config: Config
    policy: Policy
    engine: SglangEngine

    def sync(self, engine: SglangEngine | None = None) -> SglangEngine:
        engine = engine or self.engine
        self.policy.version += 1
        engine.update_weights(self.policy.stream_weights(), self.policy.version)
        return engine

    def probe(self, engine: SglangEngine) -> tuple[float, Rollouts]:
        probes = engine.probe(probe_requests(self.config.policy.model, VOCAB), probe_sampling(self.config))
        difference, _ = largest_difference(self.policy, self.policy.parallel, probes)
        (rollouts,) = probes.values()
        return difference, rollouts

    def differences(self, rollouts: Rollouts) -> Tensor:
        """|log π_policy − log π_engine| of every token."""
        schedule = self.policy.schedule(rollouts.sequence_lengths)
        own = rollouts.select(schedule.samples_of(0))
        assert own.engine_log_prob is not None
        return (self.policy.log_probs(own, schedule, 1.0).double() - own.engine_log_prob.double()).abs()


def overrides_of(folder: Path, *more: str) -> list[str]:
    return [
        *MODEL, "policy.dtype=bf16", "policy.max_tokens_per_micro_batch=1024", "rollout.engine=sglang",
        f"run.dir={folder}", f"rollout.sglang.python={sglang_python()}",
        "rollout.sglang.max_running_requests=64", f"rollout.sglang.api_key_file={folder / 'key'}", *more,
    ]  # fmt: skip


def engine_of(served: Server, folder: Path, parallel: Parallel, *more: str) -> SglangEngine:
    config = small_config(*overrides_of(folder, f"rollout.sglang.urls=[{served.url}]", *more))
    return SglangEngine(config, parallel, folder / "model", print)


def serve(folder: Path, parallel: Parallel, *more: str) -> Iterator[Served]:
    config = small_config(*overrides_of(folder, *more))
    write_model_config(config, VOCAB, folder / "model")
    server = Server(config, folder / "model", folder / "server.log", "server", None)
    try:
        server.start(lambda line: None)
        # A tensor-parallel server's first forward pass takes longer than one look at its health.
        assert any(server.client().is_healthy() for _ in range(24))
        weights = random_weights(config.policy.model, VOCAB, 1)
        policy = Policy(config, VOCAB, parallel, config.optimizer, weights)
        yield Served(server, config, policy, engine_of(server, folder, parallel, *more))
    finally:
        server.stop()
    assert processes_of(folder) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moe")


@pytest.fixture(scope="module")
def served(folder: Path, parallel: Parallel) -> Iterator[Served]:
    yield from serve(folder, parallel)


def random_requests(count: int, length: int, seed: int = 3) -> list[GenerationRequest]:
    tokens = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return [GenerationRequest(i, i, 0, tuple(row)) for i, row in enumerate(tokens.tolist())]


def check_mismatch(served: Served, largest_part: float) -> None:
    """With the experts that the server took, at most this part of the mean |Δ log π| is left."""
    served.sync()
    sampling = Sampling(max_tokens=56, stop_tokens=(), seed=(0,), routed_experts=True)
    rollouts = served.engine.generate(random_requests(64, 8), sampling)
    assert rollouts.routed_experts is not None
    assert rollouts.routed_experts.shape == (64 * (8 + 56 - 1), served.config.policy.model.num_layers, 2)
    replayed = served.differences(rollouts)
    own_experts = served.differences(replace(rollouts, routed_experts=None))
    print(f"mean {replayed.mean():.4f}, without replay {own_experts.mean():.4f}")
    print(f"max {replayed.max():.4f}, without replay {own_experts.max():.4f}")
    assert float(replayed.mean()) <= largest_part * float(own_experts.mean())
    assert float(replayed.max()) <= TOLERANCE < float(own_experts.max())


def test_replayed_experts_leave_only_rounding_between_server_and_policy(served: Served) -> None:
    check_mismatch(served, 0.4)


def test_a_cached_prefix_has_the_experts_of_the_pass_that_computed_it(served: Served) -> None:
    served.sync()
    (request,) = random_requests(1, 40, seed=4)
    sampling = Sampling(max_tokens=4, stop_tokens=(), seed=(0,), greedy=True, routed_experts=True)
    posts = [Balance([served.server.client()], served.config).post([request], sampling)[0] for _ in range(3)]
    cached = [post["meta_info"]["cached_tokens"] for post in posts]
    assert cached[0] == 0 and min(cached[1:]) >= 39
    tables = [post["meta_info"]["routed_experts"] for post in posts]
    assert all(torch.equal(table, tables[0]) for table in tables) and tables[0].shape[0] == 40 + 4 - 1
    assert len(tables[0].flatten(1).unique(dim=0)) > 4  # not one choice for all tokens


def test_every_transport_brings_the_same_experts_to_the_server(
    served: Served, folder: Path, parallel: Parallel
) -> None:
    found = []
    for more in (
        [],
        ["rollout.sglang.transport=distributed"],
        ["rollout.sglang.transport=disk"],
        ["policy.weight_bucket_mib=0.01"],
    ):
        engine = served.sync(engine_of(served.server, folder, parallel, *more))
        difference, rollouts = served.probe(engine)
        assert difference <= TOLERANCE
        assert rollouts.engine_log_prob is not None and rollouts.routed_experts is not None
        found.append((rollouts.engine_log_prob, rollouts.routed_experts))
        engine.close()
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_a_sync_that_misses_one_expert_is_seen_by_the_probe(served: Served) -> None:
    served.sync()
    before, _ = served.probe(served.engine)
    lost = "model.layers.0.mlp.experts.{}.down_proj.weight"

    def without_experts():
        for bucket in served.policy.stream_weights():
            yield [(name, torch.zeros_like(t) if name in lost_names else t) for name, t in bucket]

    lost_names = {lost.format(expert) for expert in range(32)}
    served.engine.update_weights(without_experts(), served.policy.version + 1)
    after, _ = served.probe(served.engine)
    assert before <= TOLERANCE < after
    served.sync()


def train(served: Served, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={run_dir}"]
    command += [word for word in overrides_of(run_dir.parent) if not word.startswith("run.dir=")]
    command += ["policy.model.qk_layernorm=true", "observe.kl=off", "observe.tensorboard=false"]
    command += [f"rollout.sglang.api_key_file={served.server.settings.api_key_file}"]
    command += [f"rollout.sglang.urls=[{served.server.url}]", "warm_start.steps=3", "train.steps=2"]
    command += ["rollout.prompts_per_step=24", "eval.problems=8"]
    command += [f"on_policy.tolerance={TOLERANCE}", "on_policy.action=refuse", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


def test_a_run_is_on_policy_with_replay_and_refused_without(served: Served, tmp_path: Path) -> None:
    result = train(served, tmp_path / "replay")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "replay" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["on_policy/logprob_diff_max"] <= TOLERANCE for row in rows[1:])
    assert (
        Rollouts.load(tmp_path / "replay" / "rollouts" / "step_00000001.safetensors").routed_experts
        is not None
    )
    result = train(served, tmp_path / "own_experts", "rollout.routing_replay=false")
    assert result.returncode != 0 and "on_policy.tolerance" in result.stderr, result.stdout + result.stderr


def test_a_tensor_parallel_server_returns_experts_and_takes_weights(
    tmp_path: Path, parallel: Parallel
) -> None:
    for served in serve(tmp_path, parallel, *SPLITS, "rollout.sglang.tensor_parallel_size=2"):
        difference, _ = served.probe(served.sync())
        assert difference <= TOLERANCE
        check_mismatch(served, 0.4)
