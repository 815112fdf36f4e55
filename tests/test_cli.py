"""The command line: every mistake is one line and exit code 2, and nothing heavy is imported for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from opo_megatron.cli import main
from opo_megatron.config import Config, load_config
from opo_megatron.errors import UserError
from opo_megatron.launch import CHILD, ERROR_CLAIM

REPOSITORY = Path(__file__).parents[1]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", CHILD, ERROR_CLAIM)


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
    """Stands for `opo_megatron.train`: the configurations that training was called with."""
    calls: list[Config] = []
    module = ModuleType("opo_megatron.train")
    module.train = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opo_megatron.train", module)
    return calls


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands for `run_ranks`: the arguments of its calls."""
    calls: list[tuple] = []
    monkeypatch.setattr("opo_megatron.cli.run_ranks", lambda *arguments: calls.append(arguments) or 3)
    return calls


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command prints."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


MODEL, POLICY = "policy.model.", "policy."
TENSOR, PIPELINE = "policy.tensor_model_parallel_size", "policy.pipeline_model_parallel_size"
VIRTUAL, EXPERTS = "policy.virtual_pipeline_model_parallel_size", "policy.model.num_moe_experts"

OVERRIDE_MISTAKES = [
    # keys
    (
        "rollout.prompt_per_step=1",
        "unknown key 'rollout.prompt_per_step'; did you mean 'rollout.prompts_per_step'?",
    ),
    ("lr=1", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
    ("optimiser={lr: 1}", "unknown key 'optimiser'; did you mean 'optimizer'?"),
    ("rollout={temprature: 1}", "unknown key 'rollout.temprature'; did you mean 'rollout.temperature'?"),
    ("zzz=1", "unknown key 'zzz'; `opo config RECIPE` prints every key"),
    ("train.steps", "override 'train.steps' is not key=value"),
    ("=3", "override '=3' is not key=value"),
    ("optimizer.betas=[0.9,", "override 'optimizer.betas=[0.9,' has a value that is not valid YAML"),
    # types
    ("train.steps=many", "train.steps is 'many'; it must be an integer"),
    ("train.steps=1.5", "train.steps is 1.5; it must be an integer"),
    ("train.steps=true", "train.steps is True; it must be an integer"),
    ("train.steps=null", "train.steps is None; it must be an integer"),
    ("optimizer.lr=true", "optimizer.lr is True; it must be a number"),
    ("optimizer.lr={a: 1}", "optimizer.lr is {'a': 1}; it must be a number"),
    ("optimizer.betas=0.9", "optimizer.betas is 0.9; it must be a list, each entry a number"),
    ("optimizer.betas=[a, b]", "optimizer.betas is ['a', 'b']"),
    ("observe.tensorboard=perhaps", "it must be true or false"),
    (
        "algorithm.baseline=ppo",
        "algorithm.baseline is 'ppo'; it must be one of opo, opo_loo, group_mean, rloo",
    ),
    ("algorithm.weight=None", "it must be one of one, length, length_power, energy, energy_hidden or null"),
    ("rollout=3", "rollout is 3, but it is a section; set one of its keys, like rollout.engine"),
    ("policy.megatron=3", "policy.megatron is 3, but it is a section"),
    ("run.dir=???", "run.dir is not set; add run.dir=VALUE"),
    ("run.dir=${run.nothing}", "run.dir: "),
    ("run.dir=''", "run.dir is ''; it must be the path of a folder"),
    # ranges
    ("optimizer.lr=nan", "optimizer.lr is nan; it must be a finite number"),
    ("optimizer.lr=-.inf", "optimizer.lr is -inf; it must be a finite number"),
    ("optimizer.betas=[0.9, .nan]", "optimizer.betas.1 is nan"),
    ("policy.megatron.init_method_std=.inf", "policy.megatron.init_method_std is inf"),
    ("rollout.temperature=0", "rollout.temperature is 0.0; it must be above 0"),
    ("eval.top_p=0", "eval.top_p is 0.0; it must be above 0 and at most 1"),
    ("rollout.top_p=1.5", "rollout.top_p is 1.5; it must be above 0 and at most 1"),
    ("optimizer.betas=[0.9, 1]", "optimizer.betas is [0.9, 1.0]; it must be two numbers"),
    ("warm_start.betas=[0.9]", "warm_start.betas is [0.9]; it must be two numbers"),
    ("warm_start.min_lr_ratio=2", "warm_start.min_lr_ratio is 2.0; it must be between 0 and 1"),
    ("optimizer.clip=-1", "optimizer.clip is -1.0; it must be 0 or more"),
    ("train.steps=-1", "train.steps is -1; it must be 0 or more"),
    ("rollout.prompts_per_step=0", "rollout.prompts_per_step is 0; it must be at least 1"),
    (MODEL + "num_attention_heads=0", "policy.model.num_attention_heads is 0; it must be at least 1"),
    ("task.name=chess", "task.name is 'chess'; it must be one of lift"),
    ("resume=nowhere", "resume is 'nowhere'; it must be never, auto or the existing folder"),
    # sampling and algorithm
    (
        "rollout.top_p=0.9",
        "set it to 1, or accept off-policy rollouts with algorithm.off_policy_sampling=true",
    ),
    ("rollout.top_k=5", "rollout.top_k is 5, which samples another distribution than the policy"),
    ("rollout.max_response_tokens=2048", "policy.model.max_sequence_length=2048; lower the first"),
    ("algorithm.updates_per_batch=2", "OPO takes exactly one optimizer step per batch"),
    ("algorithm.baseline=opo_loo rollout.samples_per_prompt=1", "leave_one_out needs another sample"),
    ("algorithm.loss_constant=5", "used only with algorithm.loss_normalizer=constant"),
    # not built yet
    ("rollout.engine=sglang", "rollout.engine=sglang is not built yet; set rollout.engine to local"),
    ("on_policy.action=correct", "on_policy.action=correct is not built yet"),
    ("algorithm.baseline=energy", "algorithm.baseline=energy is not built yet"),
    ("algorithm.weight=energy_hidden", "algorithm.weight=energy_hidden is not built yet"),
    ("policy.context_parallel_size=2", "needs Transformer Engine's attention, not built yet; set 1"),
    # model and layout
    (
        MODEL + "num_attention_heads=3",
        "policy.model.hidden_size 128 is not divisible by num_attention_heads 3",
    ),
    (MODEL + "num_query_groups=3", "policy.model.num_attention_heads is 4, which is not divisible by"),
    (MODEL + "kv_channels=33", "policy.model.kv_channels is 33; it must be even"),
    (f"{MODEL}hidden_size=129 {MODEL}kv_channels=32", "policy.model.hidden_size is 129; it must be even"),
    (f"{TENSOR}=8", "policy.model.num_attention_heads is 4, which is not divisible by " + TENSOR),
    (f"{TENSOR}=4 {MODEL}num_query_groups=2", "policy.model.num_query_groups is 2, which is not divisible"),
    (f"{TENSOR}=4 {MODEL}ffn_hidden_size=354", "policy.model.ffn_hidden_size is 354, which is not divisible"),
    (f"{PIPELINE}=4", f"policy.model.num_layers is 2, which is not divisible by {PIPELINE}=4"),
    (
        f"{PIPELINE}=2 {VIRTUAL}=2",
        "is not divisible by policy.pipeline_model_parallel_size × virtual stages=4",
    ),
    (f"{VIRTUAL}=2", "there is one pipeline stage"),
    (f"{PIPELINE}=2 {VIRTUAL}=1", f"{VIRTUAL} is 1; it must be at least 2, or null"),
    ("policy.sequence_parallel=true", "needs policy.tensor_model_parallel_size above 1"),
    # experts
    (
        f"{EXPERTS}=4 policy.expert_model_parallel_size=3",
        "policy.model.num_moe_experts is 4, which is not divisible",
    ),
    ("policy.expert_model_parallel_size=2", "but the model has no experts"),
    ("policy.expert_tensor_parallel_size=2", "but the model has no experts"),
    (f"{MODEL}moe_ffn_hidden_size=64", "but the model has no experts"),
    (f"{EXPERTS}=4 {MODEL}moe_router_topk=5", "more than policy.model.num_moe_experts=4"),
    (f"{EXPERTS}=4 {TENSOR}=2", "set policy.sequence_parallel=true"),
    (
        f"{EXPERTS}=4 policy.expert_tensor_parallel_size=3",
        "policy.model.moe_ffn_hidden_size is 352, which is not",
    ),
    (
        f"{EXPERTS}=4 {TENSOR}=2 policy.sequence_parallel=true policy.expert_tensor_parallel_size=1",
        "Megatron then sums expert gradients over too few ranks; set both to the same",
    ),
    # Megatron's own fields
    (
        "policy.megatron.moe_router_pre_softmax=true",
        "could change what the policy computes without the engine knowing",
    ),
    (
        f"{MODEL}num_layers=4 {PIPELINE}=2 {VIRTUAL}=2 policy.megatron.batch_p2p_comm=true",
        "gives silently wrong gradients in Megatron, because both neighbours are one rank; set it to false",
    ),
    (
        f"{MODEL}num_layers=8 {PIPELINE}=4 {VIRTUAL}=2 policy.megatron.batch_p2p_comm=true",
        "excludes overlap_p2p_comm",
    ),
    ("policy.megatron.recompute_granularty=full", "did you mean 'policy.megatron.recompute_granularity'?"),
    ("policy.megatron.rotary_base=1", "did you mean 'policy.model.rotary_base'?"),
    ("policy.megatron.num_layers=3", "is set by the project; set policy.model.num_layers instead"),
    ("policy.megatron.bf16=true", "set policy.dtype instead"),
    ("policy.megatron={attention_dropout: 0.1}", "dropout must be 0: the engine samples without it"),
    ("policy.megatron.fp8=hybrid", "not built yet"),
    ("policy.megatron.moe_aux_loss_coeff=0.01", "the gradient holds the policy objective and nothing else"),
]


@pytest.mark.parametrize(
    ("overrides", "words"), OVERRIDE_MISTAKES, ids=[pair[0] for pair in OVERRIDE_MISTAKES]
)
def test_a_mistaken_override_is_one_line_that_names_key_value_and_remedy(capsys, recipe, overrides, words):
    # Overrides of these cases are apart by a space before the next key; values keep theirs.
    parts: list[str] = []
    for piece in overrides.split(" "):
        if parts and not piece.startswith(("policy.", "rollout.")):
            parts[-1] += " " + piece
        else:
            parts.append(piece)
    assert words in refused(capsys, "config", recipe, *parts)


FILE_MISTAKES = [
    (
        "run: {dir: x}\noptimizer: {lrr: 1}",
        "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'? (in r.yaml)",
    ),
    ("run: {dir: x}\ntrain: {steps: x}", "train.steps is 'x'; it must be an integer (in r.yaml)"),
    ("optimizer: {lr: 1}", "run.dir is not set; add run.dir="),
    ("run:\n  dir: x\n seed: 1\n", "recipe 'r.yaml' is not valid YAML, line 3"),
    ("run: {dir: x}\nrun: {dir: y}", "recipe 'r.yaml' is not valid YAML, line 2: found duplicate key run"),
    ("- run\n- dir\n", "recipe 'r.yaml' is a list, not a mapping"),
    ("17", "recipe 'r.yaml' is not a mapping"),
    ("base: [a.yaml]", "base is ['a.yaml'] in r.yaml; it must be the path of one recipe"),
    ("base: gone.yaml", "recipe 'gone.yaml', the base of 'r.yaml', does not exist; check the path"),
    ("base: r.yaml", "base: r.yaml → r.yaml is a cycle"),
    ("run: {dir: '${'}", "interpolation that cannot be read"),
    ("run: 1\n", "run is 1, but it is a section; set one of its keys, like run.dir (in r.yaml)"),
]


@pytest.mark.parametrize(("text", "words"), FILE_MISTAKES)
def test_a_mistaken_recipe_is_one_line_that_names_the_file(capsys, text, words):
    Path("r.yaml").write_text(text)
    assert words in refused(capsys, "config", "r.yaml")


def test_a_cycle_of_bases_over_folders_names_the_whole_chain(capsys):
    Path("sub").mkdir()
    Path("a.yaml").write_text("base: sub/b.yaml")
    Path("sub/b.yaml").write_text("base: ../a.yaml")
    assert "a.yaml → sub/b.yaml → sub/../a.yaml is a cycle" in refused(capsys, "config", "a.yaml")


def test_recipes_that_cannot_be_read_are_named(capsys, tmp_path):
    assert "recipe 'gone.yaml' does not exist" in refused(capsys, "config", "gone.yaml")
    assert "the recipe comes before key=value" in refused(capsys, "config", "train.steps=3")
    assert "Is a directory" in refused(capsys, "config", str(tmp_path))
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refused(capsys, "config", "binary.yaml")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: RECIPE"),
        (["train", "recipe.yaml", "--gpus", "2"], "unrecognized arguments: --gpus"),
        (["train", "recipe.yaml", "--np", "2"], "unrecognized arguments: --np"),
        (["train", "recipe.yaml", "--nproc", "two"], "'two' is not a number of ranks"),
        (["train", "recipe.yaml", "--nproc", "0"], "'0' is not a number of ranks"),
    ],
)
def test_a_mistaken_command_line_points_to_help(capsys, recipe, argv, words):
    line = refused(capsys, *argv)
    assert words in line and "--help` shows examples" in line


