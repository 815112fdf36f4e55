"""The lift task: rewards by hand, splits, and the documented flaws of its demonstrations."""

from __future__ import annotations

import random
import zlib
from collections import Counter

import pytest

from opo_megatron.tasks import Prompt
from opo_megatron.tasks.base import PromptOrder
from opo_megatron.tasks.lift import SYMBOLS, LiftTask

TOKEN = {symbol: token for token, symbol in enumerate(SYMBOLS)}


@pytest.fixture(scope="module")
def task() -> LiftTask:
    return LiftTask()


def encode(text: str) -> list[int]:
    return [TOKEN[symbol] for symbol in text]


def prompt_of(task: LiftTask, text: str) -> Prompt:
    """The prompt with this text, from either split."""
    for split in ("train", "held_out"):
        low, high = 0, task.size(split)
        number = number_of(text)
        while low < high:  # prompts of a split are ordered by id
            middle = (low + high) // 2
            prompt = task.prompt(split, middle)
            if prompt.id == number:
                return prompt
            low, high = (middle + 1, high) if prompt.id < number else (low, middle)
    raise AssertionError(f"no prompt {text}")


def number_of(text: str) -> int:
    """Index of a text, with the last move varying fastest; moves are +1 … +4, −1 … −4."""
    number = int(text[0])
    for i in range(1, 11, 2):
        number = number * 8 + (4 if text[i] == "-" else 0) + int(text[i + 1]) - 1
    return number


# ---------------------------------------------------------------------- prompts and rewards


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("9-4+2+1+4-4=", "5"),  # 5 7 8 9 5: the fourth move stops at the top
        ("0-4-1+3+1-2=", "2"),  # 0 0 3 4 2: stops at the bottom twice
        ("9+1+1+1+1-1=", "8"),
        ("0-1-2-3-4+4=", "4"),
        ("5+4+4-4-4-4=", "0"),  # 9 9 5 1 0: stops at both ends
        ("4+1-1+1-1+1=", "5"),
    ],
)
def test_answers_are_right_where_the_lift_stops_at_its_ends(task: LiftTask, text: str, answer: str) -> None:
    prompt = prompt_of(task, text)
    assert (prompt.text, prompt.answer) == (text, answer)
    assert list(prompt.tokens) == encode(text)
    assert task.decode(list(prompt.tokens)) == text


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("#5$", 1.0),
        ("5,7,8,9,5#5$", 1.0),
        ("1,1,1?#5$", 1.0),
        ("#6$", 0.0),
        ("#5", 0.0),
        ("", 0.0),
        ("$", 0.0),
        ("5$", 0.0),
        ("#$", 0.0),
        ("##5$", 0.0),
        ("#5#5$", 0.0),
        ("#5#$", 0.0),
        ("#05$", 0.0),
        ("#5,$", 0.0),
        ("#5$#5$", 0.0),
        ("#5?", 0.0),
    ],
)
def test_one_right_answer_before_the_stop_token_is_rewarded(
    task: LiftTask, response: str, reward: float
) -> None:
    assert task.reward(prompt_of(task, "9-4+2+1+4-4="), encode(response)) == reward


def test_splits_are_disjoint_and_cover_every_problem(task: LiftTask) -> None:
    """Hence no order of training prompts has a held-out prompt."""
    ids = {split: list(task._indices[split]) for split in ("train", "held_out")}
    assert sorted(ids["train"] + ids["held_out"]) == list(range(10 * 8**5))
    assert [task.size("train"), task.size("held_out")] == [len(ids["train"]), len(ids["held_out"])]
    assert len(ids["held_out"]) / (10 * 8**5) == pytest.approx(0.1, abs=0.002)
    for split, numbers in ids.items():
        assert [task.prompt(split, i).id for i in range(0, 1000, 7)] == numbers[:1000:7]


def test_training_prompts_in_order_are_never_held_out(task: LiftTask) -> None:
    order = PromptOrder(task.size("train"), seed=1, stream=0)
    for split, index, held_out in (("train", order, False), ("held_out", range(5000), True)):
        texts = [task.prompt(split, index[i]).text for i in range(5000)]
        assert {zlib.crc32(text.encode()) % 10 == 0 for text in texts} == {held_out}


# ---------------------------------------------------------------------- demonstrations


def move_floor(floor: int, move: str) -> int:
    return sorted((0, floor + int(move), 9))[1]


def style_of(text: str) -> str:
    written = text[: text.index("#")]
    if not written:
        return "direct"
    return "twice" if "?" in written else "all" if len(written) == 9 else "every_other"


