"""Before an engine allocates, the policy has released all that it can, whatever happened before.

Only torch's caching allocator is replaced, which a CPU lacks; policy, offloading and the order of calls are
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.errors import EngineFailure
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout import memory_sharing
from opo_megatron.rollout.generation import Generation
from opo_megatron.rollout.memory_sharing import MemorySharing, gpu_bytes
from tests.support.fixtures import small_config, small_policy


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


class Allocator:
    """Torch's CUDA allocator: what is freed stays with it until it is told to release that."""

    def __init__(self) -> None:
        self.cached, self.shared = 0, 0

    def free_bucket(self) -> None:
        self.shared += 1

    def free_activations(self) -> None:
        self.cached += 1

    def release(self) -> None:
        """As `PolicyMemory.release_cached`, which is called where this is."""
        self.cached = self.shared = 0

    @property
    def held(self) -> int:
        return self.cached + self.shared


class Engine:
    """Allocates where a real engine does, and remembers what the policy held then."""

    version: int | None = None

    def __init__(self, policy: Policy, allocator: Allocator) -> None:
        self.policy, self.allocator = policy, allocator
        self.dies: set[str] = set()
        self.held: dict[str, list[int]] = {"weights": [], "kv": [], "start": []}
        self.has_gradients: list[bool] = []

    def allocate(self, what: str) -> None:
        self.held[what].append(self.allocator.held)
        self.has_gradients.append(not self.policy.memory._gradients_freed)
        if what in self.dies:
            self.dies.remove(what)
            raise EngineFailure(f"killed while it allocates {what}")

    def update_weights(self, buckets: Any, version: int) -> None:
        self.allocate("weights")
        for _ in buckets:
            self.allocator.free_bucket()
        if "buckets" in self.dies:
            self.dies.remove("buckets")
            raise EngineFailure("killed after the buckets")

    def wake(self) -> None:
        self.allocate("kv")

    def sleep(self, keeps_weights: bool = False) -> None:
        if "sleep" in self.dies:
            self.dies.remove("sleep")
            raise EngineFailure("killed when it should release its memory")

    def recover(self) -> None:
        assert self.policy.memory._offloaded, "a server takes what it finds free when it starts"
        self.allocate("start")

    def probe(self, requests: Any, sampling: Any) -> dict[str, Any]:
        self.allocator.free_activations()
        return {}

    def activity(self) -> str | None:
        return None


def generation_of(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> tuple[Generation, Engine, Allocator]:
    config = small_config("policy.dtype=bf16", "rollout.sglang.restarts=3")
    policy = small_policy(config, parallel)
    allocator = Allocator()
    monkeypatch.setattr(policy.memory, "release_cached", allocator.release)
    engine: Any = Engine(policy, allocator)
    sharing = MemorySharing(policy, engine, parallel, is_enabled=True)
    monkeypatch.setattr("opo_megatron.rollout.generation.largest_difference", lambda *_: (0.0, "it"))
    display: Any = type("Display", (), {"log": lambda self, text: None, "status": lambda self, *_: None})()
    watchdog: Any = type("Watchdog", (), {"within": lambda self, what: memory_sharing.suppress()})()
    generation = Generation(
        config=config, parallel=parallel, policy=policy, engine=engine, memory=sharing,
        display=display, watchdog=watchdog,
    )  # fmt: skip
    return generation, engine, allocator


def a_step(generation: Generation) -> None:
    generation.memory.before_training()
    generation.synchronize()


def two_syncs(generation: Generation, engine: Engine) -> None:
    generation.synchronize()
    generation.synchronize()


def killed_in_generation(generation: Generation, engine: Engine) -> None:
    generation.synchronize()
    generation._recover()
    generation.synchronize()


def killed_while(what: str) -> Callable[[Generation, Engine], None]:
    def work(generation: Generation, engine: Engine) -> None:
        a_step(generation)
        engine.dies.add(what)
        a_step(generation)

    work.__name__ = f"killed_while_{what}"
    return work


def killed_twice(generation: Generation, engine: Engine) -> None:
    engine.dies |= {"buckets", "kv"}
    a_step(generation)


def saved(generation: Generation, engine: Engine) -> None:
    generation.synchronize()
    with generation.memory.saving():
        generation.policy.memory.reload()
        engine.allocator.free_activations()


def restarted_after_saving(generation: Generation, engine: Engine) -> None:
    saved(generation, engine)
    generation._recover()
    generation.synchronize()


@pytest.mark.parametrize(
    "work",
    [
        lambda generation, engine: a_step(generation),
        two_syncs,
        killed_in_generation,
        killed_while("weights"),
        killed_while("buckets"),
        killed_while("kv"),
        killed_while("sleep"),
        killed_twice,
        saved,
        restarted_after_saving,
    ],
    ids=lambda work: work.__name__.replace("<lambda>", "a_step"),
)
def test_an_engine_that_allocates_finds_nothing_of_the_policys_cached(
    work: Callable[[Generation, Engine], None], parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, engine, allocator = generation_of(parallel, monkeypatch)
    before = {name: t.clone() for bucket in generation.policy.stream_weights() for name, t in bucket}
    allocator.free_activations()  # those of a training step
    work(generation, engine)
    assert engine.held["weights"] and engine.held["kv"]
    assert set(engine.held["weights"] + engine.held["kv"] + engine.held["start"]) == {0}
    assert not any(engine.has_gradients)
    generation.memory.before_training()
    assert generation.policy.memory.is_complete
    after = {name: t for bucket in generation.policy.stream_weights() for name, t in bucket}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_policy_without_an_optimizer_releases_its_buckets_too(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of an evaluation: nothing of it is offloaded."""
    generation, engine, _ = generation_of(parallel, monkeypatch)
    monkeypatch.setattr(generation.policy, "optimizer", None)
    two_syncs(generation, engine)
    assert engine.held["kv"] == [0, 0] and engine.held["weights"] == [0, 0]


@pytest.mark.parametrize("is_on_gpu", [True, False])
def test_shared_buckets_are_collected_before_the_cache_is_emptied(
    is_on_gpu: bool, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, calls = small_policy(small_config(), parallel).memory, list[str]()
    monkeypatch.setattr(memory, "_on_gpu", is_on_gpu)
    for name in ("ipc_collect", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    memory.release_cached()
    assert calls == (["ipc_collect", "empty_cache"] if is_on_gpu else [])


@pytest.mark.parametrize("phase", ["sync", "rollout", "train"])
def test_the_bytes_of_both_sides_are_measured_at_every_turn(
    phase: str, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, _, _ = generation_of(parallel, monkeypatch)
    used = iter([(1 * 2**30, 2 * 2**30), (3 * 2**30, 4 * 2**30), (5 * 2**30, 6 * 2**30)])
    monkeypatch.setattr(memory_sharing, "gpu_bytes", lambda device: next(used))
    generation.synchronize()
    generation.memory.before_training()
    policy, other = {"sync": (1, 2), "rollout": (3, 4), "train": (5, 6)}[phase]
    assert generation.memory.metrics[f"memory/policy_{phase}_gpu_gib"] == policy
    assert generation.memory.metrics[f"memory/engine_{phase}_gpu_gib"] == other


def test_a_cpu_has_no_such_metrics(parallel: Parallel, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, engine, _ = generation_of(parallel, monkeypatch)
    two_syncs(generation, engine)
    assert gpu_bytes(torch.device("cpu")) is None and generation.memory.metrics == {}
