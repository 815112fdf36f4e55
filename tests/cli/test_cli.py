"""The command line: an error is one line and exit code 2, without heavy imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from opo_megatron.cli.main import COMMANDS, EPILOG, main
from opo_megatron.config import Config, load_config
from opo_megatron.distributed.launch import CHILD
from opo_megatron.distributed.outcome import ERROR_CLAIM, OUTCOME
from opo_megatron.errors import UserError
from tests.support.paths import ROOT

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", CHILD, ERROR_CLAIM, OUTCOME)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.yaml").write_text("run:\n  dir: out\n")
    return "recipe.yaml"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Replaces `opo_megatron.train`; records the configurations of its calls."""
    calls: list[Config] = []
    module = ModuleType("opo_megatron.train")
    module.train = lambda config, allowed: calls.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opo_megatron.train", module)
    return calls


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Replaces `run_ranks`; records the arguments of its calls."""
    calls: list[tuple] = []
    monkeypatch.setattr(
        "opo_megatron.cli.common.run_ranks", lambda *arguments, **_: calls.append(arguments) or 3
    )
    return calls


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one error line of a command that exits with code 2."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


TENSOR = "policy.tensor_model_parallel_size"
EXPERTS = "policy.model.num_moe_experts"


@pytest.mark.parametrize(
    ("nproc", "overrides", "words"),
    [
        ("3", f"{TENSOR}=2", "3 ranks cannot be split into model replicas of 2 tensor × 1 pipeline"),
        ("3", f"{TENSOR}=2", "start a multiple of 2 ranks (--nproc 2)"),
        ("2", f"{EXPERTS}=4 policy.expert_model_parallel_size=4", "(--nproc 4)"),
    ],
)
def test_a_world_size_not_divisible_by_the_layout_is_refused(capsys, recipe, nproc, overrides, words):
    assert words in refused(capsys, "config", recipe, "--nproc", nproc, *overrides.split())


def test_train_with_too_few_ranks_names_the_number_to_start(capsys, recipe, trained):
    assert "(--nproc 2)" in refused(capsys, "train", recipe, f"{TENSOR}=2")
    assert not trained


def test_config_prints_a_recipe_that_loads_to_the_same_configuration(capsys, recipe):
    assert main(["config", recipe, "optimizer.lr=1e-4"]) == 0
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    assert load_config("printed.yaml") == load_config(recipe, ["optimizer.lr=1e-4"])
    assert "# One step" in printed and "384 rollouts" in printed


def test_options_and_overrides_mix_in_any_order(recipe, launched):
    tensor = f"{TENSOR}=2"
    for argv in (
        [recipe, "--nproc", "2", tensor, "train.steps=3"],
        ["--nproc", "2", recipe, tensor, "train.steps=3"],
        [recipe, tensor, "--nproc=2", "train.steps=3"],
        [recipe, tensor, "train.steps=3", "--nproc", "2"],
    ):
        assert main(["train", *argv]) == 3
    command = [sys.executable, "-m", "opo_megatron", "train", recipe, tensor, "train.steps=3"]
    assert launched == [(command, 2, 1)] * 4


def test_one_rank_trains_in_this_process(recipe, trained, launched):
    assert main(["train", recipe, "train.steps=3", "--nproc", "1"]) == 0
    assert [config.train.steps for config in trained] == [3]
    assert not launched


def test_a_launcher_sets_the_number_of_ranks(monkeypatch, capsys, recipe, trained):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", recipe, f"{TENSOR}=2"]) == 0
    assert len(trained) == 1
    assert "remove --nproc" in refused(capsys, "train", recipe, "--nproc", "2")
    monkeypatch.setenv("WORLD_SIZE", "all")
    assert "WORLD_SIZE=all" in refused(capsys, "train", recipe)


def test_a_non_empty_run_folder_is_not_overwritten(capsys, recipe, trained, launched):
    Path("out").mkdir()
    assert main(["train", recipe]) == 0  # empty is fine
    Path("out/metrics.jsonl").write_text("")
    words = "run.dir=out is not empty; choose another run.dir, or set resume=auto"
    assert words in refused(capsys, "train", recipe)
    assert words in refused(capsys, "train", recipe, "--nproc", "2")
    assert main(["train", recipe, "resume=auto"]) == 0
    assert len(trained) == 2 and not launched
    assert "is a file" in refused(capsys, "train", recipe, "run.dir=recipe.yaml")


@pytest.mark.parametrize("name", [CHILD, "RANK"])
def test_only_the_first_process_checks_that_the_folder_is_empty(monkeypatch, recipe, trained, name):
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("")
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", recipe]) == 0 and len(trained) == 1


def test_resume_auto_starts_a_run_in_a_new_folder(recipe, trained):
    assert main(["train", recipe, "resume=auto"]) == 0 and len(trained) == 1


def test_debug_shows_the_traceback_of_a_user_error(capsys, recipe):
    assert main(["config", recipe, "lr=1", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "did you mean 'optimizer.lr'?" in error


def test_an_interrupted_training_run_returns_130(monkeypatch, recipe, trained):
    def interrupt(_config: Config, _allowed: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["opo_megatron.train"], "train", interrupt)
    assert main(["train", recipe]) == 130


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("exit()", 0),
        ("sys.exit(75)", 75),  # as if it were to be resumed
        ("sys.exit('done')", 1),
        ("raise SystemExit", 0),
        ("import unittest; unittest.main(argv=['x'], module='enum')", 0),
    ],
)
def test_a_call_of_exit_in_anybodys_code_is_an_error_that_names_the_caller(
    monkeypatch, capsys, recipe, trained, call, code
):
    namespace = {"sys": sys, "exit": site_exit()}
    exec(compile(f"def reward():\n    {call}", "mine.py", "exec"), namespace)
    monkeypatch.setattr(sys.modules["opo_megatron.train"], "train", lambda *_: namespace["reward"]())
    assert main(["train", recipe]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the run ended with exit code {code} before the end of `opo train`: ")
    assert ("reward (mine.py, line 2) called exit; remove that call" in error) == ("unittest" not in call)


def site_exit():
    import _sitebuiltins

    return _sitebuiltins.Quitter("exit", "Ctrl-D")


def test_an_internal_error_is_not_reported_as_a_user_error(monkeypatch, recipe, trained):
    def fail(_config: Config, _allowed: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["opo_megatron.train"], "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", recipe])


def test_a_rank_that_loses_its_peers_prints_no_second_error(monkeypatch, capsys, recipe, trained, tmp_path):
    def lose_peer(_config: Config, _allowed: list[str]) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(sys.modules["opo_megatron.train"], "train", lose_peer)
    with (tmp_path / "claim").open("w+") as claim:
        monkeypatch.setenv(ERROR_CLAIM, str(claim.fileno()))
        with pytest.raises(RuntimeError, match="closed by peer"):
            main(["train", recipe])
        claim.write("3")  # the exit code of the peer that prints
        claim.flush()
        monkeypatch.setenv(ERROR_CLAIM, str(claim.fileno()))
        assert main(["train", recipe]) == 3
    assert capsys.readouterr().err == ""


def test_help_shows_examples(capsys):
    assert main(["--help"]) == 0
    assert "opo train recipes/quickstart.yaml run.dir=runs/first" in capsys.readouterr().out
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        output = capsys.readouterr().out
        assert "examples:" in output and f"  opo {name} " in output
    assert main(["train", "-h"]) == 0
    assert "task.data=problems.jsonl" in capsys.readouterr().out


def test_every_example_in_the_help_is_a_valid_command(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    texts = "".join([EPILOG, *(module.EPILOG for module in COMMANDS.values())]).replace("\\\n", "")
    commands = re.findall(r"^  opo (?:train|config) (.+)$", texts, re.MULTILINE)
    assert len(commands) == 10
    for command in commands:
        command = command.split(" --allow ")[0]  # `opo config` has no --allow
        assert main(["config", *command.split()]) == 0, capsys.readouterr().err


def test_a_user_error_under_torchrun_is_printed_with_its_rank(monkeypatch, capsys, recipe, trained):
    def refuse(_config: Config, _allowed: list[str]) -> None:
        raise UserError("a sentence\nover two lines")

    monkeypatch.setattr(sys.modules["opo_megatron.train"], "train", refuse)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", recipe]) == 2
    assert capsys.readouterr().err == "error (rank 3): a sentence over two lines\n"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_config_is_fast_and_imports_neither_torch_nor_megatron(recipe):
    code = (
        "import sys; from opo_megatron.cli.main import main; import opo_megatron.distributed.launch; "
        f"code = main(['config', {recipe!r}, 'policy.megatron.recompute_granularity=full']); "
        "print({'torch', 'transformers', 'megatron'} & set(sys.modules), code)"
    )
    start = time.monotonic()
    result = command("-c", code)
    assert time.monotonic() - start < 3
    assert result.stdout.splitlines()[-1] == "set() 0"


RANK_SCRIPT = """
import os, sys, types
from opo_megatron.cli.main import main
from opo_megatron.errors import UserError
def train(config, allowed):
    if {condition}:
        raise UserError("the reward of prompt 7 is nan")
    import time; time.sleep(30)
module = types.ModuleType("opo_megatron.train"); module.train = train
sys.modules["opo_megatron.train"] = module
sys.exit(main(sys.argv[1:]))
"""

PARENT_SCRIPT = (
    "import sys; from opo_megatron.distributed.launch import run_ranks; sys.exit(run_ranks(sys.argv[1:], 3))"
)


@pytest.mark.parametrize("condition", ["True", "os.environ['RANK'] == '2'"], ids=["every rank", "one rank"])
def test_a_user_error_on_several_ranks_is_printed_exactly_once(recipe, condition):
    Path("rank.py").write_text(RANK_SCRIPT.format(condition=condition))
    result = command("-c", PARENT_SCRIPT, sys.executable, "rank.py", "train", recipe)
    assert result.returncode == 2
    assert result.stderr == "error: the reward of prompt 7 is nan\n"