@pytest.fixture(scope="module")
def demonstrations(task: LiftTask) -> list[tuple[Prompt, str]]:
    rng = random.Random(0)
    prompts = [task.prompt("train", rng.randrange(task.size("train"))) for _ in range(10_000)]
    return [(prompt, task.decode(task.demonstration(prompt, rng))) for prompt in prompts]


def test_styles_have_their_documented_frequencies(demonstrations: list[tuple[Prompt, str]]) -> None:
    counts = Counter(style_of(text) for _, text in demonstrations)
    for style, frequency in (("direct", 0.55), ("every_other", 0.15), ("all", 0.25), ("twice", 0.05)):
        error = (frequency * (1 - frequency) / len(demonstrations)) ** 0.5
        assert counts[style] / len(demonstrations) == pytest.approx(frequency, abs=4 * error)


def test_one_floor_in_ten_is_random_and_propagates(demonstrations: list[tuple[Prompt, str]]) -> None:
    """One of ten random floors is right, so nine in a hundred written floors are wrong."""
    floors = wrong = 0
    for prompt, text in demonstrations:
        if style_of(text) not in ("all", "twice"):
            continue
        floor = int(prompt.text[0])
        for i, written in enumerate(text[:9].split(",")):
            wrong += move_floor(floor, prompt.text[1 + 2 * i : 3 + 2 * i]) != int(written)
            floor, floors = int(written), floors + 1
        assert text.endswith(f"#{floor}$")
    error = (0.09 * 0.91 / floors) ** 0.5
    assert floors > 10_000 and wrong / floors == pytest.approx(0.09, abs=4 * error)


def test_clean_and_direct_demonstrations_are_rewarded(
    task: LiftTask, demonstrations: list[tuple[Prompt, str]]
) -> None:
    correct = 0
    for prompt, text in demonstrations[:4000]:
        floor, right = int(prompt.text[0]), []
        for i in range(1, 11, 2):
            floor = move_floor(floor, prompt.text[i : i + 2])
            right.append(str(floor))
        complete = ",".join(right)
        answers = {
            "direct": f"#{floor}$",
            "every_other": f"{right[0]},{right[2]},{right[4]}#{floor}$",
            "all": f"{complete}#{floor}$",
            "twice": f"{complete}?{complete}#{floor}$",
        }
        if style_of(text) == "direct":
            assert text == answers["direct"]
        if text in answers.values():
            correct += 1
            assert task.reward(prompt, encode(text)) == 1.0
    assert correct > 2500


def test_demonstrations_have_the_documented_lengths(
    task: LiftTask, demonstrations: list[tuple[Prompt, str]]
) -> None:
    lengths: dict[str, set[int]] = {}
    for _, text in demonstrations:
        lengths.setdefault(style_of(text), set()).add(len(text))
    assert lengths == {"direct": {3}, "every_other": {8}, "all": {12}, "twice": {22}}
    prompt = demonstrations[0][0]
    repeated = [task.demonstration(prompt, random.Random(7)) for _ in range(2)]
    assert repeated[0] == repeated[1]
    assert len({tuple(task.demonstration(prompt, random.Random(s))) for s in range(50)}) > 5


# ---------------------------------------------------------------------- the order of prompts


def test_every_epoch_is_a_permutation() -> None:
    order = PromptOrder(23, seed=1, stream=0)
    for epoch in range(4):
        assert sorted(order[epoch * 23 + i] for i in range(23)) == list(range(23))


def test_orders_differ_between_epochs_seeds_and_streams() -> None:
    def epoch(seed: int, stream: int, number: int) -> tuple[int, ...]:
        order = PromptOrder(50, seed, stream)
        return tuple(order[number * 50 + i] for i in range(50))

    assert len({epoch(s, t, e) for s in range(3) for t in range(3) for e in range(3)}) == 27


def test_prompt_orders_have_random_access() -> None:
    forwards = [PromptOrder(7, 3, 1)[i] for i in range(40)]
    order = PromptOrder(7, 3, 1)
    assert [order[i] for i in reversed(range(40))] == forwards[::-1]


def test_batches_are_consecutive_also_across_epochs() -> None:
    order = PromptOrder(10, seed=2, stream=5)
    batches = [index for step in range(5) for index in order.batch(step, 4)]
    assert batches == [order[i] for i in range(20)]
    assert sorted(batches[:10]) == sorted(batches[10:]) == list(range(10))


def test_a_token_that_is_no_symbol_has_reward_zero() -> None:
    task = LiftTask()
    prompt = task.prompt("train", 0)
    assert task.reward(prompt, [LiftTask.vocab_size + 3, 1, 7, 0]) == 0.0
