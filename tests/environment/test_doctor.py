"""`opo doctor` in environments of package metadata: findings and exit code, without imports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opo_megatron.cli.main import main as opo
from opo_megatron.environment.doctor import Gpu, Machine, collect, describe, diagnose
from opo_megatron.environment.versions import Part, constraints, numbers, read_versions
from tests.support.paths import ROOT

VERSIONS = read_versions()
H100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", "9.0")


def install(folder: Path, packages: dict[str, str]) -> Path:
    """A folder of packages with metadata only."""
    for name, version in packages.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def all_packages(**changes: str) -> dict[str, str]:
    packages = {part.name: part.version or "3.7.0" for part in VERSIONS.packages if part.git is None}
    return packages | _named(changes)


def _named(changes: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): version for name, version in changes.items()}


def fake_sglang(folder: Path, packages: dict[str, str]) -> Path:
    """A Python interpreter of an environment with these packages."""
    site = install(folder / "sglang-site", packages)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


def doctor(site: Path, sglang: Path, *options: str) -> tuple[int, dict[str, dict]]:
    """The command in a process that sees only the project and `site`."""
    command = [sys.executable, "-S", "-m", "opo_megatron", "doctor", "--json", "--sglang-python", str(sglang)]
    result = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": f"{ROOT}:{site}", "PATH": str(site)},  # without nvidia-smi
    )
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["ready"] == (result.returncode == 0)
    return result.returncode, {finding["part"]: finding for finding in report["findings"]}


SGLANG = {part.name: part.version or "" for part in VERSIONS.sglang}


def test_a_complete_environment_is_ready(tmp_path: Path) -> None:
    site = install(tmp_path / "site", all_packages())
    code, findings = doctor(site, fake_sglang(tmp_path, SGLANG), "--need", "sglang")
    assert code == 0
    assert {finding["state"] for finding in findings.values()} == {"ok", "unused"}
    assert {name for name, finding in findings.items() if finding["state"] == "unused"} == {
        "gpu", "triton", "transformer-engine", "apex"
    }  # fmt: skip


def test_without_sglang_training_is_ready_and_the_fix_is_named(tmp_path: Path) -> None:
    site = install(tmp_path / "site", all_packages())
    code, findings = doctor(site, tmp_path / "nowhere/python")
    assert code == 0
    assert findings["sglang"]["state"] == "missing" and not findings["sglang"]["required"]
    assert findings["sglang"]["costs"] == "rollout.engine=sglang does not start"
    assert findings["sglang"]["fix"] == "make setup-sglang"
    code, findings = doctor(site, tmp_path / "nowhere/python", "--need", "sglang")
    assert code == 2 and findings["sglang"]["required"]


def test_an_sglang_environment_with_another_torch_is_wrong(tmp_path: Path) -> None:
    site = install(tmp_path / "site", all_packages())
    python = fake_sglang(tmp_path, SGLANG | {"torch": "2.14.1"})
    code, findings = doctor(site, python, "--need", "sglang")
    assert code == 2 and findings["sglang"]["state"] == "ok"
    assert (findings["sglang's torch"]["state"], findings["sglang's torch"]["found"]) == ("wrong", "2.14.1")


def test_a_wrong_torch_is_not_ready_and_the_right_one_is_named(tmp_path: Path) -> None:
    site = install(tmp_path / "site", all_packages(torch="2.11.0"))
    code, findings = doctor(site, fake_sglang(tmp_path, SGLANG))
    assert code == 2
    wrong = {name: finding for name, finding in findings.items() if finding["state"] not in ("ok", "unused")}
    assert set(wrong) == {"torch"}
    assert wrong["torch"]["found"] == "2.11.0"
    assert wrong["torch"]["fix"] == f"pip install torch=={VERSIONS.part('torch').version}"


def test_an_empty_environment_misses_every_required_part(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    code, findings = doctor(tmp_path / "site", tmp_path / "nowhere")
    required = {part.name for part in VERSIONS.packages if part.needed == "always"}
    missing = {name for name, finding in findings.items() if finding["required"]} - {"python"}
    assert code == 2 and missing == required
    assert all(findings[name]["state"] == "missing" and findings[name]["fix"] for name in required)


def test_this_environment_is_diagnosed_within_a_second(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert opo(["doctor", "--sglang-python", "nowhere"]) == 0
    output = capsys.readouterr().out
    assert "megatron-core" in output and output.rstrip().splitlines()[-1].startswith("ready")
    assert opo(["doctor", "--need", "warp-drive"]) == 2
    assert "--need warp-drive is not known" in capsys.readouterr().err


def machine(**changes: str) -> Machine:
    return Machine("3.11.9", installed(all_packages(**changes)), (), (H100,) * 8, SGLANG)


def installed(packages: dict[str, str]) -> dict[str, str]:
    return {name.lower(): version for name, version in packages.items()}


def states(machine: Machine, *needs: str) -> dict[str, str]:
    return {finding.part: finding.state for finding in diagnose(machine, VERSIONS, needs).findings}


def test_a_cpu_build_of_torch_and_an_old_driver_are_wrong_on_gpus() -> None:
    assert states(machine())["torch"] == "ok"
    report = diagnose(machine(torch="2.13.0+cpu"), VERSIONS)
    finding = next(finding for finding in report.findings if finding.part == "torch")
    assert (finding.state, finding.costs) == ("wrong", "this build has no CUDA") and report.exit_code == 2
    old = replace(machine(), gpus=(replace(H100, driver="535.104.05"),))
    assert states(old)["driver"] == "wrong"
    assert diagnose(old, VERSIONS).exit_code == 0 and diagnose(old, VERSIONS, ["gpu"]).exit_code == 2


def test_fp8_needs_a_transformer_engine_that_megatron_supports() -> None:
    assert diagnose(machine(), VERSIONS, ["fp8"]).exit_code == 0
    assert states(machine(transformer_engine="2.13.0"))["transformer-engine"] == "wrong"
    assert diagnose(machine(transformer_engine="2.13.0"), VERSIONS, ["fp8"]).exit_code == 2
    assert diagnose(Machine("3.11.9", installed(all_packages())), VERSIONS, ["fp8"]).exit_code == 2  # no GPU


def without_transformer_engine(**changes: str) -> Machine:
    packages = all_packages(**changes)
    del packages["transformer-engine"]
    return replace(machine(), installed=installed(packages))


@pytest.mark.parametrize(
    ("where", "needs", "state"),
    [
        (machine(), (), "unused"),
        (machine(apex="0.9.10"), (), "unused"),
        (machine(transformer_engine="2.13.0"), (), "unused"),
        (machine(), ("apex",), "missing"),
        (without_transformer_engine(), (), "missing"),
        (replace(without_transformer_engine(), gpus=()), (), "unused"),
    ],
)
def test_apex_is_missed_only_on_gpus_without_transformer_engine(
    where: Machine, needs: tuple[str, ...], state: str
) -> None:
    assert states(where, *needs)["apex"] == state
    assert diagnose(where, VERSIONS, needs).exit_code == (2 if needs else 0)


def test_the_unrelated_package_apex_is_not_accepted(tmp_path: Path) -> None:
    report = diagnose(without_transformer_engine(apex="0.9.10"), VERSIONS)
    apex = next(finding for finding in report.findings if finding.part == "apex")
    assert apex.state == "missing" and apex.fix.startswith("pip uninstall -y apex, then in a clone of")
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert states(replace(without_transformer_engine(), path=(str(tmp_path),)))["apex"] == "ok"


def test_the_report_names_cost_and_fix_of_missing_parts_only() -> None:
    text = describe(diagnose(replace(machine(), sglang=None), VERSIONS))
    assert "cost  rollout.engine=sglang does not start" in text and "make setup-sglang SGLANG=cuda" in text
    assert text.count("cost  ") == 1
    assert "not ready: sglang" in describe(diagnose(replace(machine(), sglang=None), VERSIONS, ["sglang"]))


def test_versions_compare_by_number_without_local_parts() -> None:
    part = Part("x", "always", "", at_least="2.9", below="2.12")
    assert part.accepts("2.11.0") and part.accepts("2.9") and part.accepts("2.10.1+cu130")
    assert not part.accepts("2.12.0") and not part.accepts("2.8.9")
    assert numbers("25.09rc1") == (25, 9) and numbers("none") == ()


def test_the_first_folder_wins_whatever_the_packages_spelling(tmp_path: Path) -> None:
    first = install(tmp_path / "a", {"Reasoning_Gym": "1.0"})
    second = install(tmp_path / "b", {"reasoning-gym": "2.0", "torch": "2.13.0+cpu"})
    versions = collect([str(first), str(second)], "nowhere").installed
    assert versions == {"reasoning-gym": "1.0", "torch": "2.13.0+cpu"}


def test_sglangs_requirements_match_versions_toml() -> None:
    for kind in ("cpu", "cuda"):
        text = (ROOT / f"requirements/sglang-{kind}.txt").read_text()
        pins = dict(line.split("==") for line in text.splitlines() if "==" in line and line[0] != "#")
        assert pins["sglang"] == SGLANG["sglang"]
        assert pins.get("transformers", SGLANG["transformers"]) == SGLANG["transformers"]
    assert f"torch=={SGLANG['torch']}" in constraints(VERSIONS)
