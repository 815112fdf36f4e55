"""Steps do not depend on the parallel layout: `tools/check_layouts.py`, which compares with one process."""

from __future__ import annotations

import math
from pathlib import Path

import check_layouts
import pytest
from check_layouts import LAYOUTS, Machine

from tests.support.requirements import run_ranks_of

STAGED_WORKER = Path(__file__).parents[1] / "support/workers/staged_worker.py"


def test_three_layouts_take_the_same_steps_as_one_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert check_layouts.compare(["tp2pp2", "dp2", "cp2dp2"]) == 0
    assert capfd.readouterr().out.count(" ok ") == 6  # three layouts, untied and tied


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_layout_takes_the_same_steps_as_one_process_and_staging_changes_no_bit(
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = list(LAYOUTS)
    by_gloo = check_layouts.measure(names, Machine())
    assert check_layouts.print_table(names, by_gloo, Machine()) == 0
    assert capfd.readouterr().out.count(" ok ") == 2 * len(LAYOUTS)
    assert check_layouts.measure(names, Machine(staged=True)) == by_gloo


@pytest.mark.slow
def test_layouts_agree_with_one_process_in_bf16() -> None:
    assert check_layouts.compare(["tp2+sp", "pp2vpp2", "cp2", "moe-ep2"], Machine(precision="bf16")) == 0


@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_every_operation_of_the_staged_group_gives_gloos_numbers(ranks: int) -> None:
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


def test_experts_are_left_out_in_fp8_and_nothing_else() -> None:
    on_gpu = Machine("cuda", "fp8", staged=True)
    assert {name for name in LAYOUTS if not on_gpu.runs(name)} == {n for n in LAYOUTS if LAYOUTS[n].moe}
    assert all(Machine("cuda", "bf16", staged=True).runs(name) for name in LAYOUTS)


@pytest.mark.parametrize("precision", check_layouts.ON_GPU)
@pytest.mark.parametrize("name", list(LAYOUTS | check_layouts.REFERENCES))
def test_every_layout_of_a_gpu_is_a_valid_recipe(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("cuda", precision, staged=True)
    if machine.runs(name):
        check_layouts.case_config(name, "tied", machine)
