"""Damaged checkpoints, checkpoint retention, and the settings that a resumed run may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opo_megatron.checkpoint.manifest import MANIFEST
from opo_megatron.tasks.lift import LiftTask
from tests.support.tiny_run import easy_reward, lasting, rows, train

SMALL = ("warm_start.steps=2", "train.steps=4", "checkpoint.every_steps=1", "eval.greedy=false")


@pytest.fixture(autouse=True, scope="module")
def use_easy_reward() -> Iterator[None]:
    """A tiny policy never solves the task: this reward is 1 for half of its responses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(run_dir, *SMALL) == 0
    return run_dir


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def truncate(checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def flip_one_bit(checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "metadata.json").unlink()


def remove_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


DAMAGES = {
    truncate: "bytes instead of",
    flip_one_bit: "has other bytes than were written",
    remove_a_file: "metadata.json is missing",
    remove_the_manifest: f"{MANIFEST} cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_resume_skips_a_damaged_checkpoint_and_touches_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    newest = run_dir / "checkpoints" / "step_00000004"
    damage(newest)
    damaged, others = contents(newest), {name: contents(newest.parent / name) for name in names(run_dir)[:3]}
    assert train(run_dir, *SMALL, "resume=auto") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"warning: {newest} is damaged (" in output and DAMAGES[damage] in output
    assert f"resumed from {newest.with_name('step_00000003')}" in output
    assert lasting(run_dir) == lasting(finished)
    assert [row["run/attempt"] for row in rows(run_dir)] == [1, 1, 1, 1, 2]
    assert {name: contents(newest.parent / name) for name in others} == others
    assert contents(newest.with_name("step_00000004.abandoned-by-attempt-2")) == damaged


def test_resuming_explicitly_from_a_damaged_checkpoint_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    checkpoint = run_dir / "checkpoints" / "step_00000003"
    flip_one_bit(checkpoint)
    before = contents(run_dir)
    assert train(run_dir, *SMALL, f"resume={checkpoint}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{checkpoint} is damaged (" in error and "resume=auto" in error
    assert contents(run_dir) == before


@pytest.mark.slow
def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path, finished: Path) -> None:
    """The metric is deterministic; its best step comes from a run that kept all checkpoints."""
    for direction, choose in (("highest", max), ("lowest", min)):
        run_dir = tmp_path / direction
        keep = ("checkpoint.keep_last=1", f"checkpoint.keep_best_is={direction}")
        assert train(run_dir, *SMALL, *keep, "checkpoint.keep_best=reward/mean") == 0
        best = choose(rows(finished)[1:], key=lambda row: row["reward/mean"])["step"]
        assert names(run_dir) == sorted({f"step_{best:08d}", "step_00000004"})
        state = json.loads((run_dir / "checkpoints" / "step_00000004" / "run_state.json").read_text())
        assert state["extra"]["best"]["checkpoint"] == f"step_{best:08d}"


def test_a_resumed_run_keeps_the_best_checkpoint_so_far(finished: Path, tmp_path: Path) -> None:
    """The recorded best value is unbeatable, so later steps must not replace that checkpoint."""
    run_dir = tmp_path / "run"
    keep = ("checkpoint.keep_last=1", "checkpoint.keep_best=grad_norm", "checkpoint.keep_best_is=lowest")
    assert train(run_dir, *SMALL, *keep, "train.steps=1", "optimizer.schedule=constant") == 0
    checkpoint = run_dir / "checkpoints" / "step_00000001"
    state = json.loads((checkpoint / "run_state.json").read_text())
    state["extra"]["best"]["value"] = 0.0
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    from opo_megatron.checkpoint.manifest import entries_of

    manifest |= entries_of(checkpoint, ["run_state.json"])
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert train(run_dir, *SMALL, *keep, "resume=auto", "train.steps=3", "optimizer.schedule=constant") == 0
    assert names(run_dir) == ["step_00000001", "step_00000003"]


def test_a_keep_best_metric_that_no_step_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ("checkpoint.keep_last=1", "checkpoint.keep_best=eval/acuracy")
    assert train(tmp_path / "run", *SMALL, *keep, "train.steps=1") == 2
    error = capsys.readouterr().err
    assert "checkpoint.keep_best=eval/acuracy, but no step has" in error and "eval/accuracy" in error


def test_every_minutes_makes_checkpoints_due(tmp_path: Path) -> None:
    every = ("checkpoint.every_steps=0", "checkpoint.every_minutes=1e-9")
    assert train(tmp_path / "run", *SMALL, *every, "train.steps=2") == 0
    assert names(tmp_path / "run") == [
        "step_00000001",
        "step_00000002",
        "warm_start_00000001",
        "warm_start_00000002",
    ]


def test_at_end_false_leaves_out_the_last_checkpoint_of_either_stage(tmp_path: Path) -> None:
    never = ("checkpoint.every_steps=0", "checkpoint.at_end=false")
    assert train(tmp_path / "run", *SMALL, *never, "train.steps=1") == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert rows(tmp_path / "run")[-1]["step"] == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr is 0.0001 but was 0.0003"),
        ("run.seed=7", "run.seed is 7 but was 1"),
        ("rollout.samples_per_prompt=2", "rollout.samples_per_prompt is 2 but was 4"),
        ("algorithm.baseline=rloo", "algorithm.baseline is rloo but was opo"),
        ("policy.model.rotary_base=10", "policy.model.rotary_base is 10.0 but was 100.0"),
        ("train.steps=9", "train.steps is 9 but was 4, and with optimizer.schedule=cosine"),
        ("train.steps=2", "train.steps is 2, but the checkpoint has finished 4 steps"),
    ],
)
def test_changing_a_fixed_setting_on_resume_is_refused_by_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = contents(run_dir)
    assert train(run_dir, *SMALL, "resume=auto", override) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert contents(run_dir) == before


def test_allowed_and_result_neutral_settings_may_change_on_resume(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    neutral = ("rollout.local.slots=7", "policy.max_tokens_per_micro_batch=300", "eval.problems=8")
    assert (
        train(run_dir, *SMALL, "resume=auto", *neutral, "optimizer.lr=1e-4", "--allow", "optimizer.lr") == 0
    )
    output = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr 0.0003 → 0.0001" in output and "rollout.local.slots 384 → 7" in output
    assert rows(run_dir)[:4] == rows(finished)[:4]


def test_allowing_an_unknown_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--allow", "optimizer.rl") == 2
    assert "--allow optimizer.rl: unknown key 'optimizer.rl'; did you mean" in capsys.readouterr().err
