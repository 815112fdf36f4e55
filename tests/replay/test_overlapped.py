"""Steps that overlapped with generation: the audit names their order, and they replay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.cli.main import main
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.train import opo_step
from tests.support.overlapped_run import a_run
from tests.support.tiny_run import easy_reward, rows

LAST = 2


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiftTask, "reward", easy_reward)


@pytest.fixture
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A run whose steps overlapped in the order of the parameter, as if SGLang had sampled them."""
    with a_run(tmp_path / "run", seed=1, order=request.param) as run:
        for step in range(1, LAST + 1):
            opo_step(run, step)
    recorded_as(tmp_path / "run", request.param)
    yield tmp_path / "run"


def recorded_as(run_dir: Path, order: str) -> None:
    """Write the recipe of such a run, which the local engine's would refuse."""
    recipe = yaml.safe_load((run_dir / "config.yaml").read_text())
    recipe["rollout"] |= {"engine": "sglang", "overlap": True, "overlap_order": order}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(recipe))


def replay(run_dir: Path, *arguments: str) -> int:
    return main(["replay", str(run_dir), "--step", str(LAST), *arguments])


@pytest.mark.parametrize(
    ("run_dir", "verdict"),
    [
        ("prompt", "every digest equals"),
        pytest.param("arrival", "all norms are within 1e-05 of", marks=pytest.mark.slow),
    ],
    indirect=["run_dir"],
)
def test_an_overlapped_step_replays_as_far_as_its_order_allows(
    run_dir: Path, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    order = "prompt" if verdict.startswith("every") else "arrival"
    assert [row.get("overlap_order") for row in rows(run_dir, "audit.jsonl")] == LAST * [order]
    assert all(row["layout"].endswith("parts of 2 micro-batches") for row in rows(run_dir, "audit.jsonl"))
    assert replay(run_dir) == 0, capsys.readouterr().err
    assert f"step {LAST}: {verdict} the record (rollouts read from file)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("run_dir", ["prompt"], indirect=True)
def test_a_recorded_batch_without_all_samples_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "rollouts" / f"step_{LAST:08d}.safetensors"
    rollouts = Rollouts.load(path)
    rollouts.select(range(len(rollouts) - 1)).save(path)
    assert replay(run_dir) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the recorded batch lacks 1 of 24 samples" in error
