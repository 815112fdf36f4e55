"""Problems from a file or the hub: a prompt and a gold answer per row (`rows.py` reads them).

A row's prompt is inserted into `task.template` and tokenized (with `task.chat`, in the chat template).
Prompts longer than `task.max_prompt_tokens` are dropped, and their number is logged.  The held-out split is a
separate file, or one row in ten by a hash of its prompt.
"""

from __future__ import annotations

import hashlib
import random
import re
import zlib
from collections.abc import Sequence
from typing import Any

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import PerResponseTask, Prompt, Split
from opo_megatron.tasks.fields import RowError, field_text, find_field, text_of
from opo_megatron.tasks.graders import IN_BOX, Grader, Submission
from opo_megatron.tasks.math_answers import reference
from opo_megatron.tasks.messages import Messages, find_messages, message, text_of_messages
from opo_megatron.tasks.rows import read_rows
from opo_megatron.tasks.tokenizers import Tokenizer, open_tokenizer
from opo_megatron.tasks.tool_environment import tool_schemas
from opo_megatron.tasks.verifiers import compile_pattern, last_match

HELD_OUT_IN = 10
SLOT = "{prompt}"


class Reading:
    """What happens while rows are read: the first row that gives no problem is an error."""

    def refused(self, error: RowError) -> None:
        raise error

    def progress(self, source: str, rows: int) -> None:
        """Called after every row."""


class TextTask(PerResponseTask):
    """The task `text`; without task.data it has only held-out problems, for evaluation."""

    def __init__(self, config: TaskConfig, reading: Reading | None = None) -> None:
        if config.data is None and config.held_out_data is None:
            raise UserError("task.name=text needs task.data; name a JSONL or Parquet file")
        self.config = config
        self.tokenizer = open_tokenizer(config.tokenizer)
        self.vocab_size, self.stop_tokens = self.tokenizer.vocab_size, self.tokenizer.stop_tokens
        self._grader = Grader(config)
        self._prompts: dict[Split, list[Prompt]] = {"train": [], "held_out": []}
        self._dropped: dict[Split, list[int]] = {"train": [], "held_out": []}
        self._fingerprint: dict[str, str] = {}
        self._read(reading or Reading())
        for split, prompts in self._prompts.items():
            if not prompts and (split == "held_out" or config.data is not None):
                path = config.data if split == "train" else config.held_out_data or config.data
                longer = sum(map(len, self._dropped.values()))
                raise UserError(
                    f"{path} leaves no {split.replace('_', '-')} problem of at most "
                    f"task.max_prompt_tokens={config.max_prompt_tokens} tokens ({longer} were longer); "
                    "add problems, or raise the limit"
                )

    def _read(self, reading: Reading) -> None:
        """Fill the splits."""
        config, reader = self.config, ProblemReader(self.config, self.tokenizer)
        files: list[tuple[str, str | None, Split]] = [
            ("task.data", config.data, "train"),
            ("task.held_out_data", config.held_out_data, "held_out"),
        ]
        number = 0
        for key, path, role in files:
            rows_hash = hashlib.sha256()
            for row_number, row in read_rows(path) if path is not None else ():
                try:
                    text, tokens, answer, solution, messages = reader.read(f"{path}, row {row_number}", row)
                except RowError as error:
                    reading.refused(error)
                else:
                    rows_hash.update(repr((text, answer, solution)).encode())
                    hashed = zlib.crc32(text.encode()) % HELD_OUT_IN == 0
                    split: Split = "held_out" if hashed and config.held_out_data is None else role
                    if len(tokens) > config.max_prompt_tokens:
                        self._dropped[split].append(len(tokens))
                    else:
                        prompt = Prompt(number, text, tuple(tokens), answer, solution, tuple(messages))
                        self._prompts[split].append(prompt)
                        number += 1
                reading.progress(str(path), row_number)
            if path is not None:
                self._fingerprint[key] = rows_hash.hexdigest()

    @property
    def notes(self) -> list[str]:
        """The numbers of problems."""
        train, held_out = (len(self._prompts[split]) for split in ("train", "held_out"))
        counts = f"{train} training and {held_out} held-out problems" if train else f"{held_out} problems"
        return [f"{counts}; {sum(map(len, self._dropped.values()))} dropped as too long"]

    def size(self, split: Split) -> int:
        return len(self._prompts[split])

    def prompt(self, split: Split, index: int) -> Prompt:
        return self._prompts[split][index]

    def dropped(self, split: Split) -> list[int]:
        return self._dropped[split]

    def start(self) -> None:
        self._grader.start()

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the rows of each file, in their order, and of the source of a user's verifier."""
        return self._fingerprint | self._grader.fingerprint

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        return self.rewards([prompt], [response])[0]

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[float]:
        texts = map(self.tokenizer.decode, responses)
        rewards = self._grader.grade([Submission(*pair) for pair in zip(prompts, texts, strict=True)])
        self.failures += rewards.count(None)
        return [self.config.verifier_default if reward is None else reward for reward in rewards]

    def close(self) -> None:
        self._grader.close()

    def demonstration(self, prompt: Prompt, rng: random.Random) -> list[int]:
        raise UserError("task.name=text has no demonstrations; set warm_start.steps=0")

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def raw_text(self, tokens: list[int]) -> str:
        return self.tokenizer.raw_text(tokens)


