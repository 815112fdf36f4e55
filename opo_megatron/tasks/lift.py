"""A lift with ten floors: `9-4+2+1+4-4=` → `#5$`.

A start floor, then five moves of 1 to 4 that stop at floors 0 and 9, so that their order matters and a
response without intermediate floors is mostly a guess.  The reward is 1 if the response has exactly one `#`
and the text between it and the stop token `$` is the final floor.

Demonstrations are imperfect on purpose: 55 % answer directly, 15 % write every other floor, 25 % all floors
(`5,7,8,9,5#5$`), 5 % all floors twice, and one written floor in ten is random.  So responses to one prompt
have 3 to 22 tokens, and the policy has to discover that writing floors increases the reward.  One problem in
ten is held out, by a hash of its text.

`task.options` makes it harder: `floors`, `moves`, `largest_move`.  With `easy_moves` every other problem, by
a hash, has only so many moves.  With `asks` that percentage of the demonstrations ask `lift_tool.py` for the
ride, whether they need it or not, and all others answer directly.  With more than ten floors a floor has up
to three digits.  A lift with too many problems to enumerate has `SAMPLED` of them per split, chosen by a hash
of their index.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Mapping
from typing import Any

from opo_megatron.errors import UserError
from opo_megatron.tasks.base import PerResponseTask, Prompt, Split
from opo_megatron.utils.hashing import MASK, hash_of

SYMBOLS = (*"$#=+-,?", *"0123456789")
STOP = 0
UNKNOWN = "\ufffd"
"""Text of a token id beyond the symbols: a policy's vocabulary may be larger than the task's."""
DEFAULTS = {"floors": 10, "moves": 5, "largest_move": 4, "easy_moves": 0, "asks": 0}
LIMITS = {
    "floors": (2, 1000),
    "moves": (1, 32),
    "largest_move": (1, 9),
    "easy_moves": (0, 32),
    "asks": (0, 100),
}
ENUMERATED = 2**19
"""A lift with at most this many problems has all of them."""
SAMPLED = 2**18
"""Problems per split of a lift with more."""
STYLES = {"direct": 0.55, "every_other": 0.15, "all": 0.25, "twice": 0.05}
CORRUPTED = 0.1
ASK = "?$"
"""The turn that asks the tool for the ride."""
HELD_OUT_IN = 10

_TOKEN = {symbol: token for token, symbol in enumerate(SYMBOLS)}


class LiftTask(PerResponseTask):
    """The task of the quickstart: 327,680 problems, no files."""

    vocab_size = len(SYMBOLS)
    stop_tokens: tuple[int, ...] = (STOP,)

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            options: `task.options`.

        Raises:
            UserError: for an option that the lift does not have, or a value out of its range.
        """
        values = DEFAULTS | _checked(options or {})
        self.floors, self.moves, self.largest_move, self.easy_moves, self.asks = (
            values[name] for name in DEFAULTS
        )
        self.problems = self.floors * (2 * self.largest_move) ** self.moves
        self._indices: dict[Split, list[int]] = {"train": [], "held_out": []}
        if self.problems <= ENUMERATED:
            for number in range(self.problems):
                self._indices[self._split(self._text(number))].append(number)
            if not all(self._indices.values()):
                raise UserError(
                    f"task.options={dict(options or {})} make a lift of {self.problems} problems, none of "
                    "which is in one of the splits; raise moves"
                )

    @property
    def notes(self) -> list[str]:
        return []

    def size(self, split: Split) -> int:
        return len(self._indices[split]) or SAMPLED

    def prompt(self, split: Split, index: int) -> Prompt:
        number = self._indices[split][index] if self._indices[split] else self._sampled(split, index)
        text = self._text(number)
        return Prompt(number, text, tuple(_TOKEN[c] for c in text), str(self._visited(text)[-1]))

    def _text(self, number: int) -> str:
        """The problem with this number; its last move varies fastest."""
        moves, count = [], self.moves
        if self.easy_moves and hash_of((number,)) & 1:
            count = min(count, self.easy_moves)
        for _ in range(self.moves):
            number, move = divmod(number, 2 * self.largest_move)
            moves.append(f"{'-' if move >= self.largest_move else '+'}{move % self.largest_move + 1}")
        return f"{number}{''.join(moves[count - 1 :: -1])}="

    @staticmethod
    def _split(text: str) -> Split:
        return "held_out" if zlib.crc32(text.encode()) % HELD_OUT_IN == 0 else "train"

    def _sampled(self, split: Split, index: int) -> int:
        """The number of problem `index` of a split that is not enumerated."""
        attempt = 0
        while True:
            number = (hash_of((index, attempt, split == "train")) & MASK) % self.problems
            if self._split(self._text(number)) == split:
                return number
            attempt += 1

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        if not response or response[-1] != STOP:
            return 0.0
        parts = self.decode(response[:-1]).split("#")
        return float(len(parts) == 2 and parts[1] == prompt.answer)

    def demonstration(self, prompt: Prompt, rng: random.Random) -> list[int]:
        if self.asks:
            asks = rng.randrange(100) < self.asks
            answer = prompt.answer if rng.random() >= CORRUPTED else str(rng.randrange(self.floors))
            return self.encode(f"{ASK}#{answer}$" if asks else f"#{answer}$")
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        floor, *moves = _numbers(prompt.text)
        written = []
        for move in moves:
            # A wrong floor propagates: the answer is consistent with the written floors.
            floor = rng.randrange(self.floors) if rng.random() < CORRUPTED else self._next(floor, move)
            written.append(str(floor))
        if style == "direct":
            return self.encode(f"#{prompt.answer}$")
        answer = str(floor)
        if style == "every_other":
            written = written[::2]
        text = ",".join(written)
        return self.encode((f"{text}?{text}" if style == "twice" else text) + f"#{answer}$")

    @staticmethod
    def decode(tokens: list[int]) -> str:
        return "".join(SYMBOLS[token] if token < len(SYMBOLS) else UNKNOWN for token in tokens)

    def raw_text(self, tokens: list[int]) -> str:
        return self.decode(tokens)

    @staticmethod
    def encode(text: str) -> list[int]:
        return [_TOKEN[c] for c in text]

    def after(self, prompt: Prompt, moves: int) -> int:
        """The floor after the first moves of a problem."""
        return self._visited(prompt.text)[: max(1, moves)][-1]

    def _next(self, floor: int, move: int) -> int:
        return min(self.floors - 1, max(0, floor + move))

    def _visited(self, text: str) -> list[int]:
        """The floor after each move."""
        floor, *moves = _numbers(text)
        visited = []
        for move in moves:
            floor = self._next(floor, move)
            visited.append(floor)
        return visited


def _numbers(text: str) -> list[int]:
    """The start floor and the moves of a problem."""
    return [int(number) for number in re.findall(r"[+-]?\d+", text)]


def _checked(options: Mapping[str, Any]) -> dict[str, int]:
    """The options, whole numbers within their ranges.

    Raises:
        UserError: for another name or value.
    """
    for name, value in options.items():
        if name not in LIMITS:
            raise UserError(
                f"task.options.{name} is {value!r}, but the lift has only {', '.join(LIMITS)}; remove it"
            )
        low, high = LIMITS[name]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UserError(
                f"task.options.{name} is {value!r}; it must be a whole number from {low} to {high}"
            )
    return dict(options)
