"""Exact mode with SGLang in whole runs: families, types, layouts, missing operations, kills, replays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest

from opo_megatron.audit.record import column_digests
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.build import open_run
from opo_megatron.config import load_config
from opo_megatron.errors import OnPolicyError
from opo_megatron.rollout.sglang.server import Server, write_model_config
from opo_megatron.tasks.lift import LiftTask
from tests.support.altered_operations import NAMED
from tests.support.fixtures import RECIPE, SMALL_MODEL, small_config
from tests.support.interrupted import COMMAND, assert_same_run, attempts
from tests.support.servers import ROOT, processes_of, sglang_python
from tests.support.tiny_run import lasting, rows

LIMIT = 2400
"""Seconds of a run that starts six servers, on a machine that others use too."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT + 100)]

EXACT = ("rollout.engine=sglang", "rollout.sglang.exact=true", "on_policy.tolerance=0")
LOCAL = ("rollout.engine=local", "rollout.local.exact=true", "on_policy.tolerance=0")
SHORT = (
    *SMALL_MODEL,
    "policy.max_tokens_per_micro_batch=400",
    "warm_start.steps=0",
    "train.steps=3",
    "rollout.prompts_per_step=6",
    "rollout.samples_per_prompt=4",
    "eval.problems=8",
    "observe.kl=off",
    "observe.tensorboard=false",
)


def opo(command: str, *arguments: str) -> str:
    argv = [sys.executable, "-m", "opo_megatron", command, *arguments]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_steps(run_dir: Path, *overrides: str, recipe: Path = RECIPE) -> list[dict]:
    """The metrics of a run with a server, all of whose differences are 0."""
    python = f"rollout.sglang.python={sglang_python()}"
    opo("train", str(recipe), f"run.dir={run_dir}", python, *EXACT, *overrides)
    metrics = rows(run_dir)
    assert [row["step"] for row in metrics] == list(range(len(metrics)))
    assert {row["on_policy/sync_diff_max"] for row in metrics} == {0.0}
    assert {row["on_policy/logprob_diff_max"] for row in metrics[1:]} == {0.0}
    return metrics


def sampled(run_dir: Path, step: int) -> dict[str, int]:
    """Digests of a step's rollouts, whatever their order."""
    return column_digests(Rollouts.load(run_dir / "rollouts" / f"step_{step:08d}.safetensors"))


# ---------------------------------------------------------------------- families and types

