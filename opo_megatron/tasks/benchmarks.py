"""Problem sets of `opo eval --tasks`: named benchmarks, and a user's files.

A named benchmark is a file DATA/NAME.jsonl, DATA/NAME/test.jsonl or DATA/NAME/NAME.json (a list) with the
fields in `FIELDS`; the verifier `math` grades its responses.  All else (template, chat template, tokenizer,
limits) is the recipe's.  Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opo_megatron.config.choices import TaskName
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Task
from opo_megatron.tasks.rows import HUB
from opo_megatron.tasks.stop_tokens import check_stop_tokens
from opo_megatron.tasks.text import TextTask
from opo_megatron.tasks.verifiers import MATH

HELD_OUT = "held_out"
"""The name of the recipe's own held-out problems."""
FIELDS = {
    "math500": ("problem", "answer"),
    "math": ("problem", "solution"),
    "gsm8k": ("question", "answer"),
    "aime24": ("problem", "answer"),
    "aime25": ("problem", "answer"),
}
"""Benchmark → its fields of problem and answer, which may be a solution with a box or `####`."""
PATHS = ("{name}.jsonl", "{name}/test.jsonl", "{name}/{name}.json")
"""Paths of a benchmark in the data folder."""


@dataclass(frozen=True)
class Benchmark:
    """One problem set for evaluation."""

    name: str
    source: str | None = None
    """File or `hub:…`; None for the recipe's own held-out problems."""

    def task(self, config: TaskConfig) -> TextTask:
        """Its problems, all held out, in the recipe's template and tokenizer."""
        assert self.source is not None
        task_config = replace(config, name=TaskName.text.value, data=None, held_out_data=self.source)
        if self.name in FIELDS:
            prompt_field, answer_field = FIELDS[self.name]
            task_config = replace(
                task_config,
                prompt_field=prompt_field,
                answer_field=answer_field,
                answer_pattern=None,
                verifier=MATH,
            )
        return TextTask(task_config)


def find_benchmarks(tasks: str, data: Path | None) -> list[Benchmark]:
    """The problem sets of `--tasks`: benchmarks, `held_out`, and name=path for a user's file
    (or name=hub:owner/name:split).

    Args:
        data: the folder of the benchmarks' files.

    Raises:
        UserError: for a name that is unknown or repeated, and for a missing file.
    """
    benchmarks = [_find(part.strip(), data) for part in tasks.split(",")]
    names = [benchmark.name for benchmark in benchmarks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--tasks {tasks} has {name} twice; name each once")
    return benchmarks


def _find(task: str, data: Path | None) -> Benchmark:
    name, equals, path = task.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--tasks {task!r} is not a name; use letters, digits, '.', '_' and '-'")
    if equals:
        if name == HELD_OUT or not (path.startswith(HUB) or Path(path).is_file()):
            reason = "is the name of the recipe's own problems" if name == HELD_OUT else "names no file"
            raise UserError(f"--tasks {task} {reason}; write it like mine=problems.jsonl")
        return Benchmark(name, path)
    if name == HELD_OUT:
        return Benchmark(name)
    if name not in FIELDS:
        raise UserError(
            f"--tasks {name} is unknown; choose {', '.join((HELD_OUT, *FIELDS))}, or name a file of your own "
            f"with {name}=problems.jsonl"
        )
    if data is None:
        raise UserError(
            f"--tasks {name} needs the folder of its file; give --data DIR or OPO_TEST_DATA, or "
            f"{name}=problems.jsonl"
        )
    paths = [data / one.format(name=name) for one in PATHS]
    for file in paths:
        if file.is_file():
            return Benchmark(name, str(file))
    raise UserError(
        f"--tasks {name}: none of {', '.join(map(str, paths))} exists; put a file with the fields "
        f"{' and '.join(FIELDS[name])} there, or use {name}=problems.jsonl"
    )


def check_vocabulary(tasks: Sequence[tuple[str, Task]], config: TaskConfig, rows: int) -> None:
    """
    Args:
        rows: of the policy's embedding.

    Raises:
        UserError: for a task with more tokens than the policy's vocabulary, or that stops at one beyond it.
    """
    for name, task in tasks:
        if task.vocab_size > rows:
            raise UserError(
                f"--tasks {name}: task.tokenizer={config.tokenizer} has {task.vocab_size} tokens, but the "
                f"policy's vocabulary has {rows}; set task.tokenizer to the folder of the model's own"
            )
        check_stop_tokens(task.stop_tokens, rows)
