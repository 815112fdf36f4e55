"""Steps on rollouts of exactly k steps before: their age, what waits, resumed runs, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from opo_megatron import build
from opo_megatron import train as train_module
from opo_megatron.algorithm.config import ObjectiveName, Proximal
from opo_megatron.algorithm.on_policy import check_age
from opo_megatron.algorithm.proximal import loglinear_proximal
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.checkpoint.kept_rollouts import KeptRollouts
from opo_megatron.config import load_config
from opo_megatron.errors import OnPolicyError, UserError
from opo_megatron.observe.summary_table import summary_table
from opo_megatron.observe.timing import PhaseTimer
from opo_megatron.report.arms import group_runs
from opo_megatron.report.runs import Run as ReportRun
from opo_megatron.run import Run
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.train import UPDATES, opo_update
from opo_megatron.updates.staleness import set_proximal, stale_update
from tests.support.fixtures import RECIPE
from tests.support.tiny_run import TINY, easy_reward, lasting, rows, train

WARM = 2
SMALL = (
    f"warm_start.steps={WARM}", "train.steps=5", "eval.every_steps=0", "eval.problems=4", "eval.greedy=false",
    "optimizer.schedule=constant", "observe.tensorboard=false", "observe.kl=off",
)  # fmt: skip
STALE = ("rollout.staleness=2", "algorithm.off_policy_sampling=true")


@pytest.fixture(autouse=True, scope="module")
def use_easy_reward() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        yield


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with rollouts of two steps before."""
    run_dir = tmp_path_factory.mktemp("runs") / "stale"
    assert train(run_dir, *SMALL, *STALE, "algorithm.variance_every=2") == 0
    return run_dir


def rollouts_of(run_dir: Path, step: int) -> Rollouts:
    return Rollouts.load(run_dir / "rollouts" / f"step_{step:08d}.safetensors")


def take_the_path_of_stale_rollouts(patch: pytest.MonkeyPatch) -> None:
    """Steps sample and train through the queue, which holds no batch back at staleness 0."""
    found: list[Any] = []

    def sample(run: Run, step: int, timer: PhaseTimer) -> Any:
        found[:] = stale_update(run, step, run.config.optimizer.lr, timer, opo_update)
        return found[:2]

    patch.setattr(train_module, "sample_batch", sample)
    patch.setattr(train_module, "set_advantages", lambda *_: found[2])
    patch.setitem(UPDATES, ObjectiveName.policy_gradient, lambda *_: found[3])


@pytest.mark.parametrize(
    "through_queue",
    [
        pytest.param(False, id="as a key", marks=pytest.mark.slow),
        pytest.param(True, id="through the queue"),
    ],
)
def test_staleness_zero_is_plain_opo_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_queue: bool
) -> None:
    plain, zero = tmp_path / "plain", tmp_path / "zero"
    steps = (*SMALL, "train.steps=3")
    assert train(plain, *steps) == 0
    if through_queue:
        take_the_path_of_stale_rollouts(monkeypatch)
    assert train(zero, *steps, "rollout.staleness=0", "algorithm.off_policy_sampling=true") == 0
    for before, now in zip(lasting(plain, "audit.jsonl"), lasting(zero, "audit.jsonl"), strict=True):
        assert before["weights"] == now["weights"], before["step"]
    for before, now in zip(lasting(plain), lasting(zero), strict=True):
        names = [name for name in before if not (through_queue and name.startswith("on_policy/"))]
        assert [now[name] for name in names] == [before[name] for name in names]


def test_a_step_trains_on_rollouts_of_exactly_k_steps_before(stale: Path) -> None:
    metrics = rows(stale)
    for step in range(1, 6):
        age = min(2, step - 1)
        rollouts = rollouts_of(stale, step)
        assert rollouts.weight_versions is not None
        assert set(rollouts.weight_versions.tolist()) == {WARM + step - 1 - age}
        row = metrics[step]
        assert row["on_policy/age"] == age
        assert (row["off_policy/k3"] < 1e-9) == (age == 0), "the policy has moved away from the sampler"
        assert row["on_policy/k3"] < 1e-9, "engine and policy agreed when it was sampled"
        assert rollouts.old_log_prob is not None and rollouts.engine_log_prob is not None
        assert float((rollouts.old_log_prob - rollouts.engine_log_prob).abs().max()) < 1e-4


def test_every_step_reads_its_own_prompts_once(stale: Path) -> None:
    prompts = [prompt for step in range(1, 6) for prompt in set(rollouts_of(stale, step).prompt_ids.tolist())]
    assert len(prompts) == len(set(prompts)) == 5 * 6