@pytest.mark.parametrize(
    ("nproc", "overrides", "words"),
    [
        ("3", f"{TENSOR}=2", "3 ranks cannot be split into copies of the model of 2 tensor × 1 pipeline"),
        ("3", f"{TENSOR}=2", "start a multiple of 2 ranks (--nproc 2)"),
        ("2", f"{EXPERTS}=4 policy.expert_model_parallel_size=4", "(--nproc 4)"),
    ],
)
def test_a_number_of_ranks_that_the_layout_does_not_divide_is_refused(
    capsys, recipe, nproc, overrides, words
):
    assert words in refused(capsys, "config", recipe, "--nproc", nproc, *overrides.split())


def test_train_without_ranks_enough_says_how_many_to_start(capsys, recipe, trained):
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
    assert "leave --nproc out" in refused(capsys, "train", recipe, "--nproc", "2")
    monkeypatch.setenv("WORLD_SIZE", "all")
    assert "WORLD_SIZE=all" in refused(capsys, "train", recipe)


def test_a_folder_that_holds_something_is_not_overwritten(capsys, recipe, trained, launched):
    Path("out").mkdir()
    assert main(["train", recipe]) == 0  # empty is fine
    Path("out/metrics.jsonl").write_text("")
    words = "run.dir=out is not empty; choose another run.dir, or go on with resume=auto"
    assert words in refused(capsys, "train", recipe)
    assert words in refused(capsys, "train", recipe, "--nproc", "2")
    assert main(["train", recipe, "resume=auto"]) == 0
    assert len(trained) == 2 and not launched
    assert "is a file" in refused(capsys, "train", recipe, "run.dir=recipe.yaml")


