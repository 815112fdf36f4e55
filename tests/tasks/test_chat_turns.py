"""Turns of chat templates: what is given is what the template writes, and a template only appends."""

from __future__ import annotations

from pathlib import Path

import pytest

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks import make_task
from opo_megatron.tasks.chat_turns import CALL, THOUGHTS, TURNS, ChatTurns
from opo_megatron.tasks.messages import message
from opo_megatron.tasks.text import TextTask
from opo_megatron.tasks.tokenizers import FolderTokenizer
from opo_megatron.tasks.tool_environment import ToolEnvironment, checked_options
from tests.support.tokenizer_folder import make_byte_tokenizer

HEADER = "<{{ m.role }}>"
PLAIN = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}" + HEADER + "{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
AS_USER = PLAIN.replace(HEADER, "{% set r = 'user' if m.role == 'tool' else m.role %}<{{ r }}>")
CHANGED = {
    "strips thoughts": (PLAIN.replace("m.content }}", "m.content.split('</think>')[-1] }}"), "<think>"),
    "adds a newline": (PLAIN.replace("<eos>\n", "\n<eos>\n"), "'\\n<eos>"),
    "other generation prompt": (PLAIN.replace("<assistant>{% e", "<assistant><think>{% e"), "<think>"),
    "trims the turn": (PLAIN.replace("m.content }}", "m.content | replace('.', '') }}"), "42."),
    "numbers messages": (PLAIN.replace(HEADER, "{{ messages | length }}" + HEADER), "<user>"),
    "drops the first": (PLAIN.replace("in messages", "in messages[-2:]"), "<user>"),
    "no stop token": (PLAIN.replace("<eos>\n", "\n"), "begins with no stop token"),
}  # fmt: skip


def turns_of(folder: Path, template: str, role: str = "tool") -> ChatTurns:
    path = make_byte_tokenizer(folder / "t", chat_template=template)
    return ChatTurns(FolderTokenizer(Path(path)), (), role)


@pytest.mark.parametrize("name", CHANGED)
def test_a_template_that_changes_what_stands_before_is_refused(tmp_path: Path, name: str) -> None:
    template, quoted = CHANGED[name]
    with pytest.raises(UserError) as error:
        turns_of(tmp_path, template).check([[message("user", "What is 6*7?")]])
    assert quoted in str(error.value) and "task.tokenizer" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [PLAIN, AS_USER])
@pytest.mark.parametrize("start", [("user",), ("system", "user"), ("user", "assistant", "user")])
def test_a_template_that_appends_is_accepted(tmp_path: Path, template: str, start: tuple[str, ...]) -> None:
    turns_of(tmp_path, template).check([[message(role, "a b") for role in start]])


@pytest.mark.parametrize("turn", [*TURNS, "", "  spaces  ", "\n"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_given_tokens_complete_the_rendered_conversation(tmp_path: Path, turn: str, is_cut: bool) -> None:
    """Prompt, sampled turns and given tokens are together the tokens of the whole conversation's text."""
    turns = turns_of(tmp_path, PLAIN)
    tokenizer = turns.tokenizer
    messages = [message("user", "6*7?")]
    sequence = tokenizer.chat(messages)
    rendered = list(messages)
    for answers in (["42"], ["a", "b"]):
        sequence += tokenizer.encode_rendered(turn) + ([] if is_cut else [0])
        sequence += turns.given(messages, None if is_cut else 0, answers)
        rendered += [message("assistant", turn), *(message("tool", one) for one in answers)]
    assert tokenizer.raw_text(sequence) == tokenizer.render(rendered)
    assert sequence == tokenizer.chat(rendered)


def task_of(folder: Path, template: str = PLAIN, **options: object) -> tuple[TextTask, TaskConfig]:
    path = make_byte_tokenizer(folder / "t", chat_template=template)
    rows = "".join(f'{{"question": "What is {i}*7?", "answer": "{7 * i}"}}\n' for i in range(40))
    (folder / "d.jsonl").write_text(rows)
    config = TaskConfig(
        name="text", data=str(folder / "d.jsonl"), tokenizer=path, chat=True, verifier="number",
        environment="tools", environment_options=dict(options),
    )  # fmt: skip
    task = make_task(config)
    assert isinstance(task, TextTask)
    return task, config


def test_prompts_tell_of_the_tools_and_calls_are_answered_in_tokens(tmp_path: Path) -> None:
    task, config = task_of(tmp_path)
    prompt = task.prompt("train", 3)
    environment = ToolEnvironment(config)
    assert task.raw_text(list(prompt.tokens)).startswith("[calculator]<user>What is")
    assert environment.start(prompt) == prompt.tokens
    environment.check([prompt])
    turn = [*task.tokenizer.encode(THOUGHTS + CALL), 0]
    given = environment.respond(turn)
    assert given is not None
    assert task.raw_text(list(given)) == "\n<tool>42<eos>\n<assistant>"
    two = environment.respond([*task.tokenizer.encode(CALL + '<tool_call>{"name": 1}</tool_call>'), 0])
    assert two is not None
    text = task.raw_text(list(two))
    assert text == '\n<tool>42<eos>\n<tool>Error: the call has no "name"<eos>\n<assistant>'
    assert environment.respond([*task.tokenizer.encode("It is 42."), 0]) is None
    assert environment.reward() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool": []}, "has only tools, lookup_file"),
        ({"tools": "calculator"}, "must be a list of tools"),
        ({"tools": []}, "must be a list of tools, at least one"),
        ({"python_seconds": 0}, "must be a number above 0"),
        ({"longest_answer": 1.5}, "must be a whole number above 0"),
        ({"longest_answer": True}, "must be a whole number above 0"),
        ({"answer_role": ""}, "must be a text"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as error:
        checked_options(options)
    assert words in str(error.value) and next(iter(options)) in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": ["search"]}, "it must be calculator, python, lookup, or a function"),
        ({"tools": ["lookup"]}, "needs task.environment_options.lookup_file"),
        ({"tools": ["lookup"], "lookup_file": "nowhere.jsonl"}, "cannot be read"),
        ({"tools": ["no_module:function"]}, "cannot be loaded"),
        ({"tools": ["os.path:join"]}, "of the tool join has no type"),
    ],
)
def test_tools_that_there_are_not_are_named(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        task_of(tmp_path, **options)