def test_the_variance_report_is_of_rollouts_that_the_policy_sampled(stale: Path) -> None:
    reports = [row["step"] for row in rows(stale) if "variance/rloo" in row]
    assert reports == [1, 3, 5]


@pytest.mark.slow
def test_a_resumed_run_trains_on_the_rollouts_that_waited(stale: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stale, run_dir)
    for name in ("step_00000004", "step_00000005"):
        shutil.rmtree(run_dir / "checkpoints" / name)
    options = (*SMALL, *STALE, "algorithm.variance_every=2", "resume=auto")
    assert train(run_dir, *options) == 0
    for name in ("metrics.jsonl", "audit.jsonl"):
        assert lasting(run_dir, name) == lasting(stale, name)
    last = "checkpoints/step_00000005"
    waiting = sorted(path.name for path in (run_dir / last).glob("waiting_*"))
    assert len(waiting) == 2
    for name in (
        *(f"rollouts/step_{step:08d}.safetensors" for step in (3, 4, 5)),
        *(f"{last}/{w}" for w in waiting),
    ):
        assert (run_dir / name).read_bytes() == (stale / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 3], ids=["fewer wait", "more wait"])
def test_a_checkpoint_of_another_staleness_is_refused(
    stale: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    shutil.copytree(stale, tmp_path / "run")
    options = (f"rollout.staleness={kept}", "train.steps=6", "resume=auto", "algorithm.variance_every=2")
    assert train(tmp_path / "run", *SMALL, *STALE, *options, "--allow", "rollout.staleness") == 2
    error = capsys.readouterr().err
    assert f"rollout.staleness is {kept}, but in the checkpoint" in error and error.count("\n") == 1
    assert "the rollouts of 2 steps wait; set it to 2, or start another run" in error


def test_a_rollout_of_any_other_age_is_refused_before_the_update(
    stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_kept = build.read_kept

    def swapped(*arguments: Any) -> KeptRollouts:
        kept = read_kept(*arguments)
        kept.waiting.reverse()
        return kept

    monkeypatch.setattr(build, "read_kept", swapped)
    shutil.copytree(stale, tmp_path / "run")
    options = ("train.steps=6", "resume=auto", "algorithm.variance_every=2")
    assert train(tmp_path / "run", *SMALL, *STALE, *options) == 2
    error = capsys.readouterr().err
    assert "is at weight version 7 and trains on rollouts of version 5, but" in error
    assert "of version 6); resume from a checkpoint" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("versions", "version", "age", "wrong"),
    [
        ([3, 3, 3], 3, 0, None),
        ([3, 3, 3], 7, 4, None),
        ([], 7, 4, None),
        ([3, 4, 3], 7, 4, "1 of 3 sampled tokens are not (1 of version 4)"),
        ([2, 3, 4], 7, 4, "2 of 3 sampled tokens are not (1 of version 2, 1 of version 4)"),
        ([7, 7], 7, 1, "2 of 2 sampled tokens are not (2 of version 7)"),
        ([0], 7, 6, "1 of 1 sampled tokens are not (1 of version 0)"),
        (None, 7, 6, "have no weight versions"),
    ],
)
def test_the_age_of_every_token_is_checked(
    versions: list[int] | None, version: int, age: int, wrong: str | None
) -> None:
    tensor = None if versions is None else torch.tensor(versions, dtype=torch.int64)
    if wrong is None:
        check_age(tensor, version, age)
        return
    with pytest.raises(OnPolicyError) as error:
        check_age(tensor, version, age)
    assert wrong in str(error.value)


REFUSED = [
    (
        ("rollout.staleness=4",),
        "rollout.staleness is 4, which trains on rollouts of earlier weights; set it to 0",
    ),
    ((*STALE, "rollout.staleness=-1"), "rollout.staleness is -1; it must be 0 or more"),
    ((*STALE, "rollout.staleness=140"), "rollout.staleness is 140, but with train.steps=140 no step would"),
    (
        (*STALE, "rollout.fill=groups_with_signal", "rollout.fill_rounds=2"),
        "rollout.staleness=2 with rollout.fill=groups_with_signal, which samples as many batches",
    ),
    (
        (*STALE, "rollout.overlap=true", "rollout.engine=sglang"),
        "rollout.staleness=2 with rollout.overlap=true, which trains on rollouts as they arrive",
    ),
    (
        (*STALE, "run.on_bad_numbers=skip"),
        "rollout.staleness=2 with run.on_bad_numbers=skip, after which rollouts would be of another age",
    ),
    (
        (*STALE, "algorithm.proximal=current"),
        "algorithm.proximal is current, but algorithm.objective=policy_gradient reads no old log-",
    ),
    (
        ("algorithm.proximal=loglinear", "algorithm.objective=clipped"),
        "algorithm.proximal is loglinear, but rollout.staleness=0 trains on rollouts of the current weights",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED)
def test_settings_that_contradict_staleness_are_refused_in_one_sentence(
    overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config(Path("recipes/quickstart.yaml"), ["run.dir=x", *overrides])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("algorithm.objective=clipped",),
        ("algorithm.objective=clipped", "algorithm.proximal=current"),
        ("algorithm.objective=clipped", "algorithm.updates_per_batch=4"),
        ("algorithm.baseline=remax",),
        ("algorithm.baseline=auto",),
        ("on_policy.action=correct",),
    ],
)
def test_what_is_measured_when_sampled_goes_with_staleness(overrides: tuple[str, ...]) -> None:
    load_config(Path("recipes/quickstart.yaml"), ["run.dir=x", *STALE, *overrides])


# ---------------------------------------------------------------------- the proximal policy


@pytest.mark.parametrize(
    ("age", "share"), [(0, 0.0), (1, 0.0), (2, 1 / 2), (3, 2 / 3), (4, 3 / 4), (8, 7 / 8)]
)
def test_loglinear_is_one_step_before_the_current_policy(age: int, share: float) -> None:
    behavior, current = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(age))
    found = loglinear_proximal(behavior, current, torch.full((50,), age))
    torch.testing.assert_close(found, (1 - share) * behavior + share * current, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("proximal", "expected"),
    [
        (Proximal.behavior, [-1.0, -2.0, -3.0]),
        (Proximal.current, [-1.5, -1.5, -1.5]),
        (Proximal.loglinear, [-1.1 + 0.75 * -0.4, -2.1 + 0.75 * 0.6, -3.1 + 0.75 * 1.6]),
    ],
)
def test_the_policy_that_ratios_compare_with_is_the_one_chosen(
    proximal: Proximal, expected: list[float]
) -> None:
    part = SimpleNamespace(
        old_log_prob=torch.tensor([-1.0, -2.0, -3.0]),
        engine_log_prob=torch.tensor([-1.1, -2.1, -3.1]),
        weight_versions=torch.tensor([2, 2, 2]),
    )
    run = SimpleNamespace(
        config=SimpleNamespace(
            algorithm=SimpleNamespace(proximal=proximal, updates_per_batch=2),
            rollout=SimpleNamespace(temperature=1.0),
        ),
        policy=SimpleNamespace(version=10, log_probs=lambda *_: torch.full((3,), -1.5)),
    )
    set_proximal(cast(Run, run), cast(Any, [part]), cast(Any, [None]))
    torch.testing.assert_close(part.old_log_prob, torch.tensor(expected))


