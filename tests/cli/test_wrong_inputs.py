"""Wrong inputs: one error line that names setting, value and remedy, exit code 2, no file changed.

In process through `main`; training with a model of a few thousand parameters.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opo_megatron.cli.main import main
from opo_megatron.distributed.launch import CHILD
from opo_megatron.distributed.outcome import ERROR_CLAIM, OUTCOME
from tests.support.cli_errors import refused, split
from tests.support.paths import ROOT
from tests.support.requirements import require

ROWS = "".join(json.dumps({"question": f"{i} + 1 =", "answer": str(i + 1)}) + "\n" for i in range(40))
TEXT_RECIPE = """
run: {dir: out}
task: {name: text, data: good.jsonl, max_prompt_tokens: 24, verifier: number}
policy:
  model:
    {num_layers: 1, hidden_size: 16, ffn_hidden_size: 16, num_attention_heads: 2, max_sequence_length: 64}
rollout: {prompts_per_step: 2, samples_per_prompt: 2, max_response_tokens: 4}
train: {steps: 1}
eval: {problems: 2}
observe: {tensorboard: false, kl: eval}
"""
FILES: dict[str, str | bytes] = {
    "text.yaml": TEXT_RECIPE,
    "good.jsonl": ROWS,
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "field.jsonl": ROWS + '{"questoin": "1", "answer": "1"}\n',
    "list.jsonl": ROWS + "[1]\n",
    "broken.jsonl": ROWS + "{oops\n",
    "null.jsonl": ROWS + '{"question": null, "answer": "1"}\n',
    "surrogate.jsonl": ROWS + '{"question": "\\ud800", "answer": "1"}\n',
    "no_prompt.jsonl": ROWS + '{"question": "", "answer": "1"}\n',
    "latin.jsonl": ROWS.encode() + b'{"question": "\xe9", "answer": "1"}\n',
    "broken.parquet": b"PAR1 and then nothing",
    "table.csv": "question,answer\n",
    "graders.py": (
        "def raises(prompt, response, answer): raise KeyError('oops')\n"
        "def nan(prompt, response, answer): return float('nan')\n"
        "def text(prompt, response, answer): return '1.0'\n"
        "def none(prompt, response, answer): pass\n"
        "constant = 3\n"
    ),
    "unfinished.py": "def verify(\n",
    "folder/notes.txt": "no tokenizer",
    "damaged/tokenizer.json": "{",
    "damaged/tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "notes/notes.txt": "",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with valid and invalid files of every kind."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(autouse=True)
def in_inputs_folder(monkeypatch: pytest.MonkeyPatch, inputs: Path) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "OPO_TEST_DATA", CHILD, ERROR_CLAIM, OUTCOME):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(inputs)
    yield
    shutil.rmtree(inputs / "out", ignore_errors=True)
    sys.modules.pop("graders", None)


TRAINING_ERRORS = [
    ("task.data=gone.jsonl", "the data file gone.jsonl does not exist; check task.data"),
    ("task.data=notes", "the data file notes is a folder, not a file"),
    ("task.data=table.csv", "table.csv is neither .jsonl nor .parquet; convert it"),
    ("task.data=empty.jsonl", "empty.jsonl leaves no train problem"),
    ("task.data=blank.jsonl", "blank.jsonl leaves no train problem"),
    ("task.held_out_data=empty.jsonl", "leaves no held-out problem"),
    ("task.max_prompt_tokens=2", "task.max_prompt_tokens=2 tokens (40 were longer); add problems, or raise"),
    (
        "task.data=field.jsonl",
        "row 41 has no field 'question' (it has questoin, answer); set task.prompt_field",
    ),
    ("task.answer_field=solution", "row 1 has no field 'solution' (it has question, answer); set"),
    ("task.data=list.jsonl", "row 41 has no field 'question' (it has a list)"),
    ("task.data=broken.jsonl", "broken.jsonl, line 41 is not JSON"),
    ("task.data=null.jsonl", "row 41: question is None, not text; fix or remove the row"),
    ("task.data=surrogate.jsonl", "row 41: question is '\\ud800', not text"),
    ("task.data=no_prompt.jsonl", "row 41: question is empty, not text; fix or remove the row"),
    ("task.data=latin.jsonl", "latin.jsonl is not UTF-8 text (invalid continuation byte); convert it"),
    ("task.data=broken.parquet", "broken.parquet is not a readable Parquet file"),
    ("task.answer_pattern=((", "task.answer_pattern='((' is not a regular expression"),
    ("task.answer_pattern=#### (.+)", "does not match the answer '1'; fix the pattern or the row"),
    ("task.template=nothing", "task.template is 'nothing'; it must be a text with {prompt} in it"),
    (
        "task.verifier=numbr",
        "task.verifier='numbr' is unknown; choose exact, number, regex, math, math_strict, package.module",
    ),
    ("task.verifier=regex", "needs task.verifier_pattern; give the regular expression"),
    (
        "task.verifier=regex task.verifier_pattern=((",
        "task.verifier_pattern='((' is not a regular expression",
    ),
    ("task.verifier=no.such:thing", "cannot be loaded: ModuleNotFoundError (No module named 'no'); check"),
    ("task.verifier=unfinished:verify", "cannot be loaded: SyntaxError ("),
    ("task.verifier=graders:missing", "cannot be loaded: AttributeError ("),
    (
        "task.verifier=graders:constant",
        "cannot be loaded: TypeError (constant is not a function)",
    ),
    ("task.tokenizer=Qwen/Qwen3-8B", "task.tokenizer=Qwen/Qwen3-8B is neither 'bytes' nor a folder"),
    ("task.tokenizer=folder", "task.tokenizer=folder has no tokenizer that loads"),
    ("task.tokenizer=damaged", "task.tokenizer=damaged has no tokenizer that loads"),
    ("task.chat=true", "task.chat=true needs a chat template, and bytes have none"),
    ("warm_start.steps=5", "task.name=text has no demonstrations; set warm_start.steps=0"),
    ("task.name=reasoning_gym task.generator=chain_sums", "did you mean chain_sum?"),
    (
        "task.name=reasoning_gym task.generator=chain_sum task.generator_options={digits: 3}",
        "unexpected keyword argument 'digits'); fix task.generator_options",
    ),
    ("policy.megatron.recompute_granularity=half", "Megatron-Core rejects policy.megatron="),
    ("policy.device=cuda", "set policy.device=cpu"),
    ("run.dir=good.jsonl", "run.dir=good.jsonl is a file; choose another run.dir"),
    ("run.dir=good.jsonl/runs/a", "good.jsonl is a file; choose another run.dir"),
    ("run.dir=/proc/nowhere/run", "/proc/nowhere/run cannot be written"),
    ("run.dir=notes", "run.dir=notes is not empty; choose another run.dir, or set resume=auto"),
    ("resume=gone", "resume is 'gone'; it must be never, auto or the existing folder of a checkpoint"),
    ("resume=notes", "notes is not a checkpoint of a run"),
]


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]


@pytest.mark.parametrize(("overrides", "words"), TRAINING_ERRORS, ids=[case[0] for case in TRAINING_ERRORS])
def test_wrong_training_inputs_are_refused_before_any_write(capsys, inputs, overrides, words):
    if "reasoning_gym" in overrides:
        require("reasoning_gym", "make setup-dev")
    before = files(inputs)
    assert words in refused(capsys, "train", "text.yaml", *split(overrides))
    assert files(inputs) == before


def test_the_gsm8k_recipe_without_its_data_names_the_variable(capsys):
    error = refused(capsys, "train", str(ROOT / "recipes" / "gsm8k_smoke.yaml"))
    assert "task.data: the environment variable OPO_TEST_DATA is not set; export OPO_TEST_DATA=VALUE" in error


@pytest.mark.parametrize(
    ("module", "overrides", "extra"),
    [
        ("reasoning_gym", "task.name=reasoning_gym task.generator=chain_sum", "reasoning-gym"),
        ("pyarrow.parquet", "task.data=broken.parquet", "data"),
        ("transformers", "task.tokenizer=folder", "data"),
        ("wandb", "observe.wandb_project=lift", "wandb"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(
    capsys, monkeypatch, inputs, module, overrides, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"install it with: pip install 'opo-megatron[{extra}]'" in refused(
        capsys, "train", "text.yaml", *split(overrides)
    )
    assert not (inputs / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "the verifier graders:raises raised KeyError ('oops')"),
        ("nan", "the verifier graders:nan returned nan"),
        ("text", "the verifier graders:text returned '1.0'"),
        ("none", "the verifier graders:none returned None"),
    ],
)
def test_a_verifier_without_a_finite_reward_is_named_with_its_arguments(capsys, name, words):
    error = refused(capsys, "train", "text.yaml", f"task.verifier=graders:{name}")
    assert words in error and "for the answer " in error and "it must return a " in error


def make_tokenizer(folder: Path, **settings: str) -> None:
    tokenizers, transformers = (require(name, "make setup-dev") for name in ("tokenizers", "transformers"))
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **settings).save_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "has no stop token, so responses would not end; set its eos_token"),
        ({"eos_token": "<eos>"}, "has no chat template; set false"),
        (
            {"eos_token": "<eos>", "chat_template": "{{ raise_exception('no system role') }}"},
            "the chat template of task.tokenizer rejects the message (no system role)",
        ),
    ],
    ids=["no stop token", "no template", "refusing template"],
)
def test_an_unusable_tokenizer_is_refused(capsys, tmp_path, inputs, settings, words):
    make_tokenizer(tmp_path / "tokenizer", **settings)
    overrides = (f"task.tokenizer={tmp_path / 'tokenizer'}", "task.chat=true")
    assert words in refused(capsys, "train", "text.yaml", *overrides)
    assert not (inputs / "out").exists()


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        assert main(["train", "text.yaml", f"run.dir={folder}"]) == 0
    return folder


def truncate(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda checkpoint: void((checkpoint / name).write_text(text))


def void(_: object) -> None: ...


@pytest.mark.parametrize(
    ("damage", "overrides", "words"),
    [
        (truncate, "", "step_00000001 is damaged"),
        (lambda path: (path / ".metadata").unlink(), "", "step_00000001 is damaged"),
        (write("run_state.json", '{"progress": '), "", "step_00000001 is not a checkpoint of a run"),
        (write("run_state.json", '{"progress": 3}'), "", "step_00000001 is not a checkpoint of a run"),
        (lambda path: (path / "run_state.json").unlink(), "", "is not a checkpoint of a run"),
        (
            void,
            "policy.model.hidden_size=32",
            "policy.model.hidden_size is 32 but was 16 when the checkpoint",
        ),
        (void, "policy.distributed_optimizer=false", "set policy.distributed_optimizer and expert"),
    ],
    ids=[
        "truncated",
        "no metadata",
        "partial state",
        "wrong state",
        "no state",
        "other model",
        "other optimizer",
    ],
)
def test_an_unusable_checkpoint_is_named_and_the_run_is_unchanged(
    capsys, tmp_path, trained, damage, overrides, words
):
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    damage(checkpoint)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for run_dir, resume in ((tmp_path / "run", "auto"), (tmp_path / "new", str(checkpoint))):
        argv = ("train", "text.yaml", f"run.dir={run_dir}", f"resume={resume}", *split(overrides))
        assert words in refused(capsys, *argv)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_is_not_resumed_into_another_runs_folder(capsys, tmp_path, trained):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").touch()
    argv = (f"run.dir={tmp_path / 'other'}", f"resume={trained / 'checkpoints' / 'step_00000001'}")
    assert "holds another run than the checkpoint" in refused(capsys, "train", "text.yaml", *argv)


# ---------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("largest", "overrides", "words"),
    [
        (1000, "", "out cannot be written"),
        (20000, "", "out cannot be written"),
        (20000, "observe.kl=off", "step_00000001 cannot be written"),
    ],
    ids=["config.yaml", "initial weights", "checkpoint"],
)
def test_a_full_disk_is_one_error_line_and_the_run_resumes_afterwards(
    capsys, inputs, trained, largest, overrides, words
):
    # A file size limit stands in for a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        assert words in refused(capsys, "train", "text.yaml", *split(overrides))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert main(["train", "text.yaml", "resume=auto", *split(overrides)]) == 0
    assert len((inputs / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_verifier_next_to_the_recipe_is_found_by_the_console_script(monkeypatch, inputs):
    from opo_megatron.config.schema import TaskConfig
    from opo_megatron.tasks.graders import Grader

    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(inputs))])
    Grader(TaskConfig(name="text", verifier="graders:nan", verifier_in_process=True)).start()
