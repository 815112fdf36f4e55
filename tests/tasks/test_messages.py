"""Prompts that are lists of messages, from JSONL and from Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  transformers, imported before torch, would have no models in this process

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.fields import RowError
from opo_megatron.tasks.messages import find_messages, text_of_messages
from opo_megatron.tasks.text import TextTask
from tests.support.requirements import require
from tests.support.tokenizer_folder import make_byte_tokenizer, make_tokenizer

SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "What is 2?"), ("assistant", "It is 2."))
)
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer whose prompts decode to what the template rendered."""
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as JSONL or Parquet, by the name."""
    if path.suffix == ".parquet":
        arrow, parquet = require("pyarrow", "make setup-dev"), require("pyarrow.parquet", "make setup-dev")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_of(path: str, **settings: Any) -> TextTask:
    usual = {"held_out_data": path, "chat": True, "prompt_field": "prompt"}
    return TextTask(TaskConfig(name="text", **(usual | settings)))


def rendered(task: TextTask, index: int = 0) -> str:
    return task.decode(list(task.prompt("held_out", index).tokens))


PROMPTS: list[tuple[Any, str, str]] = [
    ([USER], "[user] What is 2?\n[assistant]", "What is 2?"),
    (
        [SYSTEM, USER],
        "[system] Be brief.\n[user] What is 2?\n[assistant]",
        "system: Be brief.\n\nuser: What is 2?",
    ),
    (
        [USER, ASSISTANT, USER],
        "[user] What is 2?\n[assistant] It is 2.\n[user] What is 2?\n[assistant]",
        "user: What is 2?\n\nassistant: It is 2.\n\nuser: What is 2?",
    ),
    (
        [{"role": "system", "content": ""}, USER],
        "[system] \n[user] What is 2?\n[assistant]",
        "system: \n\nuser: What is 2?",
    ),
    ([{**USER, "name": None}], "[user] What is 2?\n[assistant]", "What is 2?"),
    (json.dumps([USER]), "[user] What is 2?\n[assistant]", "What is 2?"),
    ("What is 2?", "[user] What is 2?\n[assistant]", "What is 2?"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is 2?"}]}],
        "[user] What is 2?\n[assistant]",
        "What is 2?",
    ),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("prompt", "expected", "text"), PROMPTS)
def test_messages_are_rendered_by_the_chat_template(
    tmp_path: Path, tokenizer: str, suffix: str, prompt: Any, expected: str, text: str
) -> None:
    path = write(tmp_path / f"d{suffix}", [{"prompt": prompt, "answer": "2"}])
    task = task_of(path, tokenizer=tokenizer)
    assert rendered(task) == expected
    assert task.prompt("held_out", 0).text == text


def test_the_template_surrounds_the_last_message(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": [USER, ASSISTANT, USER], "answer": "2"}])
    task = task_of(path, tokenizer=tokenizer, template="Q: {prompt} A:")
    expected = "[user] What is 2?\n[assistant] It is 2.\n[user] Q: What is 2? A:\n[assistant]"
    assert rendered(task) == expected


def test_the_recipes_system_prompt_comes_first(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": [USER], "answer": "2"}, {"prompt": "hi", "answer": "2"}])
    task = task_of(path, tokenizer=tokenizer, system_prompt="Think.")
    assert rendered(task, 0) == "[system] Think.\n[user] What is 2?\n[assistant]"
    assert rendered(task, 1) == "[system] Think.\n[user] hi\n[assistant]"


def test_a_text_and_its_only_message_are_one_problem_of_one_split(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"What is {i}?" for i in range(60)]
    splits = []
    for name, prompts in (
        ("text.jsonl", texts),
        ("list.jsonl", [[{"role": "user", "content": text}] for text in texts]),
    ):
        path = write(tmp_path / name, [{"prompt": prompt, "answer": "2"} for prompt in prompts])
        task = task_of(path, tokenizer=tokenizer, data=path, held_out_data=None)
        splits.append([task.prompt("held_out", i) for i in range(task.size("held_out"))])
    assert splits[0] == splits[1] and 0 < len(splits[0]) < 30


def test_further_fields_of_a_message_reach_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['name'] }} {{ m['content'] }} {% endfor %}"
    folder = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=template)
    path = write(tmp_path / "d.jsonl", [{"prompt": [{**USER, "name": "3"}], "answer": "2"}])
    assert rendered(task_of(path, tokenizer=folder)).split()[0] == "3"


IMAGE = {"type": "image_url", "image_url": "x.png"}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([USER, ASSISTANT], "prompt ends with a message of the assistant, but the policy responds to a user"),
        ([SYSTEM], "prompt ends with a message of the system, but the policy responds to a user"),
        ([USER, SYSTEM, USER], "prompt has a system message after the first message; put it first"),
        ([{"role": "human", "content": "2"}], "message 1 has the role 'human'; use system, user, assistant"),
        ([USER, {"role": "tool", "content": "2"}, USER], "message 2 has the role 'tool'; use system, user"),
        ([{"role": None, "content": "2"}], "message 1 has the role None; use system, user, assistant"),
        ([{"from": "human", "value": "2"}], "message 1 is a mapping with from, value, without role and con"),
        ([USER, "What is 2?"], "message 2 is 'What is 2?', without role and content"),
        ([{"role": "user", "content": " "}], "message 1 is empty; fix or remove the row"),
        ([{"role": "user", "content": None}], "message 1 has None, not text"),
        ([{"role": "user", "content": [IMAGE]}], "message 1 has a part of type 'image_url', not text"),
        ([{"role": "user", "content": []}], "message 1 is empty; fix or remove the row"),
    ],
)
def test_messages_that_lead_to_no_response_are_refused_by_their_number(prompt: Any, words: str) -> None:
    with pytest.raises(RowError) as error:
        find_messages("d.jsonl, row 7", "prompt", prompt)
    assert str(error.value).startswith("d.jsonl, row 7: prompt") and words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "prompt", "words"),
    [
        (
            {"chat": False},
            [USER],
            "row 1: prompt is a list of messages, which needs a chat template; set task.",
        ),
        ({"chat": False}, json.dumps([USER]), "name one text with task.prompt_field=prompt.0.content"),
        (
            {"system_prompt": "Think."},
            [SYSTEM, USER],
            "row 1: prompt has a system message, and task.system_prompt is set, too; set task.system_prompt=",
        ),
        ({}, [], "row 1: prompt is a list of 0, not text; fix or remove the row"),
        ({}, ["What is 2?"], "name one of its entries, like task.prompt_field=prompt.0"),
        ({}, {"role": "user"}, "row 1: prompt is a mapping with role, not text"),
        ({}, " ", "row 1: prompt is white space alone, not text"),
    ],
)
def test_a_prompt_that_the_settings_do_not_read_is_refused_with_its_row(
    tmp_path: Path, tokenizer: str, settings: dict, prompt: Any, words: str
) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": prompt, "answer": "2"}])
    with pytest.raises(UserError) as error:
        task_of(path, tokenizer=tokenizer, **settings)
    assert words in str(error.value)


def test_one_message_of_a_list_can_be_the_prompt_without_chat(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "d.parquet", [{"prompt": [SYSTEM, USER], "answer": "2"}])
    task = task_of(path, tokenizer=tokenizer, chat=False, prompt_field="prompt.1.content")
    assert rendered(task) == "What is 2?"


def test_a_problem_about_messages_is_a_text() -> None:
    for text in ('[{"role": 3', '["role"]', 'What does [{"role": "user"}] mean?', '[1, "role"]'):
        assert find_messages("", "", text) is None
    assert text_of_messages([USER]) == "What is 2?"
