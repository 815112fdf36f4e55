"""A step that trains on complete groups while others are sampled is the step that waits for all of them."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opo_megatron.batch.group_ledger import Ended, GroupLedger
from opo_megatron.config.choices import OverlapOrder
from opo_megatron.errors import EngineFailure, NonFiniteError, OnPolicyError
from opo_megatron.plan.ranks import inner_optimizers
from opo_megatron.policy.policy import Policy
from opo_megatron.run import Run
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.train import opo_step
from opo_megatron.updates import overlap
from tests.support.overlapped_run import a_run
from tests.support.paths import WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.streamed_engine import PAUSE_SECONDS
from tests.support.tiny_run import easy_reward, lasting, rows

LOSS, NORM = 5e-7, 1e-6


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiftTask, "reward", easy_reward)


def one_step(folder: Path, *overrides: str, **streams: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The metrics of a step, and the weights after it."""
    with a_run(folder, *overrides, **streams) as run:
        opo_step(run, 1)
        weights = [p.detach().clone() for chunk in run.policy.chunks for p in chunk.parameters()]
    return lasting(folder)[-1], weights


@pytest.mark.parametrize(
    "normalizer",
    ["tokens", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sequences", "constant"))],
)
def test_a_streamed_step_is_the_step_that_waits(normalizer: str, tmp_path: Path) -> None:
    key = f"algorithm.loss_normalizer={normalizer}"
    waited, _ = one_step(tmp_path / "waited", key)
    for seed in (1, 2):
        with a_run(tmp_path / f"{seed}", key, seed=seed) as run:
            opo_step(run, 1)
            row = run.files.metrics.read()[-1]
        assert row["overlap/cuts"] > 1 and row["overlap/hidden"] > 0
        assert abs(row["loss"] - waited["loss"]) <= LOSS
        assert math.isclose(row["grad_norm"], waited["grad_norm"], rel_tol=NORM)
        for name in ("reward/mean", "advantage/rms", "tokens/response", "entropy", "response_length/max"):
            assert math.isclose(row[name], waited[name], rel_tol=1e-6), name


def test_in_prompt_order_the_order_of_arrival_does_not_matter_bit_for_bit(tmp_path: Path) -> None:
    first, weights = one_step(tmp_path / "1", seed=1, order="prompt")
    second, others = one_step(tmp_path / "2", seed=2, order="prompt")
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def stale(rollouts: Any) -> None:
    assert rollouts.weight_versions is not None
    rollouts.weight_versions[-1] = 7  # of the last group


def far_off(rollouts: Any) -> None:
    assert rollouts.engine_log_prob is not None
    rollouts.engine_log_prob[0] += 2.0


@pytest.mark.parametrize(("change", "words"), [(stale, "1 of version 7"), (far_off, "on_policy.tolerance")])
def test_a_refused_step_leaves_weights_and_moments(change: Any, words: str, tmp_path: Path) -> None:
    with a_run(tmp_path / "run", seed=1) as run:
        opo_step(run, 1)  # there are moments now
        before = state_of(run)
        run.generation.engine.change = change  # type: ignore[attr-defined]
        with pytest.raises(OnPolicyError, match=words):
            opo_step(run, 2)
        assert_unchanged(run, before)
        run.generation.engine.change = lambda rollouts: None  # type: ignore[attr-defined]
        opo_step(run, 2)
        assert run.policy.version == 2


def test_a_reward_that_is_not_finite_leaves_weights_and_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_run(tmp_path / "run", seed=1) as run:
        opo_step(run, 1)
        before, calls = state_of(run), []

        def fifth_is_nan(self: LiftTask, prompt: Any, response: list[int]) -> float:
            calls.append(prompt)
            return float("nan") if len(calls) == 5 else easy_reward(self, prompt, response)

        monkeypatch.setattr(LiftTask, "reward", fifth_is_nan)
        with pytest.raises(NonFiniteError, match="is nan"):
            opo_step(run, 2)
        assert_unchanged(run, before)


def test_after_an_engine_failure_the_whole_step_is_sampled_again(tmp_path: Path) -> None:
    waited, weights = one_step(tmp_path / "waited", seed=1, order="prompt")
    with a_run(tmp_path / "run", seed=1, order="prompt") as run:
        failures = []

        def fail_once(rollouts: Any) -> None:
            if not failures:
                failures.append(1)
                for i in range(9):  # one group and more has been delivered
                    deliver(rollouts.select([i]))
                raise EngineFailure("the server died")

        deliver = delivered_by(run)
        run.generation.engine.change = fail_once  # type: ignore[attr-defined]
        opo_step(run, 1)
        again = [p.detach() for chunk in run.policy.chunks for p in chunk.parameters()]
        assert failures and all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    row = lasting(tmp_path / "run")[-1]
    assert row == waited


@pytest.mark.parametrize(
    ("order", "delivered"),
    [
        ("prompt", 13),
        *(pytest.param("prompt", count, marks=pytest.mark.slow) for count in (0, 1, 9, 23, 24)),
        *(pytest.param("arrival", count, marks=pytest.mark.slow) for count in (0, 9, 23)),
    ],
)
def test_where_engines_continue_only_missing_responses_are_asked_for(
    order: str, delivered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prompt order the step is the same bit for bit; parts that were added before the failure stay."""
    waited, weights = one_step(tmp_path / "waited", seed=1, order=order)
    begun, judged = [], []
    begin, judge = Policy.begin_gradients, overlap.compute_rewards
    monkeypatch.setattr(
        Policy, "begin_gradients", lambda self, **named: (begun.append(1), begin(self, **named))[1]
    )
    monkeypatch.setattr(
        overlap, "compute_rewards", lambda *args: (judged.append(len(args[2])), judge(*args))[1]
    )
    with a_run(tmp_path / "run", seed=1, order=order) as run:
        engine: Any = run.generation.engine
        engine.continues = True

        def fail_once(rollouts: Any) -> None:
            if len(engine.asked) == 1:
                for i in range(delivered):
                    deliver(rollouts.select([i]))
                time.sleep(2 * PAUSE_SECONDS)  # the trainer enters them, and adds the first parts
                raise EngineFailure("the server died")

        deliver = delivered_by(run)
        engine.change = fail_once
        opo_step(run, 1)
        after = [p.detach() for chunk in run.policy.chunks for p in chunk.parameters()]
        assert [len(asked) for asked in engine.asked] == [24, 24 - delivered]
        assert sum(judged) == 24 and begun == [1]
        same = all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
        assert same or order == "arrival"
    row = rows(tmp_path / "run")[-1]
    assert row["run/engine_failures"] == 1 and row["run/tokens_continued"] == 1000
    assert abs(row["loss"] - waited["loss"]) <= LOSS
    assert math.isclose(row["grad_norm"], waited["grad_norm"], rel_tol=NORM)
    (timeline,) = rows(tmp_path / "run", "timeline.jsonl")
    (rank,) = timeline["ranks"]
    assert "lost" not in rank and len(rank["ended"]) == 24
    assert len(rank["engine"]) == (2 if delivered < 24 else 1)


def delivered_by(run: Run) -> Any:
    """What the step in flight gets its responses by."""
    engine = run.generation.engine
    calls: list[Any] = []
    generate = engine.generate

    def noting(*arguments: Any) -> Any:
        if len(arguments) > 3:
            calls.append(arguments[3])
        return generate(*arguments)

    engine.generate = noting  # type: ignore[method-assign]
    return lambda part: calls[-1](part)


def state_of(run: Run) -> list[torch.Tensor]:
    parameters = [p for chunk in run.policy.chunks for p in chunk.parameters()]
    states = [one.state.values() for one in inner_optimizers(run.policy)]
    moments = [value for state in states for one in state for value in one.values() if torch.is_tensor(value)]
    return [tensor.detach().clone() for tensor in (*parameters, *moments)]


def assert_unchanged(run: Run, before: list[torch.Tensor]) -> None:
    after = state_of(run)
    assert len(after) == len(before) > 10
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert run.policy.version == 1
    gradients = [buffer.grad_data for chunk in run.policy.ddp_chunks for buffer in chunk.buffers]
    assert not any(bool(g.any()) for g in gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("policy.tensor_model_parallel_size=2", "policy.sequence_parallel=true"),
        ("policy.pipeline_model_parallel_size=2",),
        ("policy.packing=thd",),
        ("policy.packing=thd", "policy.context_parallel_size=2"),
    ],
    ids=["tp2+sp", "pp2", "packed-dp2", "cp2"],
)
def test_ranks_agree_on_what_has_ended_and_take_the_step_that_waits(
    layout: tuple[str, ...], tmp_path: Path
) -> None:
    rows = []
    for seed in ("none", "1"):
        output = tmp_path / f"{seed}.json"
        run_ranks_of(WORKERS / "overlap_worker.py", 2, str(output), seed, *layout)
        rows.append(json.loads(output.read_text()))
    waited, streamed = rows
    assert streamed["overlap/cuts"] > 1
    assert abs(streamed["loss"] - waited["loss"]) <= LOSS
    assert math.isclose(streamed["grad_norm"], waited["grad_norm"], rel_tol=NORM)
    assert streamed["tokens/response"] == waited["tokens/response"]


def ended(numbers: list[int], lengths: list[int]) -> Ended:
    ones = torch.ones(len(numbers), dtype=torch.int64)
    return Ended(torch.tensor(numbers), ones, ones, torch.tensor(lengths), 0 * ones, ones.double())


def test_parts_in_prompt_order_depend_on_lengths_alone() -> None:
    """Five groups of two samples, over all orders in which the groups are complete."""
    lengths = [9, 3, 3, 3, 30]  # and one token of the prompt, twice: groups of 20, 8, 8, 8, 62 tokens
    seen = set()
    for order in itertools.permutations(range(5)):
        ledger, parts = GroupLedger(5, 2, world_size=3), []
        for group in order:
            ledger.enter(ended([2 * group + 1, 2 * group], 2 * [lengths[group]]))
            while part := ledger.next_part(OverlapOrder.prompt, least_tokens=16):
                parts.append(tuple(part))
        assert ledger.is_complete
        seen.add(tuple(parts))
    assert seen == {((0,), (1, 2), (3, 4))}


def test_parts_in_order_of_arrival_have_whole_groups_and_enough_tokens() -> None:
    for order in itertools.permutations(range(6)):
        ledger, taken = GroupLedger(3, 2, world_size=2), []
        for number in order:
            ledger.enter(ended([number], [4]))
            if part := ledger.next_part(OverlapOrder.arrival, least_tokens=15):
                assert all(2 * g + i in order[: order.index(number) + 1] for g in part for i in (0, 1))
                assert len(part) >= 2 or ledger.is_complete
                taken += part
        assert sorted(taken) == [0, 1, 2]


def test_a_sample_that_ends_twice_is_an_error() -> None:
    ledger = GroupLedger(2, 2, world_size=1)
    ledger.enter(ended([1], [4]))
    with pytest.raises(ValueError, match="ended twice"):
        ledger.enter(ended([1], [4]))
