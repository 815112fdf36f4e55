"""What a recipe's problems are, in numbers: counts, lengths, repetitions, and answers that earn nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opo_megatron.config.choices import TaskName
from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.base import Prompt, Split, Task
from opo_megatron.tasks.verifiers import last_number

SPLITS: tuple[Split, ...] = ("train", "held_out")
PERCENTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class SplitSummary:
    """Numbers about one split."""

    problems: int
    lengths: tuple[int, ...]
    """Tokens of the prompts at `PERCENTILES`."""
    dropped: Sequence[int]
    """Tokens of each prompt that is too long."""
    repeated: int
    """Problems whose prompt an earlier problem of the split has."""
    contradictory: int
    """Those of them with another answer than the first."""
    unanswerable: int
    """Problems whose answer the verifier accepts from no response."""


@dataclass(frozen=True)
class Summary:
    splits: dict[Split, SplitSummary]
    shared: int
    """Prompts that both splits have."""


def summarize(task: Task, config: TaskConfig, progress: Callable[[str, int], None]) -> Summary:
    """Read every problem once.

    Args:
        progress: called with the split and the number of problems read.
    """
    splits, answers = {}, {}
    for split in SPLITS:
        splits[split], answers[split] = _summarize_split(task, config, split, progress)
    return Summary(splits, sum(text in answers["train"] for text in answers["held_out"]))


def _summarize_split(
    task: Task, config: TaskConfig, split: Split, progress: Callable[[str, int], None]
) -> tuple[SplitSummary, dict[str, str]]:
    """The numbers, and the answer to every prompt."""
    lengths: list[int] = []
    answers: dict[str, str] = {}
    contradictory = unanswerable = 0
    for prompt in _prompts(task, split, progress):
        lengths.append(len(prompt.tokens))
        first = answers.setdefault(prompt.text, prompt.answer)
        contradictory += first != prompt.answer
        unanswerable += compared(config, prompt.answer) is None
    percentiles = np.percentile(lengths, PERCENTILES, method="higher") if lengths else ()
    return (
        SplitSummary(
            problems=len(lengths),
            lengths=tuple(int(length) for length in percentiles),
            dropped=task.dropped(split),
            repeated=len(lengths) - len(answers),
            contradictory=contradictory,
            unanswerable=unanswerable,
        ),
        answers,
    )


def _prompts(task: Task, split: Split, progress: Callable[[str, int], None]) -> Iterator[Prompt]:
    for index in range(task.size(split)):
        yield task.prompt(split, index)
        progress(split, index + 1)


def compared(config: TaskConfig, answer: str) -> str | None:
    """The gold answer as the verifier compares it; None if it accepts no response.

    Without a number there is nothing for `number` to compare; MATH has solutions with an empty box.
    """
    if config.name != TaskName.text:
        return answer
    if config.verifier == "number":
        number = last_number(answer)
        return None if number is None else format(number, "f")
    return answer if answer.strip() else None
