"""When an overlapped step did what: recorded on every rank, shown by `opo report`, written as a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from opo_megatron.cli.main import main
from opo_megatron.errors import EngineFailure
from opo_megatron.report.timeline import TRAINER, Bar, bars_of
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.train import opo_step
from tests.support.fake_runs import make_run
from tests.support.overlapped_run import a_run
from tests.support.paths import WORKERS
from tests.support.requirements import require, run_ranks_of
from tests.support.tiny_run import easy_reward, rows

SAMPLES, LAST = 6 * 4, 3


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A step without overlap, one that overlaps and whose engine fails, one that overlaps."""
    folder, failures = tmp_path_factory.mktemp("overlapped") / "run", []

    def fail_once(rollouts: Any) -> None:
        if not failures:
            failures.append(1)
            raise EngineFailure("the server died")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        with a_run(folder, seed=1) as run:
            run.config.rollout.overlap = False
            opo_step(run, 1)
            run.config.rollout.overlap = True
            run.generation.engine.change = fail_once  # type: ignore[attr-defined]
            for step in (2, LAST):
                opo_step(run, step)
    yield folder


def timeline(folder: Path, step: int) -> dict[str, Any]:
    return next(row for row in rows(folder, "timeline.jsonl") if row["step"] == step)


def trainer_bars(rank: dict[str, Any]) -> list[Bar]:
    return [bar for bar in bars_of(rank) if bar.row == TRAINER]


def assert_is_a_timeline(row: dict[str, Any], metrics: dict[str, Any], ranks: int, samples: int) -> None:
    """What must hold of any step."""
    assert row["step"] == metrics["step"] and len(row["ranks"]) == ranks
    assert sum(len(rank["ended"]) for rank in row["ranks"]) == samples
    for rank in row["ranks"]:
        bars = bars_of(rank)
        assert all(0 <= bar.begin <= bar.end <= row["seconds"] for bar in bars)
        assert all(one.end <= other.begin for one, other in pairwise(trainer_bars(rank)))
        ((begin, end),) = rank["engine"]
        assert rank["ended"] == sorted(rank["ended"])
        assert begin <= rank["ended"][0] and rank["ended"][-1] == end
        assert len(rank["train"]) == metrics["overlap/cuts"] > 1
        assert len(rank["update"]) == len(rank["sync"]) == 1
        assert any(began < end for began, _ in rank["train"]), "no part was trained on meanwhile"


def test_intervals_are_inside_the_step_and_apart_on_a_trainer(run_dir: Path) -> None:
    row, metrics = timeline(run_dir, LAST), rows(run_dir)[-1]
    assert_is_a_timeline(row, metrics, 1, SAMPLES)
    assert row["seconds"] <= metrics["time/step"]
    (rank,) = row["ranks"]
    names = [bar.name for bar in trainer_bars(rank) if bar.name not in ("reward", "eval")]
    assert names == [*metrics["overlap/cuts"] * ["train"], "update", "sync"]
    sync = rank["sync"][0]
    assert metrics["time/sync"] == pytest.approx(sync[1] - sync[0], abs=1e-5)


@pytest.mark.slow
def test_every_rank_has_its_timeline(tmp_path: Path) -> None:
    output = tmp_path / "1.json"
    run_ranks_of(WORKERS / "overlap_worker.py", 2, str(output), "1", "policy.tensor_model_parallel_size=2")
    assert_is_a_timeline(timeline(tmp_path / "1.run", 1), json.loads(output.read_text()), 2, SAMPLES)


def test_what_an_engine_failure_made_worthless_is_one_interval(run_dir: Path) -> None:
    row = timeline(run_dir, 2)
    assert_is_a_timeline(row, rows(run_dir)[-2], 1, SAMPLES)
    (rank,) = row["ranks"]
    ((begin, end),) = rank["lost"]
    assert begin == 0 and trainer_bars(rank)[0].name == "lost" and end <= rank["engine"][0][0]


def test_a_step_without_overlap_has_no_timeline(run_dir: Path) -> None:
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3]
    assert [row["step"] for row in rows(run_dir, "timeline.jsonl")] == [2, 3]


