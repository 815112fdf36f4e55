"""Prompts in the tokens that the model knows: BOS where its tokenizer begins with it, once, and no EOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  transformers, imported before torch, would have no models in this process

from opo_megatron.cli.calibration import file_prompts
from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.messages import message
from opo_megatron.tasks.text import TextTask, prompt_tokens
from opo_megatron.tasks.tokenizers import ByteTokenizer, FolderTokenizer
from tests.support.tokenizer_folder import make_byte_tokenizer, make_tokenizer

WORDS = ("<unk>", "<eos>", "<bos>", "<sop>", "What", "is", "2", "?", "user")
EOS, BOS, SOP, WHAT, IS, TWO, QUESTION = range(1, 8)
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}?"
BOS_CHAT = "{{ bos_token }}" + CHAT


def tokenizer_of(folder: Path, surround: str | None, **settings: Any) -> FolderTokenizer:
    settings = {"bos_token": "<bos>", "eos_token": "<eos>"} | settings
    special = {"additional_special_tokens": ["<sop>"]} if surround and "<sop>" in surround else {}
    return FolderTokenizer(Path(make_tokenizer(folder / "t", WORDS, surround, **settings, **special)))


TEXT = [WHAT, IS, TWO]


@pytest.mark.parametrize(
    ("surround", "text", "tokens"),
    [
        ("<bos> $A", "What is 2", [BOS, *TEXT]),
        ("<bos> $A <eos>", "What is 2", [BOS, *TEXT]),
        ("$A <eos>", "What is 2", TEXT),
        (None, "What is 2", TEXT),
        ("<bos> <sop> $A", "What is 2", [BOS, SOP, *TEXT]),
        ("<bos> $A", "<bos>What is 2", [BOS, *TEXT]),
        ("<bos> $A", "<bos> What is 2", [BOS, *TEXT]),
        ("<bos> $A <eos>", "<bos>What is 2", [BOS, *TEXT]),
        (None, "<bos>What is 2", [BOS, *TEXT]),
        ("<bos> <sop> $A", "<bos><sop>What is 2", [BOS, SOP, *TEXT]),
        ("<bos> $A", "What <bos> is", [BOS, WHAT, BOS, IS]),
        ("<bos> $A", "What is 2 <eos>", [BOS, *TEXT, EOS]),
        ("<bos> $A <eos>", "", []),
        (None, "", []),
    ],
)
def test_a_prompt_begins_as_the_models_texts_do_once_and_does_not_end(
    tmp_path: Path, surround: str | None, text: str, tokens: list[int]
) -> None:
    tokenizer = tokenizer_of(tmp_path, surround)
    assert tokenizer.encode(text) == tokens
    if "<bos>" not in text and text:  # transformers itself, without its end
        theirs = list(tokenizer._tokenizer(text).input_ids)
        assert tokenizer.encode(text) == (theirs[:-1] if surround and "<eos>" in surround else theirs)


@pytest.mark.parametrize("settings", [{"bos_token": None}, {"bos_token": "<bos>"}, {"bos_token": "<eos>"}])
def test_a_bos_token_that_is_only_defined_is_not_written(tmp_path: Path, settings: dict) -> None:
    assert tokenizer_of(tmp_path, None, **settings).encode("What is 2") == TEXT


@pytest.mark.parametrize(
    ("surround", "template", "tokens"),
    [
        ("<bos> $A", BOS_CHAT, [BOS, 8, *TEXT, QUESTION]),
        ("<bos> $A <eos>", BOS_CHAT, [BOS, 8, *TEXT, QUESTION]),
        (None, BOS_CHAT, [BOS, 8, *TEXT, QUESTION]),
        ("<bos> $A", CHAT, [8, *TEXT, QUESTION]),
        ("$A <eos>", CHAT, [8, *TEXT, QUESTION]),
        (None, CHAT, [8, *TEXT, QUESTION]),
    ],
)
def test_a_chat_has_the_special_tokens_of_its_template_and_no_others(
    tmp_path: Path, surround: str | None, template: str, tokens: list[int]
) -> None:
    tokenizer = tokenizer_of(tmp_path, surround, chat_template=template)
    messages = [message("user", "What is 2")]
    assert tokenizer.chat(messages) == tokens
    theirs = tokenizer._tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert tokenizer.chat(messages) == list(theirs["input_ids"])


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, [BOS, *TEXT]),
        ({"template": "{prompt} ?"}, [BOS, *TEXT, QUESTION]),
        ({"template": "<bos> {prompt} ?"}, [BOS, *TEXT, QUESTION]),
        ({"chat": True}, [BOS, 8, *TEXT, QUESTION]),
        ({"chat": True, "template": "{prompt} ?"}, [BOS, 8, *TEXT, QUESTION, QUESTION]),
    ],
)
def test_a_recipes_template_does_not_change_how_a_prompt_begins(
    tmp_path: Path, settings: dict, tokens: list[int]
) -> None:
    tokenizer = tokenizer_of(tmp_path, "<bos> $A <eos>", chat_template=BOS_CHAT)
    assert prompt_tokens(tokenizer, TaskConfig(**settings), "What is 2") == tokens


def test_problems_for_training_and_evaluation_begin_with_bos(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "t", WORDS, "<bos> $A <eos>", bos_token="<bos>", eos_token="<eos>")
    rows = [json.dumps({"question": f"What is {i}", "answer": "2"}) for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    for settings in ({"data": str(tmp_path / "d.jsonl")}, {"held_out_data": str(tmp_path / "d.jsonl")}):
        task = TextTask(TaskConfig(name="text", tokenizer=folder, **settings))
        prompts = [task.prompt(split, i) for split in ("train", "held_out") for i in range(task.size(split))]
        assert len(prompts) == 30
        assert all(prompt.tokens[:2] == (BOS, WHAT) and EOS not in prompt.tokens for prompt in prompts)


def test_calibration_texts_begin_with_bos_and_do_not_end(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "t", WORDS, "<bos> $A <eos>", bos_token="<bos>", eos_token="<eos>")
    (tmp_path / "texts.txt").write_text("What is 2\n<bos>What is\n")
    assert file_prompts(tmp_path / "texts.txt", [Path(folder)], 8) == [[BOS, *TEXT], [BOS, WHAT, IS]]


def test_bytes_have_no_token_before_a_prompt() -> None:
    assert ByteTokenizer().encode("a") == [97]
    assert ByteTokenizer().raw_text([97, 256]) == "a<stop>"


@pytest.mark.parametrize("surround", ["<bos> $A", "<bos> $A <eos>", "$A <eos>", "$A"])
def test_a_byte_level_bpe_begins_as_its_own_texts_do(tmp_path: Path, surround: str) -> None:
    tokenizer = FolderTokenizer(Path(make_byte_tokenizer(tmp_path / "t", surround)))
    opening = "<bos>" if surround.startswith("<bos>") else ""
    for text in ("What is 2 + 2? ", " leading", "数 é\n"):
        assert tokenizer.raw_text(tokenizer.encode(text)) == opening + text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) == bool(opening) + len(text.encode())
