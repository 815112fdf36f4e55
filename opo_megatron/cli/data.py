"""`opo data`: how a recipe reads its problems, before any model is loaded."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from opo_megatron.cli.common import add_debug, add_recipe, count_of
from opo_megatron.config import Config, load_config
from opo_megatron.config.choices import TaskName
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.utils.extras import block_import, require_extra

if TYPE_CHECKING:
    from opo_megatron.tasks import Prompt, Task
    from opo_megatron.tasks.base import Split
    from opo_megatron.tasks.summary import SplitSummary, Summary

SUMMARY = "how a recipe reads its problems: prompts, tokens, gold answers, lengths, what is dropped"
EPILOG = """\
examples:
  opo data recipes/quickstart.yaml
      the first problems of both splits, counts and lengths
  opo data my.yaml task.data=problems.jsonl task.answer_field=solution --rows 10
      the same before a run, with another file
  opo data my.yaml task.data=hub:openai/gsm8k:main 'task.answer_pattern=#### (.+)' task.verifier=number
      a data set of the Hugging Face hub

Reads all problems, and needs neither the model nor a GPU.  Exit code 2 if rows are refused; the first of them
are listed with the reason.
"""
DEFAULT_ROWS = 3
REFUSED_SHOWN = 5
TOKENS_SHOWN = (24, 8)
"""Tokens at the start and at the end of a prompt."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo data`."""
    add_recipe(parser)
    parser.add_argument(
        "--rows",
        metavar="N",
        type=count_of("rows", minimum=0),
        default=DEFAULT_ROWS,
        help=f"problems to show of each split; default {DEFAULT_ROWS}",
    )
    add_debug(parser)


def run(options: argparse.Namespace) -> int:
    """Print the problems and their numbers.

    Raises:
        UserError: where rows are refused, after all else is printed.
    """
    config = load_config(options.recipe, options.overrides)
    _import_tokenizers(config.task)
    from opo_megatron.tasks.summary import summarize

    progress = _Progress()
    try:
        task, refused = _open(config, progress)
        summary = summarize(task, config.task, progress.update)
    finally:
        progress.close()
    try:
        console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        _show(console, config, task, summary, options.rows)
        for reason in refused[:REFUSED_SHOWN]:
            console.print(f"refused: {reason}")
    finally:
        task.close()
    if refused:
        raise _refusal(refused)
    return 0


def _import_tokenizers(config: TaskConfig) -> None:
    """Import transformers without torch, which takes seconds and which a tokenizer does not need.

    Code of the user's own may need both, so that it imports them as in training.
    """
    if config.name == TaskName.lift or config.tokenizer == "bytes" or config.name not in TaskName.__members__:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there are no models without torch
    with block_import("torch"):
        transformers = require_extra("transformers", "task.tokenizer with a folder", "data")
        _ = transformers.AutoTokenizer


def _open(config: Config, progress: _Progress) -> tuple[Task, list[str]]:
    """The task, and why rows are refused."""
    from opo_megatron.tasks import make_task
    from opo_megatron.tasks.text import Reading, RowError, TextTask

    if config.task.name != TaskName.text:
        return make_task(config.task), []
    refused: list[str] = []

    class Collecting(Reading):
        def refused(self, error: RowError) -> None:
            refused.append(str(error))

        def progress(self, source: str, rows: int) -> None:
            progress.update(source, rows)

    try:
        return TextTask(config.task, Collecting()), refused
    except UserError:
        if refused:  # they are why a split is empty
            raise _refusal(refused) from None
        raise


def _refusal(refused: list[str]) -> UserError:
    if len(refused) == 1:
        return UserError(refused[0])
    return UserError(f"{len(refused):,} rows are refused, the first because {refused[0]}")


def _show(console: Console, config: Config, task: Task, summary: Summary, rows: int) -> None:
    for line in _settings(config.task, task):
        console.print(line)
    for split, numbers in summary.splits.items():
        for index in range(min(rows, numbers.problems)):
            console.print()
            title = f"{_name(split)} problem {index + 1} of {numbers.problems:,}"
            for line in _problem(title, config.task, task, task.prompt(split, index)):
                console.print(line)
    console.print()
    console.print(_numbers(summary))
    for line in _remarks(config.task, summary):
        console.print(line)


