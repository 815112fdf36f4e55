"""The lift's options: harder problems, and one sentence for what it has not."""

from __future__ import annotations

import random
import re
import zlib
from typing import Any

import pytest

from opo_megatron.errors import UserError
from opo_megatron.tasks.lift import ENUMERATED, HELD_OUT_IN, SAMPLED, SYMBOLS, LiftTask


def floor_after(text: str, floors: int) -> int:
    """By hand, from the text of a prompt."""
    start, *moves = [int(number) for number in re.findall(r"[+-]?\d+", text)]
    for move in moves:
        start = max(0, min(floors - 1, start + move))
    return start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"floors": 30},
        {"floors": 60, "largest_move": 6},
        {"floors": 1000, "moves": 12, "largest_move": 9},
        {"moves": 12},
        {"floors": 2, "moves": 6, "largest_move": 1},
    ],
)
def test_prompts_of_a_harder_lift_are_right_and_split_by_their_hash(
    options: dict[str, int],
) -> None:
    task = LiftTask(options)
    for split in ("train", "held_out"):
        size = task.size(split)
        assert size == SAMPLED if task.problems > ENUMERATED else 0 < size < task.problems
        for index in random.Random(0).sample(range(size), min(size, 200)):
            prompt = task.prompt(split, index)
            assert prompt.answer == str(floor_after(prompt.text, task.floors))
            assert (zlib.crc32(prompt.text.encode()) % HELD_OUT_IN == 0) == (split == "held_out")
            assert task.decode(list(prompt.tokens)) == prompt.text
            assert len(re.findall(r"[+-]\d", prompt.text)) == task.moves
            assert task.prompt(split, index) == prompt
            demonstration = task.demonstration(prompt, random.Random(index))
            assert demonstration[-1] in task.stop_tokens
            right = [*map(SYMBOLS.index, f"#{prompt.answer}"), 0]
            assert task.reward(prompt, right) == 1.0 and task.reward(prompt, right[:-1]) == 0.0


def test_prompts_that_are_not_enumerated_have_ids_of_their_own() -> None:
    task = LiftTask({"floors": 100, "largest_move": 9})
    prompts = [task.prompt("train", index) for index in range(2000)]
    assert len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts}) > 1990


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"floor": 3},
            "task.options.floor is 3, but the lift has only floors, moves, largest_move, easy_moves, asks; "
            "remove it",
        ),
        (
            {"floors": 2, "moves": 1, "largest_move": 1},
            "task.options={'floors': 2, 'moves': 1, 'largest_move': 1} make a lift of 4 problems, none of "
            "which is in one of the splits; raise moves",
        ),
        ({"floors": 1}, "task.options.floors is 1; it must be a whole number from 2 to 1000"),
        ({"floors": "ten"}, "task.options.floors is 'ten'; it must be a whole number from 2 to 1000"),
        ({"moves": 2.5}, "task.options.moves is 2.5; it must be a whole number from 1 to 32"),
        ({"moves": True}, "task.options.moves is True; it must be a whole number from 1 to 32"),
        ({"largest_move": 10}, "task.options.largest_move is 10; it must be a whole number from 1 to 9"),
    ],
)
def test_a_wrong_option_of_the_lift_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        LiftTask(options)
    assert str(error.value) == sentence
