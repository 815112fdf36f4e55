"""`opo eval`: the metrics of a run's own evaluations, result files, parallel layouts, and wrong inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from opo_megatron.algorithm.diversity import repetition, self_bleu
from opo_megatron.cli.main import main
from opo_megatron.distributed.launch import CHILD
from opo_megatron.distributed.outcome import ERROR_CLAIM, OUTCOME
from opo_megatron.tasks.benchmarks import FIELDS, HELD_OUT, find_benchmarks
from opo_megatron.tasks.lift import SYMBOLS, LiftTask
from tests.support.cli_errors import refused
from tests.support.fixtures import RECIPE, SMALL_MODEL
from tests.support.requirements import require
from tests.support.tiny_run import easy_reward, rows, train

SAMPLES, PROBLEMS = 3, 16
SETTINGS = ("train.steps=2", f"eval.samples_per_problem={SAMPLES}", f"eval.problems={PROBLEMS}")


@pytest.fixture(autouse=True, scope="module")
def use_easy_reward() -> Iterator[None]:
    """A tiny policy never solves the task: this reward is 1 for half of its responses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        for name in ("RANK", "WORLD_SIZE", "OPO_TEST_DATA", CHILD, ERROR_CLAIM, OUTCOME):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    keep = ("checkpoint.keep_last=1", "checkpoint.keep_best=eval/pass@2")
    assert train(folder, *SETTINGS, *keep) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(run_dir: Path) -> Path:
    """Results of the run's newest checkpoint on one rank."""
    assert main(["eval", str(run_dir)]) == 0
    return run_dir / "eval" / "step_00000002"


def held_out_of(folder: Path) -> dict:
    scores: dict = json.loads((folder / "eval.json").read_text())["tasks"]["held_out"]
    return scores


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples_held_out.jsonl").read_text().splitlines()]


def test_a_checkpoint_has_the_metrics_of_the_runs_own_evaluation(run_dir: Path, evaluated: Path) -> None:
    row, scores = rows(run_dir)[2], held_out_of(evaluated)
    assert (scores["problems"], scores["samples"]) == (PROBLEMS, SAMPLES) and row["eval/problems"] == PROBLEMS
    for name, key in (
        ("reward_mean", "accuracy"),
        ("length_mean", "response_length/mean"),
        ("truncation_rate", "response_length/truncated"),
        ("self_bleu", "self_bleu"),
        ("rep_4", "rep_4"),
        ("entropy", "entropy"),
    ):
        assert scores[name] == pytest.approx(row[f"eval/{key}"], rel=1e-6), name
    assert list(scores["pass@k"]) == ["1", "2", "3"]
    for k, entry in scores["pass@k"].items():
        assert entry["value"] == row[f"eval/pass@{k}"] and entry["low"] <= entry["value"] <= entry["high"]
    assert 0 < scores["pass@k"]["1"]["value"] < scores["pass@k"]["3"]["value"]
    assert 1 < scores["entropy"] < 2.84  # a nearly random policy over 17 symbols


def test_metrics_equal_those_recomputed_from_the_samples_file(evaluated: Path) -> None:
    scores, lines = held_out_of(evaluated), samples_of(evaluated)
    assert len(lines) == PROBLEMS and all(len(line["samples"]) == SAMPLES for line in lines)
    token = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    groups = [[[token[c] for c in one["text"]] for one in line["samples"]] for line in lines]
    for line, group in zip(lines, groups, strict=True):
        for one, tokens in zip(line["samples"], group, strict=True):
            assert one["length"] == len(tokens) and one["reward"] == sum(tokens) % 2
            assert one["finish_reason"] == ("stop" if tokens[-1] == 0 else "length")
    responses = [tokens for group in groups for tokens in group]
    assert scores["length_mean"] == pytest.approx(sum(map(len, responses)) / len(responses))
    assert scores["rep_4"] == pytest.approx(sum(repetition(one, 4) for one in responses) / len(responses))
    assert scores["self_bleu"] == pytest.approx(sum(map(self_bleu, groups)) / PROBLEMS)
    solved = sum(any(one["reward"] for one in line["samples"]) for line in lines)
    assert scores["pass@k"]["3"]["value"] == pytest.approx(solved / PROBLEMS)
    assert sorted(path.name for path in evaluated.iterdir()) == ["eval.json", "samples_held_out.jsonl"]


def test_keep_best_accepts_a_pass_at_k_metric(run_dir: Path) -> None:
    newest = max((run_dir / "checkpoints").glob("step_*"))
    best = json.loads((newest / "run_state.json").read_text())["extra"]["best"]
    values = {
        row["step"]: row["eval/pass@2"] for row in rows(run_dir) if row["step"] > 0 and "eval/pass@2" in row
    }
    assert best["metric"] == "eval/pass@2" and best["value"] == max(values.values())


@pytest.mark.slow
def test_two_ranks_that_split_a_problems_samples_give_the_same_results(
    tmp_path: Path, run_dir: Path, evaluated: Path
) -> None:
    """Of 45 responses, rank 0 has one of the eighth problem's three and rank 1 two.

    The model has four interleaved pipeline stages, too.
    """
    arguments = ["--problems", "15", "--nproc", "2", "--out", str(tmp_path / "two")]
    arguments += [f"policy.{name}pipeline_model_parallel_size=2" for name in ("", "virtual_")]
    assert main(["eval", str(run_dir), *arguments]) == 0
    assert main(["eval", str(run_dir), "--problems", "15", "--out", str(tmp_path / "one")]) == 0
    one, two = (held_out_of(tmp_path / name) for name in ("one", "two"))
    for name in ("problems", "samples", "length_mean", "truncation_rate", "self_bleu", "rep_4"):
        assert one[name] == two[name], name
    assert one["entropy"] == pytest.approx(two["entropy"], rel=1e-5)
    # Rewards are not compared: subprocesses do not see the patched one.
    for ours, theirs in zip(samples_of(tmp_path / "one"), samples_of(tmp_path / "two"), strict=True):
        assert ours["problem"] == theirs["problem"]
        assert [s["text"] for s in ours["samples"]] == [s["text"] for s in theirs["samples"]]


