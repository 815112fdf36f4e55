"""Steps do not depend on the parallel layout: `tools/check_layouts.py`, which compares with one process."""

from __future__ import annotations

import math
import os
from pathlib import Path

import check_layouts
import pytest
from bench.gpu_layouts import LAYOUT_SECTIONS, ON_CPU
from bench.gpu_layouts import LAYOUTS as ON_A_GPU
from bench.gpu_section import Section, Setting
from check_layouts import LAYOUTS, Machine

from tests.support.paths import ROOT
from tests.support.requirements import run_ranks_of

STAGED_WORKER = ROOT / "tests/support/workers/staged_worker.py"


def test_layouts_of_every_dimension_take_the_same_steps_as_one_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = ["overlap-tp2pp2", "cp2dp2", "moe-replay-tp2sp-cp2-ep2-recompute"]
    assert check_layouts.compare(names, Machine(ties=("tied",))) == 0
    # Three layouts, one process that replays, and the control that does not.
    assert capfd.readouterr().out.count(" ok ") == 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_layout_takes_the_same_steps_and_staging_changes_no_bit(
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = list(LAYOUTS)
    by_gloo = check_layouts.measure(names, Machine())
    assert check_layouts.print_table(names, by_gloo, Machine()) == 0
    with_replay = [name for name, case in check_layouts.REFERENCES.items() if case.replay]
    assert capfd.readouterr().out.count(" ok ") == 2 * (len(LAYOUTS) + len(with_replay))
    assert check_layouts.measure(names, Machine(staged=True)) == by_gloo


@pytest.mark.slow
def test_layouts_agree_with_one_process_in_bf16() -> None:
    assert check_layouts.compare(["tp2+sp", "pp2vpp2", "cp2", "moe-ep2"], Machine(precision="bf16")) == 0


@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_every_operation_of_the_staged_group_gives_gloos_numbers(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tools")]))
    run_ranks_of(STAGED_WORKER, ranks, timeout=120)


def test_a_layout_that_differs_fails(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [[0.4, 1.0], [0.45, 1.0], [0.35, 1.0]]
    results = {f"{name}/{ties}": steps for name in ("one process", "tp2") for ties in check_layouts.TIES}
    assert check_layouts.print_table(["tp2"], results, Machine(precision="bf16")) == 0
    capsys.readouterr()
    for step in range(3):
        for wrong in ([0.6, 1.0], [0.4, 1.03], [math.nan, 1.0], [0.4, math.nan], [0.4, math.inf]):
            other = results | {"tp2/tied": [*steps[:step], wrong, *steps[step + 1 :]]}
            assert check_layouts.print_table(["tp2"], other, Machine(precision="bf16")) == 1, (step, wrong)
            assert capsys.readouterr().out.count("DIFFERS") == 1


@pytest.mark.parametrize(
    ("log_prob", "norm", "left_out"),
    [(3e-5, 0.0, 1.0), (math.nan, 0.0, 1.0), (1e-6, 2e-6, 1.0), (1e-6, 0.0, 1e-6), (1e-6, math.inf, 1.0)],
)
def test_a_replay_that_differs_or_a_control_that_does_not_fails(
    log_prob: float, norm: float, left_out: float
) -> None:
    machine = Machine(ties=("untied",))

    def failures(log_prob: float, norm: float, left_out: float) -> int:
        results = {
            "moe replay, one process/untied": [[0.4, 1.0, 1e-6]],
            "moe replay, left out/untied": [[0.4, 1.0, left_out]],
            "moe-replay-pp2/untied": [[0.4, 1.0 + norm, log_prob]],
        }
        return check_layouts.print_table(["moe-replay-pp2"], results, machine)

    assert failures(1e-6, 5e-7, 1.0) == 0
    assert failures(log_prob, norm, left_out) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tp3"], "unknown layout 'tp3'; choose from tp2, tp2+sp,"),
        (["--precision", "fp8"], "--precision fp8 does not run with --device cpu; choose from fp32, bf16"),
        (
            ["--device", "cuda", "--precision", "fp32"],
            "--precision fp32 does not run with --device cuda; choose from bf16, fp8",
        ),
        (["--device", "cuda"], "--device cuda, but torch sees no GPU; run this on a machine with one"),
        (["--precision", "fp32", "--precision", "fp8"], "--precision fp8 does not run with --device cpu"),
        (["--process-group", "nccl"], "invalid choice: 'nccl'"),
    ],
)
def test_impossible_options_are_one_line_and_exit_code_2(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["check_layouts.py", *options])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        check_layouts.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_only_replayed_experts_are_left_out_in_fp8() -> None:
    on_gpu = Machine("cuda", "fp8", staged=True)
    assert {name for name in LAYOUTS if not on_gpu.runs(name)} == {n for n in LAYOUTS if LAYOUTS[n].replay}
    assert all(Machine("cuda", "bf16", staged=True).runs(name) for name in LAYOUTS)


@pytest.mark.parametrize("precision", check_layouts.ON_GPU)
@pytest.mark.parametrize("name", list(LAYOUTS | check_layouts.REFERENCES))
def test_every_layout_of_a_gpu_is_a_valid_recipe(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("cuda", precision, staged=True)
    if machine.runs(name):
        check_layouts.case_config(name, "tied", machine)


def test_sections_of_a_gpu_name_layouts_that_run_in_their_precision() -> None:
    for names in (*ON_A_GPU.values(), *ON_CPU.values()):
        assert set(names) <= set(LAYOUTS)
    assert all(
        Machine("cuda", "fp8", staged=True).runs(name)
        for group in ("2 and 4 ranks", "experts, FP8")
        for name in ON_A_GPU[group]
    )
    assert {LAYOUTS[name].ranks for name in ON_A_GPU["2 ranks"]} == {2}
    assert {LAYOUTS[name].ranks for name in ON_A_GPU["4 ranks"]} == {4}
    parts = {part for names in ON_A_GPU.values() for name in names for part in LAYOUTS[name].overrides}
    for key in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "expert_model"):
        assert any(f"policy.{key}_parallel_size" in part for part in parts), key


@pytest.mark.slow
@pytest.mark.parametrize("section", LAYOUT_SECTIONS, ids=lambda section: section.name)
def test_sections_of_a_gpu_run_on_a_cpu_as_far_as_it_goes(section: Section, tmp_path: Path) -> None:
    figures = section.run(Setting("cpu", tmp_path, "python"))
    assert "not met" not in figures
    assert figures.get("missing") == "FP8 needs a GPU" or figures["precision"] == "fp32"