def _settings(config: TaskConfig, task: Task) -> list[str]:
    from opo_megatron.tasks.stop_tokens import with_texts

    lines = [f"task       {config.name}"]
    if config.name == TaskName.text:
        held_out = config.held_out_data or f"one row in ten of {config.data}, by a hash of its prompt"
        lines += [f"data       {config.data}", f"held out   {held_out}", f"verifier   {config.verifier}"]
    if config.name == TaskName.reasoning_gym:
        lines += [f"generator  {config.generator}"]
    if config.name in (TaskName.text, TaskName.reasoning_gym):
        chat = ", in its chat template" if config.chat else ""
        lines += [f"tokenizer  {config.tokenizer}, {task.vocab_size:,} tokens{chat}"]
    return [*lines, f"stop at    {with_texts(task, task.stop_tokens)}"]


def _problem(title: str, config: TaskConfig, task: Task, prompt: Prompt) -> list[str]:
    from opo_megatron.tasks.summary import compared

    text = task.raw_text(list(prompt.tokens))
    answer, value = _printable(prompt.answer), compared(config, prompt.answer)
    if value is None:
        answer += f"  (nothing that task.verifier={config.verifier} could compare)"
    elif value != prompt.answer:
        answer += f"  (compared as {value})"
    return [
        f"{title}, {len(prompt.tokens):,} tokens",
        *(f"  prompt   {line}" if not i else f"           {line}" for i, line in enumerate(_lines(text))),
        f"  tokens   {_tokens(task, prompt.tokens)}",
        f"  answer   {answer}",
    ]


def _tokens(task: Task, tokens: Sequence[int]) -> str:
    """Ids with their texts; the middle of a long prompt is left out."""
    from opo_megatron.tasks.stop_tokens import with_texts

    first, last = TOKENS_SHOWN
    if len(tokens) <= first + last:
        return with_texts(task, tokens)
    more = f"({len(tokens) - first - last:,} more)"
    return ", ".join([with_texts(task, tokens[:first]), more, with_texts(task, tokens[-last:])])


def _lines(text: str) -> list[str]:
    return [_printable(line) for line in text.split("\n")]


def _printable(text: str) -> str:
    """Text whose control characters are escaped: they would change the terminal."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def _name(split: Split) -> str:
    return "training" if split == "train" else "held-out"


def _numbers(summary: Summary) -> Table:
    table = Table(
        title="Problems, and the lengths of their prompts in tokens",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    headings = ("", "problems", "too long", "repeated", "min", "p50", "p90", "p99", "max")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for split, numbers in summary.splits.items():
        counts = (numbers.problems, len(numbers.dropped), numbers.repeated, *numbers.lengths)
        table.add_row(_name(split), *(f"{count:,}" for count in counts))
    return table


def _remarks(config: TaskConfig, summary: Summary) -> list[str]:
    """What a reader of the numbers should do about them."""
    lines = []
    splits: Sequence[SplitSummary] = list(summary.splits.values())
    longest = max((length for numbers in splits for length in numbers.dropped), default=0)
    if longest:
        lines.append(
            f"too long: above task.max_prompt_tokens={config.max_prompt_tokens}; the longest has {longest:,}"
        )
    if summary.shared:
        lines.append(
            f"prompts of training that are also held out: {summary.shared:,}; remove them from one of the two"
        )
    if contradictory := sum(numbers.contradictory for numbers in splits):
        lines.append(f"repeated problems with another answer than the first of them: {contradictory:,}")
    if unanswerable := sum(numbers.unanswerable for numbers in splits):
        lines.append(
            f"answers with nothing that task.verifier={config.verifier} could compare: {unanswerable:,}; no "
            "response to them is ever rewarded"
        )
    return lines


class _Progress:
    """A status line on stderr, in a terminal only."""

    def __init__(self) -> None:
        console = Console(file=sys.stderr, highlight=False, markup=False)
        self._status = console.status("reading problems") if console.is_terminal else None
        self._shown = 0.0
        if self._status is not None:
            self._status.start()

    def update(self, source: str, count: int) -> None:
        """Several times per second, not at every row."""
        if self._status is not None and time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            self._status.update(f"{source}: {count:,}")

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
