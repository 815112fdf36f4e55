"""Problems from files: reading, tokenizing, splitting, verifying, and errors for bad data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.messages import message
from opo_megatron.tasks.reasoning_gym import ReasoningGymTask
from opo_megatron.tasks.rows import parse_hub
from opo_megatron.tasks.text import HELD_OUT_IN, TextTask
from opo_megatron.tasks.tokenizers import ByteTokenizer, FolderTokenizer
from opo_megatron.tasks.verifiers import exact, last_number, number, regex
from tests.support.paths import ROOT
from tests.support.requirements import require
from tests.support.tokenizer_folder import make_tokenizer

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"It is easy. #### {2 * i}"} for i in range(200)]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_of(path: str, **changes: object) -> TextTask:
    settings = {"data": path, "answer_pattern": "#### (.+)", "verifier": "number"} | changes
    return TextTask(TaskConfig(name="text", **settings))


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize(
    "response, answer, reward",
    [
        ("so 12", "12", 1.0),
        ("3 then 4", "4", 1.0),
        ("1,000.0", "1000", 1.0),
        ("-7", "7", 0.0),
        ("x = -0.50", "-.5", 1.0),
        ("none", "4", 0.0),
        ("4 apples, no 5", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_number_compares_the_last_numbers_by_value(response: str, answer: str, reward: float) -> None:
    assert number("?", response, answer) == reward


def test_exact_and_regex_verifiers() -> None:
    assert exact("?", " Paris\n", "Paris") == 1.0 and exact("?", "paris", "Paris") == 0.0
    verify = regex(r"<a>(.*?)</a>")
    assert verify("?", "<a>1</a> no, <a>2</a>", "2") == 1.0
    assert verify("?", "<a>1</a> no, <a>2</a>", "1") == 0.0 and verify("?", "2", "2") == 0.0
    assert last_number("no digits") is None


def test_byte_tokens_round_trip_any_text_and_stop_decodes_to_nothing() -> None:
    tokenizer = ByteTokenizer()
    for text in ("plain", "Größe π ≈ 3", "数"):
        assert tokenizer.decode([*tokenizer.encode(text), 256]) == text
    assert tokenizer.decode([0xFF, 256]) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match="chat template"):
        tokenizer.chat([message("user", "hello")])


def test_rows_become_prompts_in_the_template_with_their_answers(tmp_path: Path) -> None:
    task = task_of(write_jsonl(tmp_path / "d.jsonl", ROWS), template="Q: {prompt} A:")
    prompts = {}
    for split in ("train", "held_out"):
        for i in range(task.size(split)):
            prompt = task.prompt(split, i)
            assert task.decode(list(prompt.tokens)) == f"Q: {prompt.text} A:"
            prompts[prompt.text] = prompt
    assert {text: p.answer for text, p in prompts.items()} == {r["question"]: r["answer"][17:] for r in ROWS}
    assert len({p.id for p in prompts.values()}) == len(ROWS) == task.size("train") + task.size("held_out")
    assert 0.3 < HELD_OUT_IN * task.size("held_out") / len(ROWS) < 2
    prompt = task.prompt("train", 3)
    assert task.reward(prompt, [*prompt.answer.encode(), 256]) == 1.0
    assert task.reward(prompt, list(b"-1")) == 0.0


def test_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS, *({"question": "long " * 50 + str(i), "answer": "#### 1"} for i in range(7))]
    task = task_of(write_jsonl(tmp_path / "d.jsonl", rows), max_prompt_tokens=40)
    assert len([*task.dropped("train"), *task.dropped("held_out")]) == 7 and task.size("train") + task.size(
        "held_out"
    ) == len(ROWS)
    assert "7 dropped as too long" in task.notes[0]


def test_a_held_out_file_is_the_whole_held_out_split(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "h.jsonl", ROWS[:20])
    task = task_of(write_jsonl(tmp_path / "d.jsonl", ROWS[20:]), held_out_data=held_out)
    assert (task.size("train"), task.size("held_out")) == (180, 20)


def test_parquet_reads_the_same_as_jsonl(tmp_path: Path) -> None:
    parquet, arrow = require("pyarrow.parquet", "make setup-dev"), require("pyarrow", "make setup-dev")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    ours = task_of(str(tmp_path / "d.parquet"))
    theirs = task_of(write_jsonl(tmp_path / "d.jsonl", ROWS))
    assert [ours.prompt("train", i) for i in range(100)] == [theirs.prompt("train", i) for i in range(100)]


def test_a_user_verifier_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def length(prompt, response, answer): return len(response) / 10\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    task = task_of(path, verifier="mine:length")
    assert task.reward(task.prompt("train", 0), list(b"12345")) == 0.5
    assert "mine" not in sys.modules
    task.close()


def test_tokenizer_of_a_folder_with_stop_tokens_and_chat(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %} ?"
    folder = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=template)
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    tokenizer = FolderTokenizer(Path(folder))
    assert tokenizer.stop_tokens == (1, 5) and tokenizer.vocab_size == 17
    assert tokenizer.chat([message("user", "What is 3")]) == [6, 2, 3, 10, 5]
    assert tokenizer.decode([2, 3, 1]) == "What is"


def test_reasoning_gym_rewards_are_its_own_scores() -> None:
    require("reasoning_gym", "make setup-dev")
    config = TaskConfig(name="reasoning_gym", generator="chain_sum", generator_size=50)
    task = ReasoningGymTask(config)
    assert task.size("train") == task.size("held_out") == 50
    texts = {split: [task.prompt(split, i).text for i in range(50)] for split in ("train", "held_out")}
    assert texts["train"] != texts["held_out"]
    for split in ("train", "held_out"):
        prompt = task.prompt(split, 4)
        assert task.reward(prompt, [*prompt.answer.encode(), 256]) == 1.0
        assert task.reward(prompt, list(b"not a number")) < 1.0
    strict = ReasoningGymTask(TaskConfig(**{**vars(config), "reward_threshold": 1.0}))
    assert strict.reward(strict.prompt("train", 0), list(b"not a number")) == 0.0


def test_an_answer_on_which_the_scorer_raises_is_wrong() -> None:
    require("reasoning_gym", "make setup-dev")
    task = ReasoningGymTask(
        TaskConfig(name="reasoning_gym", generator="prime_factorization", generator_size=5)
    )
    assert task.reward(task.prompt("train", 0), list(b"x * y")) == 0.0


def test_a_scorer_that_fails_on_the_gold_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    require("reasoning_gym", "make setup-dev")
    task = ReasoningGymTask(TaskConfig(name="reasoning_gym", generator="chain_sum", generator_size=5))

    def broken(answer: str, entry: dict) -> float:
        raise KeyError("oops")

    monkeypatch.setattr(task._items["train"], "score_answer", broken)
    with pytest.raises(UserError) as error:
        task.reward(task.prompt("train", 0), list(b"1"))
    assert "the scorer of task.generator=chain_sum raised KeyError" in one_sentence(error)


@pytest.mark.parametrize(
    "source, parts",
    [
        ("hub:a/b", ("a/b", None, "train")),
        ("hub:a/b:test", ("a/b", None, "test")),
        ("hub:a/b:main", ("a/b", "main", "train")),
        ("hub:a/b:main:test", ("a/b", "main", "test")),
        ("hub:a/b::dev", ("a/b", None, "dev")),
        ("hub:a/b:test[:10]", ("a/b", None, "test[:10]")),
        ("hub:a/b:main:test[5:10]", ("a/b", "main", "test[5:10]")),
    ],
)
def test_a_hub_source_has_repository_configuration_and_split(source: str, parts: tuple) -> None:
    assert parse_hub(source) == parts


@pytest.mark.parametrize("source", ["hub:", "hub:a/b:c:d:e"])
def test_a_malformed_hub_source_is_one_sentence(source: str) -> None:
    with pytest.raises(UserError, match="write it like hub:owner/name:config:split") as error:
        parse_hub(source)
    one_sentence(error)


def test_a_missing_datasets_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as error:
        task_of("hub:openai/gsm8k:main:train")
    assert "reading hub:openai/gsm8k:main:train needs datasets" in one_sentence(error)
    assert "pip install 'opo-megatron[data]'" in str(error.value)


def test_a_local_folder_reads_like_a_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("datasets", "make setup-dev")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "set" / "test.jsonl", ROWS[:20])
    ours = task_of(f"hub:{tmp_path / 'set'}", held_out_data=f"hub:{tmp_path / 'set'}:test")
    theirs = task_of(
        str(tmp_path / "set" / "train.jsonl"), held_out_data=str(tmp_path / "set" / "test.jsonl")
    )
    assert (ours.size("train"), ours.size("held_out")) == (200, 20)
    assert [ours.prompt("train", i) for i in range(200)] == [theirs.prompt("train", i) for i in range(200)]
    with pytest.raises(UserError, match=r"split validation \(") as error:
        task_of(f"hub:{tmp_path / 'set'}:validation")
    one_sentence(error)