MODELS = {
    "Llama, scaled RoPE": (
        "qk_layernorm=false",
        "rope_scaling.type=llama3",
        "rope_scaling.factor=4",
        "rope_scaling.original_max_sequence_length=16",
    ),
    "Qwen2, tied": ("qk_layernorm=false", "add_qkv_bias=true", "tie_embeddings=true"),
    "Qwen3": ("num_query_groups=2",),
    "Mistral": ("qk_layernorm=false", "num_query_groups=1", "kv_channels=16", "ffn_hidden_size=50"),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_every_family_is_exact_and_samples_what_the_local_engine_samples(
    model: str, dtype: str, tmp_path: Path
) -> None:
    settings = (*SHORT, f"policy.dtype={dtype}", *(f"policy.model.{one}" for one in MODELS[model]))
    run_steps(tmp_path / "sglang", *settings, "rollout.temperature=0.8")
    opo("train", str(RECIPE), f"run.dir={tmp_path / 'local'}", *settings, *LOCAL, "rollout.temperature=0.8")
    chains = [[row["chain"] for row in rows(tmp_path / name, "audit.jsonl")] for name in ("sglang", "local")]
    assert chains[0] == chains[1] and len(chains[0]) == 4
    assert lasting(tmp_path / "sglang") == lasting(tmp_path / "local")


# ---------------------------------------------------------------------- layouts and transports

PP2, VPP2 = "policy.pipeline_model_parallel_size=2", "policy.virtual_pipeline_model_parallel_size=2"
TP2, PARTS = "policy.tensor_model_parallel_size=2", "policy.exact_sum_parts=2"
THD, CP2 = "policy.packing=thd", "policy.context_parallel_size=2"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "pp2": (2, (PP2,)),
    "pp2 vpp2": (2, (PP2, VPP2)),
    "dp2": (2, ()),
    "packed": (1, (THD,)),
    "cp2": (2, (THD, CP2)),
    "pp2 packed, distributed": (2, (PP2, THD, "rollout.sglang.transport=distributed")),
    "disk": (1, ("rollout.sglang.transport=disk",)),
    "tp2": (2, (TP2,)),
    "tp2 sequence parallel": (2, (TP2, "policy.sequence_parallel=true")),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as `opo serve` starts it."""
    folder = tmp_path_factory.mktemp("external")
    config = small_config(
        f"run.dir={folder}",
        f"rollout.sglang.python={sglang_python()}",
        *EXACT,
        PARTS,
        "rollout.sglang.max_running_requests=64",
        f"rollout.sglang.api_key_file={folder / 'key'}",
    )
    write_model_config(config, LiftTask.vocab_size, folder / "model")
    server = Server(config, folder / "model", folder / "server.log", "server", None)
    try:
        server.start(lambda line: None)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("local") / "run"
    opo("train", str(RECIPE), f"run.dir={run_dir}", *SHORT, *LOCAL, PARTS)
    return run_dir


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_transport_is_exact(
    layout: str, server: Server, local_run: Path, tmp_path: Path
) -> None:
    """The first step's weights are the same under every layout, and so are its samples."""
    ranks, overrides = LAYOUTS[layout]
    urls = (
        f"rollout.sglang.urls=[{server.url}]",
        f"rollout.sglang.api_key_file={server.settings.api_key_file}",
    )
    run_steps(tmp_path / "run", *SHORT, *urls, PARTS, *overrides, "--nproc", str(ranks))
    assert sampled(tmp_path / "run", 1) == sampled(local_run, 1)


def test_two_servers_sample_what_one_samples(local_run: Path, tmp_path: Path) -> None:
    run_steps(tmp_path / "run", *SHORT, PARTS, "rollout.sglang.servers=2", "--nproc", "2")
    assert len(list((tmp_path / "run" / "sglang").glob("*.pid"))) == 2
    assert sampled(tmp_path / "run", 1) == sampled(local_run, 1)


@pytest.mark.parametrize("trainers", [1, 2])
def test_a_server_of_two_ranks_samples_what_one_samples(
    trainers: int, local_run: Path, tmp_path: Path
) -> None:
    split = (TP2,) if trainers == 2 else ()
    ranks = (*split, "rollout.sglang.tensor_parallel_size=2", "--nproc", str(trainers))
    run_steps(tmp_path / "run", *SHORT, PARTS, *ranks)
    assert sampled(tmp_path / "run", 1) == sampled(local_run, 1)


def test_another_models_server_is_refused(server: Server, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={tmp_path / 'run'}"]
    argv += [*SHORT, *EXACT, f"rollout.sglang.urls=[{server.url}]", "policy.model.ffn_hidden_size=64"]
    argv.append(f"rollout.sglang.api_key_file={server.settings.api_key_file}")
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 2
    assert (
        "does not run the operations of this recipe's model in exact mode; start it by `opo serve`"
        in result.stderr
    )


# ---------------------------------------------------------------------- without one operation


@pytest.mark.parametrize("operation", NAMED)
def test_the_check_names_an_operation_that_a_server_lacks(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Server.environment
    altered = {
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "altered_server",
        "PYTHONPATH": str(ROOT / "tests" / "support"),
        "ALTERED": operation,
    }
    monkeypatch.setattr(Server, "environment", lambda self: environment(self) | altered)
    python = f"rollout.sglang.python={sglang_python()}"
    config = load_config(RECIPE, [f"run.dir={tmp_path / 'run'}", *SHORT, *EXACT, python])
    with (
        pytest.raises(OnPolicyError, match=rf"differ by .* first in {NAMED[operation]}, so exactness cannot"),
        open_run(config),
    ):
        pass
    assert processes_of(tmp_path / "run") == []


def test_a_usual_server_differs(tmp_path: Path) -> None:
    python = f"rollout.sglang.python={sglang_python()}"
    settings = (*SHORT, "rollout.engine=sglang", "on_policy.tolerance=1e-3", python)
    opo("train", str(RECIPE), f"run.dir={tmp_path / 'run'}", *settings)
    assert all(row["on_policy/logprob_diff_max"] > 0 for row in rows(tmp_path / "run")[1:])


# ---------------------------------------------------------------------- kills and replays

MOMENTS = ("warm start", "generation", "training", "evaluation", "saving")


@pytest.fixture(scope="module")
def command() -> tuple[str, ...]:
    return (*COMMAND, *EXACT, f"rollout.sglang.python={sglang_python()}")


@pytest.fixture(scope="module")
def uninterrupted(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert attempts(run_dir, command=command) == [0]
    return run_dir


def test_five_kills_of_the_run_change_nothing(
    command: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    schedules = [[moment, int(SIGKILL)] for moment in MOMENTS]
    codes = attempts(tmp_path / "run", *schedules, command=command, timeout=LIMIT)
    assert codes == [-SIGKILL] * len(schedules) + [0]
    assert_same_run(tmp_path / "run", uninterrupted)


def test_five_kills_of_the_server_change_nothing(
    command: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    assert attempts(tmp_path / "run", ["server", list(MOMENTS)], command=command, timeout=LIMIT) == [0, 0]
    assert max(row.get("run/engine_failures", 0) for row in rows(tmp_path / "run")) >= 4
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_step_is_sampled_again_by_either_engine(tmp_path: Path) -> None:
    run_steps(tmp_path / "run", *SHORT)
    for options in ((), ("--rollouts",)):
        output = opo("replay", str(tmp_path / "run"), "--step", "3", *options)
        assert "step 3: every digest equals the record (rollouts generated again)" in output


# ---------------------------------------------------------------------- the quickstart


def test_sixty_steps_of_the_quickstart_are_exact(tmp_path: Path) -> None:
    metrics = run_steps(tmp_path / "run", recipe=ROOT / "recipes" / "quickstart_sglang.yaml")
    assert len(metrics) == 61 and metrics[-1]["eval/accuracy"] >= 0.85 > 0.6 > metrics[0]["eval/accuracy"]
