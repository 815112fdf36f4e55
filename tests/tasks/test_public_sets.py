"""The lines of docs/tasks.md for public sets of problems read rows of the same shape, and grade responses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch  # noqa: F401  transformers, imported before torch, would have no models in this process

from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.benchmarks import find_benchmarks
from opo_megatron.tasks.text import TextTask
from tests.support.paths import ROOT
from tests.support.requirements import require
from tests.support.tokenizer_folder import make_byte_tokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"
BOX = " Put the final answer within \\boxed{}."
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 17 + 17?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


class PublicSet(NamedTuple):
    """A row of the shape that a set has, and what it is to give."""

    row: dict[str, Any]
    prompt: str
    answer: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def messages(text: str) -> list[dict[str, str]]:
    return [{"content": text, "role": "user"}]


SETS = {
    "BytedTsinghua-SIA/DAPO-Math-17k": PublicSet(
        {
            "data_source": "math_dapo",
            "prompt": messages(DAPO),
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        f"<user> {DAPO}\n<assistant>",
        "34",
        (
            "17 + 17 = 34.\nAnswer: 34",
            "Answer: 3\nNo.\n\n**Answer: $34$**\n",
            "Answer:\n34.",
            "Answer: 34\n\n",
        ),
        ("34", "Answer: 35", "Answer: -34", "Answer: −34", "Answer: 34\nAnswer: 3 or 34", "\\boxed{34}"),
    ),
    "open-r1/DAPO-Math-17k-Processed": PublicSet(
        {"prompt": "What is 17 + 17?", "solution": "34", "data_source": "math_dapo", "ability": "MATH"},
        f"What is 17 + 17?{BOX}",
        "34",
        ("\\boxed{34}",),
        ("\\boxed{-34}", "Answer: 34"),
    ),
    "Skywork/Skywork-OR1-RL-Data": PublicSet(
        {
            "data_source": "train-math-deepscaler",
            "prompt": messages("What is $1/2 + 1$?"),
            "ability": "math",
            "reward_model": {"ground_truth": json.dumps(["\\frac{3}{2}"]), "style": "rule"},
            "extra_info": {"index": 0, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
        },
        f"<user> What is $1/2 + 1$?{BOX}\n<assistant>",
        "\\frac{3}{2}",
        ("It is \\boxed{\\frac{3}{2}}.", "\\boxed{1.5}"),
        ("\\boxed{2}", "\\frac{3}{2}"),
    ),
    "SynthLabsAI/Big-Math-RL-Verified": PublicSet(
        {
            "problem": "Find $x$ if $2x = 7$.",
            "answer": "\\frac{7}{2}",
            "source": "orca_math",
            "domain": ["Mathematics -> Algebra"],
            "llama8b_solve_rate": 0.8,
        },
        f"Find $x$ if $2x = 7$.{BOX}",
        "\\frac{7}{2}",
        ("\\boxed{\\dfrac72}", "\\boxed{3.5}"),
        ("\\boxed{7}", "3.5"),
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": PublicSet(
        {"problem": "How many subsets has {1, 2}?", "answer": "4", "solution": "$2^2 = 4$."},
        f"How many subsets has {{1, 2}}?{BOX}",
        "4",
        ("\\boxed{4}", "\\boxed{2^2}"),
        ("\\boxed{2}", "4"),
    ),
    "openai/gsm8k": PublicSet(
        {"question": "Ann sold 48 clips and 24 more.", "answer": "48+24 = <<48+24=72>>72 clips.\n#### 1,072"},
        f"Ann sold 48 clips and 24 more.{BOX}",
        "1,072",
        ("\\boxed{1072}", "\\boxed{1{,}072}"),
        ("\\boxed{72}", "#### 1,072"),
    ),
    "EleutherAI/hendrycks_math": PublicSet(
        {
            "problem": "What is $3^2$?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": "It is $\\boxed{1}$, no, $\\boxed{9}$.",
        },
        f"What is $3^2$?{BOX}",
        "9",
        ("\\boxed{9}",),
        ("\\boxed{1}", "9"),
    ),
    "HuggingFaceH4/aime_2024": PublicSet(
        {"id": 60, "problem": "Find $s$.", "solution": "long", "answer": "033", "url": "x", "year": "2024"},
        f"Find $s$.{BOX}",
        "033",
        ("\\boxed{33}", "\\boxed{033}"),
        ("\\boxed{34}", "33"),
    ),
    "math-ai/aime25": PublicSet(
        {"problem": "Find the sum.", "answer": "70", "id": "0"},
        f"Find the sum.{BOX}",
        "70",
        ("\\boxed{70}",),
        ("\\boxed{7}", "70"),
    ),
    "Maxwell-Jia/AIME_2024": PublicSet(
        {"ID": "2024-II-4", "Problem": "Find $m+n$.", "Solution": "long", "Answer": 33},
        f"Find $m+n$.{BOX}",
        "33",
        ("\\boxed{33}",),
        ("\\boxed{3}", "33"),
    ),
}


def lines() -> list[list[str]]:
    """The arguments of every line of the document."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    block = text.split("<!-- public sets -->\n```\n")[1].split("```")[0]
    return [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]


