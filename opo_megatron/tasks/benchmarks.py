"""Problem sets that `opo eval --tasks` knows by name, and a user's own files beside them.

A known one is a file DATA/NAME.jsonl, DATA/NAME/test.jsonl or DATA/NAME/NAME.json (a list), whose fields
are named here; its answers are judged by the verifier `math`.  All else (template, chat format, tokenizer,
limits) is the recipe's.  What is left out: nothing is downloaded.
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
from opo_megatron.tasks.text import TextTask
from opo_megatron.tasks.verifiers import MATH

HELD_OUT = "held_out"
"""The recipe's own held-out problems."""
FIELDS = {
    "math500": ("problem", "answer"),
    "math": ("problem", "solution"),
    "gsm8k": ("question", "answer"),
    "aime24": ("problem", "answer"),
    "aime25": ("problem", "answer"),
}
"""Known name → the fields of problem and answer; a whole solution with a box or `####` is an answer, too."""
PLACES = ("{name}.jsonl", "{name}/test.jsonl", "{name}/{name}.json")
"""Where in the data folder a known file is looked for."""


@dataclass(frozen=True)
class Benchmark:
    """One problem set to be evaluated on."""

    name: str
    source: str | None = None
    """File or `hub:…`; None for the recipe's own held-out problems."""

    def task(self, config: TaskConfig) -> TextTask:
        """Its problems, all held out, in the recipe's template and tokenizer."""
        assert self.source is not None
        own = replace(config, name=TaskName.text, data=None, held_out_data=self.source)
        if self.name in FIELDS:
            prompt_field, answer_field = FIELDS[self.name]
            own = replace(
                own,
                prompt_field=prompt_field,
                answer_field=answer_field,
                answer_pattern=None,
                verifier=MATH,
            )
        return TextTask(own)


def find_benchmarks(wanted: str, data: Path | None) -> list[Benchmark]:
    """What `--tasks` names: known names, `held_out`, and name=path for a file of one's own
    (or name=hub:owner/name:split).

    Args:
        data: the folder of the known ones' files.

    Raises:
        UserError: for a name that is unknown or there twice, and for a file that is not there.
    """
    found = [_find(part.strip(), data) for part in wanted.split(",")]
    names = [benchmark.name for benchmark in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--tasks {wanted} has {name} twice; name each once")
    return found


def _find(wanted: str, data: Path | None) -> Benchmark:
    name, equals, path = wanted.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--tasks {wanted!r} is not a name; give letters, digits, '.', '_' and '-'")
    if equals:
        if name == HELD_OUT or not (path.startswith(HUB) or Path(path).is_file()):
            reason = "is the name of the recipe's own problems" if name == HELD_OUT else "names no file"
            raise UserError(f"--tasks {wanted} {reason}; write it like mine=problems.jsonl")
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
    places = [data / place.format(name=name) for place in PLACES]
    for place in places:
        if place.is_file():
            return Benchmark(name, str(place))
    raise UserError(
        f"--tasks {name}: there is none of {', '.join(map(str, places))}; put a file with the fields "
        f"{' and '.join(FIELDS[name])} there, or say {name}=problems.jsonl"
    )


def check_vocabulary(tasks: Sequence[tuple[str, Task]], config: TaskConfig, rows: int) -> None:
    """
    Raises:
        UserError: for a task with tokens that the policy has no row for.
    """
    for name, task in tasks:
        if task.vocab_size > rows:
            raise UserError(
                f"--tasks {name}: task.tokenizer={config.tokenizer} has {task.vocab_size} tokens, but the "
                f"policy's vocabulary has {rows}; set task.tokenizer to the folder of the model's own"
            )