def test_a_resumed_run_deletes_the_timelines_of_later_steps(run_dir: Path, tmp_path: Path) -> None:
    from opo_megatron.config import load_config
    from opo_megatron.observe.run_files import RunFiles
    from tests.support.fixtures import RECIPE

    row = json.dumps({"step": 1} | {k: v for k, v in timeline(run_dir, LAST).items() if k != "step"}) + "\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "timeline.jsonl").write_text(row + row.replace('"step": 1', '"step": 2') + row[:9])
    config = load_config(RECIPE, [f"run.dir={tmp_path / 'run'}", "observe.tensorboard=false"])
    config.rollout.overlap = True
    RunFiles(config, is_writer=True, step=1, warm_step=None, source=None)
    assert (tmp_path / "run" / "timeline.jsonl").read_text() == row


# ---------------------------------------------------------------------- opo report


def test_a_trace_has_the_seconds_of_the_step(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib", "pip install -e '.[report]'")
    out, file = tmp_path / "page.html", tmp_path / "new" / "step.json"
    assert main(["report", str(run_dir), "--out", str(out), "--trace", str(file)]) == 0
    assert f"the last step as a trace in {file}" in capsys.readouterr().out
    html = out.read_text()
    assert "timeline of step 3, run" in html and 'id="timeline_run-figure_1"' in html
    metrics, events = rows(run_dir)[-1], json.loads(file.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {(0, 0): "rank 0, step 3", (0, 1): "trainer", (0, 2): "engine"}
    assert {names[event["pid"], event["tid"]] for event in spans} == {"trainer", "engine"}

    def seconds(*kinds: str) -> float:
        return sum(event["dur"] for event in spans if event["name"] in kinds) / 1e6

    assert seconds("train", "update") == pytest.approx(metrics["time/train"], abs=1e-5)
    assert seconds("sync") == pytest.approx(metrics["time/sync"], abs=1e-5)
    assert seconds("engine") == pytest.approx(metrics["time/rollout"], abs=0.2)
    unfinished = [event["args"]["responses"] for event in events if event["ph"] == "C"]
    assert unfinished == [*range(SAMPLES, -1, -1)]


def test_phases_do_not_count_hidden_training_twice(run_dir: Path) -> None:
    from opo_megatron.report.figures import phases_of
    from opo_megatron.report.runs import read_runs

    (run,) = read_runs([run_dir])
    overlapped = replace(run, rows=run.rows[-1:])
    phases, row = phases_of(overlapped), run.rows[-1]
    assert "train" not in phases and phases["tail"] == row["time/tail"]
    assert sum(phases.values()) - phases.get("audit", 0) == pytest.approx(row["time/step"])


def test_several_runs_are_processes_of_one_trace(run_dir: Path, tmp_path: Path) -> None:
    from opo_megatron.report.runs import read_runs
    from opo_megatron.report.timeline import trace_of

    other = make_run(tmp_path / "other")
    (other / "timeline.jsonl").write_text((run_dir / "timeline.jsonl").read_text())
    events = trace_of(read_runs([run_dir, other, make_run(tmp_path / "without")]))["traceEvents"]
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == ["run, rank 0, step 3", "other, rank 0, step 3"]
    assert {event["pid"] for event in events} == {0, 1}


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ("step.json", "no timeline.jsonl of .*/plain has a row; only steps with rollout.overlap=true"),
        ("folder.json", "--trace .*folder.json is a folder; name a file, such as .*folder.json/report.json"),
        ("step.html", "--trace .*step.html does not end with .json; choose a name that does"),
        ("step", "--trace .*step does not end with .json"),
        (".json", "--trace .*/.json does not end with .json"),
    ],
)
def test_a_trace_that_cannot_be_written_is_refused_early(
    trace: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    run = make_run(tmp_path / "plain")
    (tmp_path / "folder.json").mkdir()
    arguments = [str(run), "--out", str(tmp_path / "page.html"), "--trace", str(tmp_path / trace)]
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error), error
    assert not (tmp_path / "page.html").exists()
