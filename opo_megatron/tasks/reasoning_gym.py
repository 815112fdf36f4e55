"""Procedural problems from a generator of reasoning-gym.

Problems are a function of (seed, index): training and held-out problems use different seeds.  Scores are
between 0 and 1; `task.reward_threshold` turns a score at or above it into 1, and one below it into 0.
"""

from __future__ import annotations

import difflib
import random
from typing import Any

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import PerResponseTask, Prompt, Split
from opo_megatron.tasks.text import prompt_tokens
from opo_megatron.tasks.tokenizers import open_tokenizer
from opo_megatron.tasks.verifiers import compile_pattern, last_match
from opo_megatron.utils.extras import require_extra

SEEDS: dict[Split, int] = {"train": 1, "held_out": 2}


class ReasoningGymTask(PerResponseTask):
    """The task `reasoning_gym`."""

    def __init__(self, config: TaskConfig) -> None:
        if config.generator is None:
            raise UserError("task.name=reasoning_gym needs task.generator; name one, such as chain_sum")
        gym = require_extra("reasoning_gym", "task.name=reasoning_gym", "reasoning-gym")
        self.config = config
        self.tokenizer = open_tokenizer(config.tokenizer)
        self.vocab_size, self.stop_tokens = self.tokenizer.vocab_size, self.tokenizer.stop_tokens
        self._pattern = None
        if config.verifier_pattern is not None:
            self._pattern = compile_pattern("task.verifier_pattern", config.verifier_pattern)
        self._items = {split: self._open(gym, seed) for split, seed in SEEDS.items()}
        self._dropped: dict[Split, list[int]] = {split: [] for split in SEEDS}
        self._indices = {split: self._short_enough(split) for split in SEEDS}
        for split, indices in self._indices.items():
            if not indices:
                raise UserError(
                    f"no {split.replace('_', '-')} problem of task.generator={config.generator} has at most "
                    f"task.max_prompt_tokens={config.max_prompt_tokens} tokens; raise the limit"
                )

    def _open(self, gym: Any, seed: int) -> Any:
        config = self.config
        try:
            return gym.create_dataset(
                config.generator, size=config.generator_size, seed=seed, **config.generator_options
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(
                f"reasoning-gym rejects task.generator={config.generator} with "
                f"task.generator_options={config.generator_options} ({error}); {self._remedy(gym)}"
            ) from None

    def _remedy(self, gym: Any) -> str:
        generators = list(gym.factory.DATASETS)
        if self.config.generator in generators:
            return "fix task.generator_options"
        close = difflib.get_close_matches(str(self.config.generator), generators, n=1)
        return f"did you mean {close[0]}?" if close else "its gallery lists all generators"

    def _short_enough(self, split: Split) -> list[int]:
        kept = []
        for index in range(self.config.generator_size):
            length = len(prompt_tokens(self.tokenizer, self.config, self._items[split][index]["question"]))
            if length <= self.config.max_prompt_tokens:
                kept.append(index)
            else:
                self._dropped[split].append(length)
        return kept

    @property
    def notes(self) -> list[str]:
        """The numbers of problems."""
        train, held_out = (len(self._indices[split]) for split in ("train", "held_out"))
        return [
            f"{train} training and {held_out} held-out problems of {self.config.generator}; "
            f"{sum(map(len, self._dropped.values()))} dropped as too long"
        ]

    def size(self, split: Split) -> int:
        return len(self._indices[split])

    def dropped(self, split: Split) -> list[int]:
        return self._dropped[split]

    def prompt(self, split: Split, index: int) -> Prompt:
        number = self._indices[split][index]
        item = self._items[split][number]
        tokens = prompt_tokens(self.tokenizer, self.config, item["question"])
        # Even ids are training problems, odd ids held-out ones, so that `reward` finds the item.
        prompt_id = 2 * number + (split == "held_out")
        return Prompt(prompt_id, item["question"], tuple(tokens), str(item["answer"]))

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        number, held_out = divmod(prompt.id, 2)
        items = self._items["held_out" if held_out else "train"]
        text = self.tokenizer.decode(response).strip()
        if self._pattern is not None:
            text = last_match(self._pattern, text) or ""
        score = self._score(items, text, items[number])
        threshold = self.config.reward_threshold
        return score if threshold is None else float(score >= threshold)

    def _score(self, items: Any, text: str, item: Any) -> float:
        try:
            return float(items.score_answer(answer=text, entry=item))
        except Exception:
            # Some generators raise on an answer that they cannot parse: it is wrong, unless the scorer
            # fails on the gold answer too.
            self._check_scorer(items, item)
            return 0.0

    def _check_scorer(self, items: Any, item: Any) -> None:
        try:
            items.score_answer(answer=item["answer"], entry=item)
        except Exception as error:
            raise UserError(
                f"the scorer of task.generator={self.config.generator} raised {type(error).__name__} "
                f"({error}) on its own gold answer; choose another generator"
            ) from error

    def demonstration(self, prompt: Prompt, rng: random.Random) -> list[int]:
        raise UserError("task.name=reasoning_gym has no demonstrations; set warm_start.steps=0")

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def raw_text(self, tokens: list[int]) -> str:
        return self.tokenizer.raw_text(tokens)
