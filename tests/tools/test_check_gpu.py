"""The check of everything that needs a GPU: its budget, its limits, and as much of it as a CPU can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import check_gpu
import pytest
from bench.gpu_training import KINDS, by_kind, not_met

from tests.support.paths import TOOLS

TOOL = TOOLS / "check_gpu.py"
SECONDS = 300
FAKE = """\
import subprocess, sys, time
sys.path[:0] = [{root!r}, {tools!r}]
import check_gpu
from bench.gpu_section import Section

def hangs(setting):
    child = subprocess.Popen(["sleep", "600"])
    (setting.folder.parent / "child").write_text(str(child.pid))
    time.sleep(600)

def fails(setting):
    raise RuntimeError("the card is on fire")

check_gpu.SECTIONS[:] = [
    Section("good", 60, lambda setting: {{"figure": 1.5, "python": setting.sglang_python}}),
    Section("bad", 60, fails),
    Section("slow", 60, lambda setting: {{"figure": 9.0, "not met": ["figure is 9, at most 5"]}}, alone=True),
    Section("stuck", 1, hangs),
    Section("elsewhere", 60, lambda setting: {{"missing": "no such card"}}),
    Section("later", 900, fails, by_default=False),
]
check_gpu.CPU_PATIENCE = 1
sys.exit(check_gpu.main())
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def fake_tool(tmp_path: Path) -> str:
    path = tmp_path / "tool.py"
    path.write_text(FAKE.format(root=str(TOOLS.parent), tools=str(TOOLS)))
    return str(path)


def test_the_plan_fits_five_minutes() -> None:
    done = run(sys.executable, str(TOOL), "--dry-run")
    assert done.returncode == 0, done.stderr
    *lines, last = [line for line in done.stdout.splitlines() if "with --only" not in line]
    sections = check_gpu.chosen(())
    assert (
        last == f"{check_gpu.longest(sections, check_gpu.SIDE_BY_SIDE)} s at most"
        and int(last.split()[0]) <= SECONDS
    )
    for section in sections:
        assert any(line.split(maxsplit=2)[1:] == ["s", section.name] for line in lines), section.name


def test_names_of_sections_are_unique() -> None:
    names = [section.name for section in check_gpu.SECTIONS]
    assert len(names) == len(set(names))


def test_a_section_that_fails_or_hangs_is_one_line_and_stops_no_other(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    tool = (sys.executable, fake_tool(tmp_path), "--device", "cpu", "--sglang-python", "/elsewhere")
    done = run(*tool, "--keep", str(kept))
    assert done.returncode == 1, done.stdout + done.stderr
    for words in (
        "ok       good: figure 1.5", "FAILED   bad: RuntimeError: the card is on fire",
        "NOT MET  slow: figure 9", "FAILED   stuck: it took longer than 1 seconds",
        "not run  elsewhere: no such card", "\nFAILED: bad: ", "\nNOT MET: slow: figure is 9, at most 5",
    ):  # fmt: skip
        assert words in done.stdout, done.stdout
    assert "later" not in done.stdout
    assert json.loads((kept / "good" / "result.json").read_text())["python"] == "/elsewhere"
    assert not alive(int((kept / "child").read_text()))


@pytest.mark.parametrize(
    ("folder", "tool", "python", "seen"),
    [
        (".", "tool.py", "/elsewhere", "/elsewhere"),
        ("below", "../tool.py", "/elsewhere", "/elsewhere"),
        (".", "./tool.py", "bin/python", "{}/bin/python"),
        ("below", "../tool.py", "../bin/python", "{}/bin/python"),
        (".", "below/../tool.py", "~/python", str(Path.home() / "python")),
    ],
)
def test_paths_are_those_of_the_folder_where_it_is_started(
    folder: str, tool: str, python: str, seen: str, tmp_path: Path
) -> None:
    fake_tool(tmp_path)
    (tmp_path / "below").mkdir()
    command = [sys.executable, tool, "--device", "cpu", "--only", "good", "--sglang-python", python]
    command += ["--keep", "kept"]
    done = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / folder / "kept" / "good" / "result.json").read_text())
    assert result["python"] == seen.format(tmp_path)


