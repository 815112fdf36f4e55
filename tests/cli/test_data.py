"""`opo data`: what it shows is what training reads, and its numbers are counted by hand here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  transformers, imported before torch, would have no models in this process

from opo_megatron.cli.main import main
from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.text import TextTask
from tests.support.cli_errors import refused
from tests.support.paths import ROOT
from tests.support.requirements import require
from tests.support.tokenizer_folder import make_byte_tokenizer

RECIPE = """
run: {dir: out}
task: {name: text, data: train.jsonl, held_out_data: test.jsonl, max_prompt_tokens: 24, verifier: number}
policy:
  model: {num_layers: 1, hidden_size: 16, ffn_hidden_size: 16, num_attention_heads: 2}
rollout: {max_response_tokens: 4}
"""
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"


def rows_of(*pairs: tuple[str, Any]) -> str:
    return "".join(json.dumps({"question": prompt, "answer": answer}) + "\n" for prompt, answer in pairs)


TRAIN = [(f"{i} + 1 =", str(i + 1)) for i in range(12)]
TEST = [(f"{i} + 2 =", str(i + 2)) for i in range(5)]


@pytest.fixture(autouse=True)
def in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("train.jsonl").write_text(rows_of(*TRAIN))
    Path("test.jsonl").write_text(rows_of(*TEST))


def shown(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(["data", *argv]) == code
    return capsys.readouterr().out


def numbers(output: str, split: str) -> list[int]:
    """problems, too long, repeated, then percentiles, of a line of the table."""
    line = next(line for line in output.splitlines() if re.match(rf" *{split}  +\d", line))
    return [int(part.replace(",", "")) for part in line.split()[1:]]


def test_prompts_tokens_and_answers_are_those_of_training(capsys, tmp_path):
    folder = make_byte_tokenizer(tmp_path / "t", "<bos> $A <eos>", chat_template=CHAT)
    for overrides in ([], ["task.chat=true", "task.max_prompt_tokens=40"], ["task.template=Q {prompt}"]):
        settings = [f"task.tokenizer={folder}", *overrides]
        output = shown(capsys, "r.yaml", *settings, "--rows", "2")
        changes = dict(setting.removeprefix("task.").split("=", 1) for setting in settings)
        config = TaskConfig(name="text", data="train.jsonl", held_out_data="test.jsonl", **changes)
        config.chat, config.max_prompt_tokens = config.chat == "true", int(config.max_prompt_tokens)
        task = TextTask(config)
        for split, name, size in (("train", "training", 12), ("held_out", "held-out", 5)):
            for index in range(2):
                prompt = task.prompt(split, index)
                block = output.split(f"{name} problem {index + 1} of {size}, ")[1].split("\n\n")[0]
                assert block.startswith(f"{len(prompt.tokens)} tokens\n")
                text = task.raw_text(list(prompt.tokens))
                assert f"  prompt   {text}\n".replace("\n<", "\n           <") in block
                ids = re.findall(r"(\d+) '", next(x for x in block.split("\n") if "  tokens   " in x))
                shown_ids = [int(token) for token in ids]
                assert shown_ids == [*prompt.tokens[:24], *prompt.tokens[max(24, len(prompt.tokens) - 8) :]]
                assert block.endswith(f"  answer   {prompt.answer}")
        assert "stop at    0 '<eos>'" in output
        assert f"tokenizer  {folder}, 258 tokens" in output


@pytest.mark.parametrize(
    ("train", "overrides", "training", "remark"),
    [
        (TRAIN, "", [12, 0, 0, 7, 7, 8, 8, 8], None),
        ([*TRAIN, ("long " * 6, "1")], "", [12, 1, 0], "task.max_prompt_tokens=24; the longest has 30"),
        ([*TRAIN, TRAIN[0], TRAIN[0], TRAIN[3]], "", [15, 0, 3], None),
        (
            [*TRAIN, (TRAIN[0][0], "7")],
            "",
            [13, 0, 1],
            "repeated problems with another answer than the first of them: 1",
        ),
        (
            [*TRAIN, TEST[0], TEST[1], TEST[1]],
            "",
            [15, 0, 1],
            "prompts of training that are also held out: 2; remove them",
        ),
        (
            [*TRAIN, ("who?", "Ann"), ("when?", "at noon")],
            "",
            [14, 0, 0],
            "answers with nothing that task.verifier=number could compare: 2; no response to them is ever",
        ),
        ([*TRAIN, ("who?", "Ann")], "task.verifier=exact", [13, 0, 0], None),
        (TRAIN, "task.max_prompt_tokens=7", [10, 2, 0, 7, 7, 7, 7, 7], "the longest has 8"),
    ],
)
def test_problems_are_counted(capsys, train, overrides, training, remark):
    Path("train.jsonl").write_text(rows_of(*train))
    output = shown(capsys, "r.yaml", *overrides.split(), "--rows", "0")
    assert numbers(output, "training")[: len(training)] == training
    assert numbers(output, "held-out") == [5, 0, 0, 7, 7, 7, 7, 7]
    after = re.split(r" *held-out +5.*\n", output)[1].strip()
    assert remark in after if remark else not after


def test_an_answer_is_shown_as_the_verifier_compares_it(capsys):
    Path("train.jsonl").write_text(rows_of(("a?", "It is 1,234.50"), ("b?", "none"), ("c?", 0.00001)))
    output = shown(capsys, "r.yaml")
    assert "answer   It is 1,234.50  (compared as 1234.50)\n" in output
    assert "answer   none  (nothing that task.verifier=number could compare)\n" in output
    assert "answer   0.00001\n" in output
    output = shown(capsys, "r.yaml", "task.verifier=exact")
    assert "answer   It is 1,234.50\n" in output


def test_one_row_in_ten_is_held_out_and_said_so(capsys):
    Path("train.jsonl").write_text(rows_of(*((f"{i} + 1 =", str(i + 1)) for i in range(200))))
    output = shown(capsys, "r.yaml", "task.held_out_data=null")
    assert "held out   one row in ten of train.jsonl, by a hash of its prompt" in output
    training, held_out = numbers(output, "training")[0], numbers(output, "held-out")[0]
    assert training + held_out == 200 and 5 < held_out < 40
    assert f"training problem 3 of {training}" in output and f"held-out problem 3 of {held_out}" in output


def test_every_refused_row_is_counted_and_the_others_are_shown(capsys):
    rows = [*TRAIN[:5], ("x", None), *TRAIN[5:], ("", "1"), ("y", " ")]
    Path("train.jsonl").write_text(rows_of(*rows))
    assert main(["data", "r.yaml"]) == 2
    captured = capsys.readouterr()
    assert numbers(captured.out, "training")[0] == 12
    assert captured.err == (
        "error: 3 rows are refused, the first because train.jsonl, row 6: answer is None, not text; fix or "
        "remove the row\n"
    )
    for reason in (
        "row 6: answer is None",
        "row 14: question is empty",
        "row 15: answer is white space alone",
    ):
        assert f"train.jsonl, {reason}" in captured.out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("task.data=gone.jsonl", "the data file gone.jsonl does not exist; check task.data"),
        (
            "task.answer_field=solution",
            "17 rows are refused, the first because train.jsonl, row 1 has no field",
        ),
        (
            "task.max_prompt_tokens=2",
            "train.jsonl leaves no train problem of at most task.max_prompt_tokens=2",
        ),
        ("task.chat=true", "task.chat=true needs a chat template, and bytes have none"),
        ("task.tokenizer=gone", "task.tokenizer=gone is neither 'bytes' nor a folder"),
        ("task.verifier=numbr", "task.verifier='numbr' is unknown; choose exact, number"),
        ("task.answer_pattern=((", "task.answer_pattern='((' is not a regular expression"),
        ("task.max_prompt_tokens=0", "task.max_prompt_tokens is 0; it must be at least 1"),
        ("task.dat=x", "unknown key 'task.dat'; did you mean 'task.data'?"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, overrides, words):
    assert words in refused(capsys, "data", "r.yaml", *overrides.split())


@pytest.mark.parametrize("rows", ["-1", "two", "1.5"])
def test_a_number_of_rows_is_a_whole_number(capsys, rows):
    assert f"'{rows}' is not a number of rows, 0 or more" in refused(
        capsys, "data", "r.yaml", f"--rows={rows}"
    )


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("[red]2[/red] [bold", "[red]2[/red] [bold"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x07", "a\\rb\\x07"),
        (":smile: 数 é", ":smile: 数 é"),
        ("two\nlines", "two\n           lines"),
    ],
)
def test_a_prompt_is_printed_as_it_is_and_does_not_change_the_terminal(capsys, prompt, line):
    Path("train.jsonl").write_text(rows_of((prompt, "1")))
    assert f"  prompt   {line}\n" in shown(capsys, "r.yaml", "--rows", "1")


@pytest.mark.slow
def test_the_quickstarts_task_has_its_own_symbols(capsys):
    output = shown(capsys, str(ROOT / "recipes" / "quickstart.yaml"), "--rows", "1")
    assert "task       lift\nstop at    0 '$'\n" in output
    assert "tokens   7 '0', 3 '+', 8 '1'," in output
    assert numbers(output, "training")[0] + numbers(output, "held-out")[0] == 327_680


def test_generated_problems_are_shown_and_counted(capsys):
    require("reasoning_gym", "make setup-dev")
    settings = (
        "task.name=reasoning_gym task.generator=chain_sum task.generator_size=60 task.max_prompt_tokens=70"
    )
    output = shown(capsys, "r.yaml", *settings.split(), "--rows", "1")
    assert "generator  chain_sum" in output and "training problem 1 of" in output
    for split in ("training", "held-out"):
        kept, dropped = numbers(output, split)[:2]
        assert kept + dropped == 60 and dropped > 0


def test_neither_torch_nor_a_model_is_needed(tmp_path):
    folder = make_byte_tokenizer(tmp_path / "t", chat_template=CHAT)
    code = (
        "import sys; from opo_megatron.cli.main import main; "
        f"code = main(['data', 'r.yaml', 'task.tokenizer={folder}', 'task.max_prompt_tokens=40']); "
        "print({'torch', 'megatron'} & set(sys.modules), code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set() 0" and result.stderr == ""
