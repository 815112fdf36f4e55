"""Problems from a file or the hub: a prompt and a gold answer per row (`rows.py` reads them).

A row's prompt is inserted into `task.template` and tokenized (with `task.chat`, in the chat template).
Prompts longer than `task.max_prompt_tokens` are dropped, and their number is logged.  The held-out split is a
separate file, or one row in ten by a hash of its prompt.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import PerResponseTask, Prompt, Split
from opo_megatron.tasks.math_answers import reference
from opo_megatron.tasks.rows import read_rows
from opo_megatron.tasks.tokenizers import Tokenizer, open_tokenizer
from opo_megatron.tasks.verifiers import (
    MATH,
    MATH_STRICT,
    Verifier,
    compile_pattern,
    find_verifier,
    grading_workers,
    last_match,
)

HELD_OUT_IN = 10
SLOT = "{prompt}"


class TextTask(PerResponseTask):
    """The task `text`; without task.data it has only held-out problems, for evaluation."""

    def __init__(self, config: TaskConfig) -> None:
        if config.data is None and config.held_out_data is None:
            raise UserError("task.name=text needs task.data; name a JSONL or Parquet file")
        self.tokenizer = open_tokenizer(config.tokenizer)
        self.vocab_size, self.stop_tokens = self.tokenizer.vocab_size, self.tokenizer.stop_tokens
        self._workers = grading_workers(config)
        self._default = config.verifier_default
        self._verify: Verifier | None = None
        if self._workers is None:
            self._verify = find_verifier(config.verifier, config.verifier_pattern)
        self._prompts: dict[Split, list[Prompt]] = {"train": [], "held_out": []}
        self.dropped = 0
        files = [(config.data, "train"), (config.held_out_data, "held_out")]
        number = 0
        for path, role in files:
            if path is None:
                continue
            for text, answer in read_problems(path, config):
                hashed = zlib.crc32(text.encode()) % HELD_OUT_IN == 0
                split: Split = "held_out" if role == "held_out" else "train"
                if config.held_out_data is None and hashed:
                    split = "held_out"
                tokens = prompt_tokens(self.tokenizer, config, text)
                if not tokens:
                    raise UserError(
                        f"{path}: the problem {text!r} gives an empty prompt; remove it, or add text to "
                        "task.template"
                    )
                if len(tokens) > config.max_prompt_tokens:
                    self.dropped += 1
                    continue
                self._prompts[split].append(Prompt(number, text, tuple(tokens), answer))
                number += 1
        for split, prompts in self._prompts.items():
            if not prompts and (split == "held_out" or config.data is not None):
                path = config.data if split == "train" else config.held_out_data or config.data
                raise UserError(
                    f"{path} leaves no {split.replace('_', '-')} problem of at most "
                    f"task.max_prompt_tokens={config.max_prompt_tokens} tokens ({self.dropped} were longer); "
                    "add problems, or raise the limit"
                )

    @property
    def notes(self) -> list[str]:
        """The numbers of problems."""
        train, held_out = (len(self._prompts[split]) for split in ("train", "held_out"))
        counts = f"{train} training and {held_out} held-out problems" if train else f"{held_out} problems"
        return [f"{counts}; {self.dropped} dropped as too long"]

    def size(self, split: Split) -> int:
        return len(self._prompts[split])

    def prompt(self, split: Split, index: int) -> Prompt:
        return self._prompts[split][index]

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        if self._verify is None:
            return self.rewards([prompt], [response])[0]
        return self._verify(prompt.text, self.tokenizer.decode(response), prompt.answer)

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[float]:
        if self._workers is None:
            return super().rewards(prompts, responses)
        pairs = zip(prompts, responses, strict=True)
        rewards = self._workers.grade([(self.tokenizer.decode(r), p.answer) for p, r in pairs])
        self.failures += rewards.count(None)
        return [self._default if reward is None else reward for reward in rewards]

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def demonstration(self, prompt: Prompt, rng: random.Random) -> list[int]:
        raise UserError("task.name=text has no demonstrations; set warm_start.steps=0")

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


def prompt_tokens(tokenizer: Tokenizer, config: TaskConfig, text: str) -> list[int]:
    """A problem's text in the recipe's template (and chat template), as token ids."""
    filled = config.template.replace(SLOT, text)
    return tokenizer.chat(config.system_prompt, filled) if config.chat else tokenizer.encode(filled)


def read_problems(path: str, config: TaskConfig) -> Iterator[tuple[str, str]]:
    """(prompt, gold answer) of each row.

    Raises:
        UserError: naming file, row and field.
    """
    pattern = None
    if config.answer_pattern is not None:
        pattern = compile_pattern("task.answer_pattern", config.answer_pattern)
    for row_number, row in read_rows(path):
        prompt = _field(path, row_number, row, config.prompt_field, "task.prompt_field")
        answer = _field(path, row_number, row, config.answer_field, "task.answer_field")
        answer = answer if pattern is None else _extract(path, row_number, pattern, answer)
        yield prompt, reference(answer) if config.verifier in (MATH, MATH_STRICT) else answer


def _field(path: str, row_number: int, row: Any, field: str, key: str) -> str:
    if not isinstance(row, dict) or field not in row:
        content = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{path}, row {row_number} has no field {field!r} (it has {content}); set {key}")
    value = row[field]
    if not isinstance(value, str | int | float) or not _can_be_encoded(str(value)):
        shown = ascii(value)[:60]
        raise UserError(f"{path}, row {row_number}: {field} is {shown}, not text; fix or remove the row")
    return str(value)


def _can_be_encoded(text: str) -> bool:
    """False for text with half of a UTF-16 surrogate pair, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _extract(path: str, row_number: int, pattern: re.Pattern[str], text: str) -> str:
    answer = last_match(pattern, text)
    if answer is None:
        raise UserError(
            f"{path}, row {row_number}: task.answer_pattern={pattern.pattern!r} does not match the answer "
            f"{text[-60:]!r}; fix the pattern or the row"
        )
    return answer.strip()