def test_what_cannot_run_is_missed_on_a_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    results = {"good": {"figure": 1.0}, "elsewhere": {"missing": "no such library"}}
    assert check_gpu.conclude(results, on_gpu=False) == 0 and capsys.readouterr().out == ""
    assert check_gpu.conclude(results, on_gpu=True) == 1
    assert capsys.readouterr().out == "NOT RUN: elsewhere: no such library\n"


def alive(pid: int) -> bool:
    """Whether the process still runs, after a moment."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "error: torch sees no GPU"),
        (("--only", "teleport"), "--only teleport is no part of: "),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--keep", str(TOOLS)), "is not empty; name a new folder"),
        (("--side-by-side", "many"), "invalid int value"),
    ],
)
def test_a_wrong_argument_or_machine_is_named(arguments: tuple[str, ...], words: str) -> None:
    if not arguments and check_gpu.sees_gpu():
        pytest.skip("this machine has a GPU")
    done = run(sys.executable, str(TOOL), *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_only_chooses_by_part_of_the_name_also_what_is_off_by_default(tmp_path: Path) -> None:
    tool = (sys.executable, fake_tool(tmp_path), "--device", "cpu")
    assert run(*tool, "--only", "good").returncode == 0
    listed = run(*tool, "--only", "LATER", "--dry-run").stdout
    assert " 900 s  later" in listed and "good" not in listed


def test_kinds_of_kernels_are_found_by_the_names_that_libraries_give_them() -> None:
    names = {
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel": "norms",
        "void transformer_engine::block_scaled_1d_cast_transpose_kernel": "FP8 quantization",
        "void at::native::multi_tensor_apply_kernel<AdamFunctor>": "optimizer",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, MulFunctor>": "elementwise",
        "void fused_rope_forward_kernel<float>": "rotary embedding",
    }
    for name, kind in names.items():
        assert kind in KINDS and by_kind([(name, 2.0)]) == {kind: 2.0}
    table = by_kind([("unheard_of", 5.0), ("tiny", 0.01), ("gemm", 7.0)])
    assert table == {"matrix products": 7.0, "other: unheard_of": 5.0, "other": 0.01}


@pytest.mark.parametrize(
    ("mfu", "card", "words"),
    [
        (0.63, "NVIDIA H200", None),
        (0.61, "NVIDIA H200", "throughput/mfu is 0.610, at least 0.62"),
        (float("nan"), "NVIDIA H200", "throughput/mfu is nan"),
        (None, "NVIDIA H100 NVL", "has no peak of NVIDIA H100 NVL"),
        (None, None, None),
    ],
)
def test_a_card_misses_its_goal_unless_it_is_reached(
    mfu: float | None, card: str | None, words: str | None
) -> None:
    figures = {} if mfu is None else {"throughput/mfu": mfu}
    missed = not_met(figures, 0.62, card).get("not met", [])
    assert len(missed) == (words is not None) and (words or "") in "".join(missed)


def on_a_cpu(*only: str) -> subprocess.CompletedProcess[str]:
    arguments = [word for name in only for word in ("--only", name)]
    command = [sys.executable, str(TOOL), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize(
    "only",
    [
        pytest.param(("library", "kernel"), id="without models, ranks and servers"),
        pytest.param((), id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
)
def test_every_section_runs_on_a_cpu_as_far_as_it_goes(only: tuple[str, ...]) -> None:
    done = on_a_cpu(*only)
    assert done.returncode == 0, done.stdout + done.stderr
    for section in check_gpu.chosen(only):
        assert f" {section.name}: " in done.stdout
    if not only:
        assert "ok       training: 1.35 G parameters, bf16: seconds per step" in done.stdout
    assert "written" not in done.stdout