@pytest.mark.parametrize("name", [CHILD, "RANK"])
def test_only_the_first_process_asks_whether_the_folder_is_empty(monkeypatch, recipe, trained, name):
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("")
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", recipe]) == 0 and len(trained) == 1


def test_resume_auto_in_a_new_folder_is_fine(recipe, trained):
    assert main(["train", recipe, "resume=auto"]) == 0 and len(trained) == 1


def test_debug_shows_the_traceback_of_a_user_error(capsys, recipe):
    assert main(["config", recipe, "lr=1", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "did you mean 'optimizer.lr'?" in error


def test_an_interrupted_training_returns_130(monkeypatch, recipe, trained):
    def interrupt(_config: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["opo_megatron.train"], "train", interrupt)
    assert main(["train", recipe]) == 130


def test_a_bug_is_not_dressed_as_a_user_error(monkeypatch, recipe, trained):
    def fail(_config: Config) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["opo_megatron.train"], "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", recipe])


def test_help_teaches_by_example(capsys):
    for argv in (["--help"], ["train", "--help"], ["config", "-h"]):
        assert main(argv) == 0
        assert "opo train recipes/quickstart.yaml run.dir=runs/first" in capsys.readouterr().out


def test_a_mistake_under_torchrun_is_printed_with_the_number_of_the_rank(
    monkeypatch, capsys, recipe, trained
):
    def refuse(_config: Config) -> None:
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
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["rollout.prompt_per_step=3"], "unknown key 'rollout.prompt_per_step'; did you mean"),
        (["train.steps=many"], "train.steps"),
        ([f"{PIPELINE}=4"], "policy.model.num_layers is 2, which is not divisible by"),
        (["algorithm.updates_per_batch=2"], "exactly one optimizer step per batch"),
        (["run.dir=used"], "run.dir=used is not empty; choose another run.dir"),
    ],
    ids=["key", "type", "layout", "algorithm", "folder"],
)
def test_a_refused_command_is_one_line_and_exit_code_2(recipe, arguments, words):
    Path("used").mkdir()
    Path("used/metrics.jsonl").touch()
    done = command("-m", "opo_megatron", "train", recipe, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and words in done.stderr


def test_config_is_quick_and_imports_neither_torch_nor_megatron(recipe):
    code = (
        "import sys; from opo_megatron.cli import main; import opo_megatron.launch; "
        f"code = main(['config', {recipe!r}, 'policy.megatron.recompute_granularity=full']); "
        "print({'torch', 'transformers', 'megatron'} & set(sys.modules), code)"
    )
    start = time.monotonic()
    done = command("-c", code)
    assert time.monotonic() - start < 3
    assert done.stdout.splitlines()[-1] == "set() 0"


RANK_SCRIPT = """
import os, sys, types
from opo_megatron.cli import main
from opo_megatron.errors import UserError
def train(config):
    if {condition}:
        raise UserError("the reward of prompt 7 is nan")
    import time; time.sleep(30)
module = types.ModuleType("opo_megatron.train"); module.train = train
sys.modules["opo_megatron.train"] = module
sys.exit(main(sys.argv[1:]))
"""

PARENT_SCRIPT = "import sys; from opo_megatron.launch import run_ranks; sys.exit(run_ranks(sys.argv[1:], 3))"


@pytest.mark.parametrize("condition", ["True", "os.environ['RANK'] == '2'"], ids=["every rank", "one rank"])
def test_a_mistake_that_ranks_find_is_printed_exactly_once(recipe, condition):
    Path("rank.py").write_text(RANK_SCRIPT.format(condition=condition))
    done = command("-c", PARENT_SCRIPT, sys.executable, "rank.py", "train", recipe)
    assert done.returncode == 2
    assert done.stderr == "error: the reward of prompt 7 is nan\n"