def test_initial_weights_are_evaluated_and_top_p_has_no_entropy(tmp_path: Path) -> None:
    settings = [*SMALL_MODEL, "eval.top_p=0.9", "eval.problems=4"]
    assert main(["eval", str(RECIPE), *settings, "--samples", "1", "--out", str(tmp_path / "out")]) == 0
    scores = held_out_of(tmp_path / "out")
    assert scores["entropy"] is None and scores["self_bleu"] is None and list(scores["pass@k"]) == ["1"]
    assert scores["problems"] == 4 and scores["samples"] == 1
    assert "random initial weights" in json.loads((tmp_path / "out" / "eval.json").read_text())["checkpoint"]


def test_exact_mode_generates_without_a_training_pass(run_dir: Path, tmp_path: Path) -> None:
    exact = ("rollout.local.exact=true", "on_policy.tolerance=0", "--problems", "4")
    assert main(["eval", str(run_dir), *exact, "--out", str(tmp_path / "out")]) == 0
    assert held_out_of(tmp_path / "out")["problems"] == 4


def test_results_are_never_overwritten(capsys, run_dir: Path, evaluated: Path, tmp_path: Path) -> None:
    before = (evaluated / "eval.json").read_bytes()
    error = refused(capsys, "eval", str(run_dir))
    assert f"{evaluated} holds eval.json; name another one with --out" in error
    assert (evaluated / "eval.json").read_bytes() == before
    (tmp_path / "file").touch()
    assert "file is a file" in refused(capsys, "eval", str(run_dir), "--out", str(tmp_path / "file"))


def test_wrong_eval_arguments_give_one_error_line(
    capsys, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("started/checkpoints").mkdir(parents=True)
    Path("started/config.yaml").write_text("")
    Path("data").mkdir()
    Path("own.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    run = str(run_dir)
    for arguments, words in (
        (["empty"], "empty is neither the folder of a run (config.yaml is missing) nor a checkpoint"),
        (["started"], "the run started has no checkpoint yet"),
        (["gone.yaml", "--out", "x"], "recipe 'gone.yaml' does not exist"),
        ([str(RECIPE)], "has no folder for results; name one with --out DIR"),
        ([run, "--tasks", "aime"], "--tasks aime is unknown; choose held_out, math500, math, gsm8k"),
        ([run, "--tasks", "math500"], "give --data DIR or OPO_TEST_DATA, or math500=problems.jsonl"),
        (
            [run, "--tasks", "aime24", "--data", "data"],
            "none of data/aime24.jsonl, data/",
        ),
        ([run, "--tasks", "aime24", "--data", "date"], "--data date is not a folder"),
        ([run, "--tasks", "mine=gone.jsonl"], "--tasks mine=gone.jsonl names no file"),
        ([run, "--tasks", "held_out=own.jsonl"], "is the name of the recipe's own problems"),
        ([run, "--tasks", "a/b=own.jsonl"], "is not a name"),
        ([run, "--tasks", "held_out,held_out"], "has held_out twice"),
        ([run, "--samples", "0"], "argument --samples: '0' is not a number of samples, 1 or more"),
        ([run, "--tasks", "mine=own.jsonl", "--out", "x"], "task.tokenizer=bytes has 257 tokens, but the"),
    ):
        assert words in refused(capsys, "eval", *arguments), arguments
    assert not Path("x").exists()


def test_a_damaged_checkpoint_is_not_evaluated(capsys, run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "checkpoints" / "step_00000002"
    shutil.copytree(run_dir / "checkpoints" / "step_00000002", copy)
    with next(copy.glob("*.distcp")).open("ab") as file:
        file.write(b"x")
    assert "is damaged" in refused(capsys, "eval", str(copy), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("layout", ["{name}.jsonl", "{name}/test.jsonl", "{name}/{name}.json"])
def test_known_benchmarks_are_located_and_graded_by_value(tmp_path: Path, layout: str) -> None:
    require("math_verify", "pip install -e '.[math]'")
    from opo_megatron.config.schema import TaskConfig

    problem_field, answer_field = FIELDS["aime24"]
    problems = [{problem_field: f"What is {i}/2?", answer_field: i} for i in range(3)]
    path = tmp_path / layout.format(name="aime24")
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    path.write_text(json.dumps(problems, indent=1) if path.suffix == ".json" else lines)
    held_out, aime = find_benchmarks("held_out,aime24", tmp_path)
    assert held_out.name == HELD_OUT and held_out.source is None and aime.source == str(path)
    task = aime.task(TaskConfig(template="Q: {prompt}", answer_pattern="#### (.+)"))
    try:
        assert task.size("held_out") == 3 and task.size("train") == 0
        prompts = [task.prompt("held_out", i) for i in range(3)]
        assert bytes(prompts[1].tokens) == b"Q: What is 1/2?"
        responses = [list(rf"\boxed{{0{i}.0}}".encode()) for i in (0, 1, 3)]
        assert task.rewards(prompts, responses) == [1.0, 1.0, 0.0]
    finally:
        task.close()


def test_help_shows_examples(capsys) -> None:
    assert main(["eval", "--help"]) == 0
    output = capsys.readouterr().out
    assert "--tasks math500,gsm8k,aime24 --data data" in output and "eval.json" in output
