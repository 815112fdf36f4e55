"""A lift with ten floors: `9-4+2+1+4-4=` → `#5$`.

A start floor, then five moves of 1 to 4 that stop at floors 0 and 9, so that their order matters and a
response without intermediate floors is mostly a guess.  The reward is 1 if the response has exactly one `#`
and the text between it and the stop token `$` is the final floor.

Demonstrations are imperfect on purpose: 55 % answer directly, 15 % write every other floor, 25 % all floors
(`5,7,8,9,5#5$`), 5 % all floors twice, and one written floor in ten is random.  So responses to one prompt
have 3 to 22 tokens, and the policy has to discover that writing floors increases the reward.  One problem in
ten is held out, by a hash of its text.
"""

from __future__ import annotations

import random
import zlib
from itertools import product

from opo_megatron.tasks.base import PerResponseTask, Prompt, Split

SYMBOLS = (*"$#=+-,?", *"0123456789")
STOP = 0
UNKNOWN = "\ufffd"
"""Text of a token id beyond the symbols: a policy's vocabulary may be larger than the task's."""
FLOORS = 10
MOVES = 5
LARGEST_MOVE = 4
STYLES = {"direct": 0.55, "every_other": 0.15, "all": 0.25, "twice": 0.05}
CORRUPTED = 0.1
HELD_OUT_IN = 10

_TOKEN = {symbol: token for token, symbol in enumerate(SYMBOLS)}


class LiftTask(PerResponseTask):
    """The task of the quickstart: 327,680 problems, no files."""

    vocab_size = len(SYMBOLS)
    stop_tokens: tuple[int, ...] = (STOP,)

    def __init__(self) -> None:
        self._indices: dict[Split, list[int]] = {"train": [], "held_out": []}
        moves = [sign + str(size) for sign in "+-" for size in range(1, LARGEST_MOVE + 1)]
        texts = ("".join(parts) for parts in product("0123456789", *[moves] * MOVES))
        self._texts = [text + "=" for text in texts]
        for index, text in enumerate(self._texts):
            split: Split = "held_out" if zlib.crc32(text.encode()) % HELD_OUT_IN == 0 else "train"
            self._indices[split].append(index)

    @property
    def notes(self) -> list[str]:
        return []

    def size(self, split: Split) -> int:
        return len(self._indices[split])

    def prompt(self, split: Split, index: int) -> Prompt:
        number = self._indices[split][index]
        text = self._texts[number]
        return Prompt(number, text, tuple(_TOKEN[c] for c in text), str(_floors(text)[-1]))

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        if not response or response[-1] != STOP:
            return 0.0
        parts = self.decode(response[:-1]).split("#")
        return float(len(parts) == 2 and parts[1] == prompt.answer)

    def demonstration(self, prompt: Prompt, rng: random.Random) -> list[int]:
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        floor = int(prompt.text[0])
        written = []
        for move in _moves(prompt.text):
            # A wrong floor propagates: the answer is consistent with the written floors.
            floor = rng.randrange(FLOORS) if rng.random() < CORRUPTED else _next_floor(floor, move)
            written.append(str(floor))
        if style == "direct":
            return self._encode(f"#{prompt.answer}$")
        answer = str(floor)
        if style == "every_other":
            written = written[::2]
        text = ",".join(written)
        return self._encode((f"{text}?{text}" if style == "twice" else text) + f"#{answer}$")

    @staticmethod
    def decode(tokens: list[int]) -> str:
        return "".join(SYMBOLS[token] if token < len(SYMBOLS) else UNKNOWN for token in tokens)

    def raw_text(self, tokens: list[int]) -> str:
        return self.decode(tokens)

    def _encode(self, text: str) -> list[int]:
        return [_TOKEN[c] for c in text]


def _moves(text: str) -> list[int]:
    return [int(text[i : i + 2]) for i in range(1, len(text) - 1, 2)]


def _next_floor(floor: int, move: int) -> int:
    return min(FLOORS - 1, max(0, floor + move))


def _floors(text: str) -> list[int]:
    """The floor after each move."""
    floor, visited = int(text[0]), []
    for move in _moves(text):
        floor = _next_floor(floor, move)
        visited.append(floor)
    return visited