# ---------------------------------------------------------------------- what a reader sees


def test_the_closing_table_and_the_report_say_off_policy(stale: Path) -> None:
    config = load_config(stale / "config.yaml", [])
    title, lines = summary_table(config, rows(stale), 1.0)
    text = title + " ".join(" ".join(line) for line in lines)
    assert "5 OPO steps, OFF-POLICY (2 steps)" in title and "exactly on-policy" not in text
    assert any(line[0] == "KL sampler to policy" for line in lines)
    run = ReportRun(stale, "stale", {"rollout.staleness": 2, "algorithm.baseline": "opo"}, [], {})
    assert group_runs([run])[0].name == "OFF-POLICY (2 steps) baseline=opo"
    plain = ReportRun(stale, "plain", {"rollout.staleness": 0, "algorithm.baseline": "opo"}, [], {})
    assert group_runs([plain])[0].name == "baseline=opo"


@pytest.mark.slow
def test_what_waits_goes_to_any_number_of_ranks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for ranks, steps in ((2, 3), (1, 4), (3, 5)):
        command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), "--nproc", str(ranks)]
        options = (*TINY, *SMALL, *STALE, f"train.steps={steps}", "resume=auto", f"run.dir={run_dir}")
        subprocess.run([*command, *options], check=True, capture_output=True, timeout=500)
    for step in range(1, 6):
        rollouts = rollouts_of(run_dir, step)
        assert rollouts.weight_versions is not None and len(rollouts) == 6 * 4
        assert set(rollouts.weight_versions.tolist()) == {WARM + step - 1 - min(2, step - 1)}
        assert rollouts.groups.tolist() == sorted(rollouts.groups.tolist())
