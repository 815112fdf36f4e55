"""A response ends at every token that the model's folder names as an end, and at no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opo_megatron.batch.rollouts import FINISH_STOP, Rollouts
from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.errors import UserError
from opo_megatron.evaluation.evaluate import evaluation_sampling
from opo_megatron.rollout.requests import training_sampling
from opo_megatron.rollout.sglang.replies import sampling_params
from opo_megatron.tasks import make_task
from opo_megatron.tasks.tokenizers import FolderTokenizer
from tests.support.fixtures import RECIPE, SMALL_MODEL
from tests.support.tokenizer_folder import make_tokenizer

GENERATION, CONFIG = "generation_config.json", "config.json"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Folders of a tokenizer of 17 tokens, by its eos_token; `<eos>` is 1."""
    folders = {eos: tmp_path_factory.mktemp("tokenizer") for eos in ("<eos>", None)}
    for eos, folder in folders.items():
        make_tokenizer(folder, **({"eos_token": eos} if eos else {}))
    return folders


def model_folder(folder: Path, tokenizer: Path, **files: Any) -> Path:
    """The tokenizer's folder with `generation` and `config` as the files of a model beside it."""
    folder.mkdir()
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, file in (("generation", GENERATION), ("config", CONFIG)):
        if name in files:
            content = files[name]
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "eos", "expected"),
    [
        ({}, "<eos>", (1,)),
        ({"generation": {"eos_token_id": [5, 1]}}, "<eos>", (5, 1)),
        ({"generation": {"eos_token_id": 5}}, "<eos>", (5, 1)),
        ({"config": {"eos_token_id": 4}}, "<eos>", (4, 1)),
        ({"config": {"eos_token_id": [4, 3, 4]}}, "<eos>", (4, 3, 1)),
        ({"config": {"text_config": {"eos_token_id": [6]}}}, "<eos>", (6, 1)),
        ({"config": {"eos_token_id": 2, "text_config": {"eos_token_id": 6}}}, "<eos>", (2, 6, 1)),
        (
            {"generation": {"eos_token_id": [9, 4]}, "config": {"eos_token_id": 4, "text_config": {}}},
            "<eos>",
            (9, 4, 1),
        ),
        ({"generation": {}, "config": {"eos_token_id": None, "text_config": None}}, "<eos>", (1,)),
        ({"generation": {"eos_token_id": 0}}, None, (0,)),
        ({"config": {"eos_token_id": 16}}, None, (16,)),
    ],
)
def test_all_stop_tokens_of_a_folder_are_united_in_order(
    tmp_path: Path, tokenizers: dict, files: dict, eos: str | None, expected: tuple[int, ...]
) -> None:
    assert FolderTokenizer(model_folder(tmp_path / "m", tokenizers[eos], **files)).stop_tokens == expected


@pytest.mark.parametrize("place", ["generation", "config", "text_config"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("</s>", '"</s>" is not the id of a token; write whole numbers, 0 or more'),
        ("1", '"1" is not the id'),
        ([1, None], "[1, null], and null is not the id"),
        (1.0, "1.0 is not the id"),
        (True, "true is not the id"),
        (-1, "-1 is not the id"),
        ([[1]], "[1] is not the id"),
        ({"a": 1}, '{"a": 1} is not the id'),
        (17, "17 is beyond the tokenizer's vocabulary of 17 tokens; correct it there"),
        ([1, 128009], "128009 is beyond the tokenizer's vocabulary"),
    ],
)
def test_what_is_no_token_is_one_sentence(
    tmp_path: Path, tokenizers: dict, place: str, value: Any, words: str
) -> None:
    content = {"eos_token_id": value}
    files: dict[str, Any] = {place: content}
    if place == "text_config":
        files = {"config": {"text_config": content}}
    folder = model_folder(tmp_path / "m", tokenizers["<eos>"], **files)
    with pytest.raises(UserError) as error:
        FolderTokenizer(folder)
    message = str(error.value)
    key = "text_config.eos_token_id" if place == "text_config" else " eos_token_id"
    file = GENERATION if place == "generation" else CONFIG
    assert words in message and key in message and str(folder / file) in message and "\n" not in message


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"eos"', "null"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, tokenizers: dict, content: str) -> None:
    folder = model_folder(tmp_path / "m", tokenizers["<eos>"], generation=content)
    with pytest.raises(UserError, match=f"{GENERATION} may name stop tokens, but is not (a )?JSON"):
        FolderTokenizer(folder)


def test_a_folder_without_any_is_one_sentence(tmp_path: Path, tokenizers: dict) -> None:
    with pytest.raises(UserError, match="has no stop token, so responses would not end; set its eos_token"):
        FolderTokenizer(model_folder(tmp_path / "m", tokenizers[None], generation={"eos_token_id": None}))


def test_a_stop_token_that_is_a_word_is_not_part_of_the_response(tmp_path: Path, tokenizers: dict) -> None:
    tokenizer = FolderTokenizer(model_folder(tmp_path / "m", tokenizers["<eos>"], config={"eos_token_id": 5}))
    assert [tokenizer.decode(tokens) for tokens in ([2, 3, 5], [2, 3, 1], [2, 3], [5], [])] == [
        "What is", "What is", "What is", "", "",
    ]  # fmt: skip


def test_runs_and_evaluations_show_and_use_all_of_them(
    tmp_path: Path, tokenizers: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"generation": {"eos_token_id": [6, 5]}, "config": {"eos_token_id": 1}}
    folder = model_folder(tmp_path / "m", tokenizers["<eos>"], **files)
    rows = [{"question": f"What is {i}", "answer": str(i)} for i in range(10)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        str(RECIPE), "run.dir=run", *SMALL_MODEL, "task.name=text", "task.data=p.jsonl",
        "task.held_out_data=p.jsonl", f"task.tokenizer={folder}", "task.max_prompt_tokens=8",
        "warm_start.steps=0", "train.steps=1", "observe.kl=off",
    ]  # fmt: skip
    shown = "6 'user', 5 '?', 1 '<eos>'\n"
    assert main(["data", *settings, "--rows", "0"]) == 0
    assert f"stop at    {shown}" in capsys.readouterr().out
    assert main(["train", *settings]) == 0
    assert f"a response ends at {shown}" in capsys.readouterr().out
    rollouts = Rollouts.load(Path("run/rollouts/step_00000001.safetensors"))
    pairs = list(zip(rollouts.responses(), rollouts.finish_reasons.tolist(), strict=True))
    assert {response[-1] for response, reason in pairs if reason == FINISH_STOP} == {6, 5, 1}
    assert not any(token in (6, 5, 1) for response, reason in pairs for token in response[:-1])
    assert main(["eval", "run"]) == 0
    assert f"a response ends at {shown}" in capsys.readouterr().out
    config = load_config("run/config.yaml")
    task = make_task(config.task)
    for sampling in (training_sampling(config, task, step=1), evaluation_sampling(config, task)):
        assert sampling_params(sampling)["stop_token_ids"] == [6, 5, 1]