def prompt_tokens(tokenizer: Tokenizer, config: TaskConfig, prompt: str | Messages) -> list[int]:
    """A problem in the recipe's template (and chat template), as token ids.

    Args:
        prompt: a text, or messages; the template surrounds the last of them.
    """
    if not config.chat:
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return tokenizer.encode(config.template.replace(SLOT, last))
    return tokenizer.chat(prompt_messages(config, prompt), tool_schemas(config))


def prompt_messages(config: TaskConfig, prompt: str | Messages) -> Messages:
    """What the chat template renders of a problem."""
    *before, last = [message("user", prompt)] if isinstance(prompt, str) else prompt
    if config.system_prompt:
        before = [message("system", config.system_prompt), *before]
    return [*before, {**last, "content": config.template.replace(SLOT, last["content"])}]


class ProblemReader:
    """Rows → problems, by the settings of a recipe."""

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._pattern: re.Pattern[str] | None = None
        if config.answer_pattern is not None:
            self._pattern = compile_pattern("task.answer_pattern", config.answer_pattern)

    def read(self, place: str, row: Any) -> tuple[str, list[int], str, str, Messages]:
        """(text, tokens, gold answer, reference solution, messages if an environment needs them) of a row.

        Args:
            place: file and row, for errors.

        Raises:
            RowError: naming place and field.
        """
        prompt = self._prompt(place, row)
        answer, solution = self._answer(place, row)
        tokens = prompt_tokens(self.tokenizer, self.config, prompt)
        text = prompt if isinstance(prompt, str) else text_of_messages(prompt)
        if not tokens:
            raise RowError(f"{place}: the problem {text!r} has no tokens; remove the row")
        messages = prompt_messages(self.config, prompt) if self.config.environment == "tools" else []
        return text, tokens, answer, solution, messages

    def _prompt(self, place: str, row: Any) -> str | Messages:
        field, key = self.config.prompt_field, "task.prompt_field"
        value = find_field(place, row, field, key)
        messages = find_messages(place, field, value)
        if messages is None:
            return text_of(place, field, value, key)
        if not self.config.chat:
            raise RowError(
                f"{place}: {field} is a list of messages, which needs a chat template; set task.chat=true, "
                f"or name one text with {key}={field}.0.content"
            )
        if self.config.system_prompt and messages[0]["role"] == "system":
            raise RowError(
                f"{place}: {field} has a system message, and task.system_prompt is set, too; set "
                "task.system_prompt=null"
            )
        return messages

    def _answer(self, place: str, row: Any) -> tuple[str, str]:
        """The gold answer, and the reference solution that it was taken from."""
        field, pattern = self.config.answer_field, self._pattern
        text = field_text(place, row, field, "task.answer_field")
        answer = text if pattern is None else _extract(place, pattern, text)
        return (reference(answer), answer) if self.config.verifier in IN_BOX else (answer, "")


def _extract(place: str, pattern: re.Pattern[str], text: str) -> str:
    answer = last_match(pattern, text)
    if answer is None or not answer.strip():
        how = "does not match" if answer is None else "finds nothing in"
        raise RowError(
            f"{place}: task.answer_pattern={pattern.pattern!r} {how} the answer {text[-60:]!r}; fix the "
            "pattern or the row"
        )
    return answer.strip()
