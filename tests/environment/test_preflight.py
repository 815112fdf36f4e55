"""Node problems found before a job loads anything; a fake nvidia-smi provides the GPUs."""

from __future__ import annotations

import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from opo_megatron.cli import serve
from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.environment.preflight import Minimums, node_problems
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.installation import SERVE
from tests.support.paths import RECIPES

QUICKSTART = str(RECIPES / "quickstart.yaml")
GPU = "80000, 81559, 0"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def with_gpus(monkeypatch: pytest.MonkeyPatch, folder: Path, *rows: str) -> None:
    """Installs an nvidia-smi that prints these rows."""
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n*driver*) echo 'NVIDIA H100, 580.65.06, 9.0' ;;\n*) printf '"
        + "\\n".join(rows)
        + "\\n' ;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def gpu_problems(monkeypatch: pytest.MonkeyPatch, folder: Path, *rows: str, ranks: int = 2) -> list[str]:
    with_gpus(monkeypatch, folder, *rows)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("OPO_MIN_FREE_DISK_GB", "0")
    config = load_config(QUICKSTART, [f"run.dir={folder}/run"], ranks)
    return [problem for problem in node_problems(config) if not problem.startswith(("torch", "driver"))]


def test_a_healthy_machine_passes_without_side_effects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", QUICKSTART, f"run.dir={tmp_path}/run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("preflight: 1 ranks") and captured.out.endswith("fit\n")
    assert captured.err == "" and not (tmp_path / "run").exists() and not dist.is_initialized()


def test_a_recipe_that_opo_config_refuses_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", QUICKSTART, "optimizer.lr=-1"]) == 2
    assert capsys.readouterr().err.startswith("error: optimizer.lr is -1")


def test_a_full_disk_and_a_missing_engine_are_reported_by_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPO_MIN_FREE_DISK_GB", "1e9")
    engine = ["rollout.engine=sglang", f"rollout.sglang.python={tmp_path}/python"]
    assert main(["preflight", QUICKSTART, f"run.dir={tmp_path}/run", *engine]) == 2
    disk, sglang = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "sglang" in line)
    assert disk.startswith("error: ") and "GB free, below 1e+09 GB" in disk
    assert "sglang is missing, expected 0.5.21" in sglang and "make setup-sglang" in sglang


def test_healthy_gpus_have_no_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_problems(monkeypatch, tmp_path, GPU, "81000, 81559, [N/A]") == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((GPU,), "nvidia-smi lists 1 GPUs for 2 ranks; exclude the node from the job"),
        ((GPU, "80000, 81559, 3"), "GPU 1 reports 3 uncorrected ECC errors"),
        (("4000, 81559, 0", GPU), "GPU 0 has 4000 of 81559 MiB free, below the fraction 0.95"),
    ],
)
def test_missing_broken_and_occupied_gpus_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: tuple[str, ...], words: str
) -> None:
    problems = gpu_problems(monkeypatch, tmp_path, *rows)
    assert len(problems) == 1 and words in problems[0]


def test_a_failing_nvidia_smi_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, tmp_path, GPU)
    text = (tmp_path / "nvidia-smi").read_text().replace("*) printf", "*) exit 9; printf")
    (tmp_path / "nvidia-smi").write_text(text)
    config = load_config(QUICKSTART, [f"run.dir={tmp_path}/run"], 1)
    assert any("nvidia-smi fails" in problem for problem in node_problems(config))


def test_minimums_are_higher_with_gpus_and_set_by_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Minimums.of(True).all_reduce_gb_per_s > Minimums.of(False).all_reduce_gb_per_s
    monkeypatch.setenv("OPO_MIN_ALL_REDUCE_GB_PER_S", "123")
    assert Minimums.of(True).all_reduce_gb_per_s == Minimums.of(False).all_reduce_gb_per_s == 123


def test_a_dedicated_node_serves_the_recipes_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPO_MODEL", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    python = tmp_path / "python"
    python.touch()
    recipe, override = str(RECIPES / "opo_llama3_70b.yaml"), f"rollout.sglang.python={python}"
    overrides = [override, f"rollout.sglang.api_key_file={tmp_path / 'key'}"]
    command, environment, key = serve.server_command(recipe, overrides, "10.0.0.3", 10123)
    assert command[:2] == [str(python), str(SERVE)]
    options = dict(pairwise(command))
    assert options["--port"] == "10123" and options["--tensor-parallel-size"] == "8"
    assert options["--host"] == "10.0.0.3" and command.count("--host") == 1
    assert key == (tmp_path / "key").read_text().strip() and key not in " ".join(command)
    model_config = (Path(options["--model-path"]) / "config.json").read_text()
    assert '"num_hidden_layers": 80' in model_config and '"weight_block_size"' in model_config
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    with pytest.raises(UserError, match=r"rollout\.engine is local"):
        serve.server_command(recipe, [*overrides, "rollout.engine=local"], "10.0.0.3", 1)
    with pytest.raises(
        UserError, match=r"needs a key that the run has as well; add rollout\.sglang\.api_key"
    ):
        serve.server_command(recipe, [override], "10.0.0.3", 1)


@pytest.mark.parametrize(
    ("of_name", "of_route", "expected"),
    [
        ("10.0.0.3", "10.9.9.9", "10.0.0.3"),
        ("127.0.1.1", "10.0.0.3", "10.0.0.3"),
        (None, "10.0.0.3", "10.0.0.3"),
        ("10.0.0.3", None, "10.0.0.3"),
        ("127.0.0.1", "127.0.0.1", None),
        ("127.0.1.1", None, None),
        (None, None, None),
    ],
)
def test_a_server_listens_where_other_nodes_reach_it(
    of_name: str | None, of_route: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(name: str) -> str:
        if of_name is None:
            raise socket.gaierror
        return of_name

    class Probe(socket.socket):
        def connect(self, address: object) -> None:
            if of_route is None:
                raise OSError

        def getsockname(self) -> tuple[str | None, int]:
            return of_route, 1

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(socket, "socket", Probe)
    if expected is None:
        with pytest.raises(UserError, match="leads to no address that other nodes reach; add --host ADDRESS"):
            serve.own_address()
    else:
        assert serve.own_address() == expected