def sources(arguments: list[str]) -> list[str]:
    return re.findall(r"hub:([\w.-]+/[\w.-]+)", " ".join(arguments))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        arrow, parquet = require("pyarrow", "make setup-dev"), require("pyarrow.parquet", "make setup-dev")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tasks_of(arguments: list[str], path: Path, tokenizer: str) -> Iterator[TextTask]:
    """The task of a line, or the tasks of its --tasks, with the file instead of the set."""
    arguments = [re.sub(r"hub:[^\s,=]+", str(path), argument) for argument in arguments]
    settings = dict(a.removeprefix("task.").split("=", 1) for a in arguments if a.startswith("task."))
    chat = settings.pop("chat", "") == "true"
    config = TaskConfig(
        name="text", chat=chat, tokenizer=tokenizer if chat else "bytes", verifier_workers=1, **settings
    )
    if arguments[0] != "--tasks":
        config.held_out_data = config.data
        yield TextTask(config)
        return
    for benchmark in find_benchmarks(arguments[1], None):
        yield benchmark.task(config)


def test_every_documented_set_has_rows_here() -> None:
    documented = [source for arguments in lines() for source in sources(arguments)]
    assert set(documented) == set(SETS)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
@pytest.mark.parametrize("name", SETS)
def test_a_documented_line_reads_prompt_and_answer_of_its_set(tmp_path: Path, name: str, suffix: str) -> None:
    require("math_verify", "pip install -e '.[math]'")
    example = SETS[name]
    arguments = next(arguments for arguments in lines() if name in sources(arguments))
    path = write(tmp_path / f"rows{suffix}", [example.row])
    for task in tasks_of(arguments, path, make_byte_tokenizer(tmp_path / "t", chat_template=CHAT)):
        prompt = task.prompt("held_out", 0)
        assert task.decode(list(prompt.tokens)) == example.prompt
        assert prompt.answer == example.answer
        task.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_documented_verifier_rewards_right_responses_alone(tmp_path: Path, name: str) -> None:
    require("math_verify", "pip install -e '.[math]'")
    example = SETS[name]
    arguments = next(arguments for arguments in lines() if name in sources(arguments))
    path = write(tmp_path / "rows.jsonl", [example.row])
    for task in tasks_of(arguments, path, make_byte_tokenizer(tmp_path / "t", chat_template=CHAT)):
        prompt, encode = task.prompt("held_out", 0), task.tokenizer.encode
        responses = [*example.right, *example.wrong]
        rewards = task.rewards([prompt] * len(responses), [encode(response) for response in responses])
        assert dict(zip(responses, rewards, strict=True)) == {
            **dict.fromkeys(example.right, 1.0),
            **dict.fromkeys(example.wrong, 0.0),
        }
        task.close()
