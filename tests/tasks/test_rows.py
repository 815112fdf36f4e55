"""Rows of files: what each format is called, marks of encodings, and numbers that keep their value."""

from __future__ import annotations

import gzip
import json
import math
import random
import struct
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from opo_megatron.errors import UserError
from opo_megatron.tasks.fields import RowError, find_field, scalar_text, text_of
from opo_megatron.tasks.rows import parse_json, read_rows
from tests.support.requirements import require

ROWS = [{"question": "1 + 1 =", "answer": "2"}, {"question": "é 数", "answer": "3"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
GZIPPED = gzip.compress(LINES.encode(), mtime=0)
"""Without the time, which would be in the test's name."""
LIST = json.dumps(ROWS, ensure_ascii=False)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(str(path)))
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    return text.replace(str(path.parent) + "/", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", LINES.encode()),
        ("mark.jsonl", LINES.encode("utf-8-sig")),
        ("joined.jsonl", b"".join(line.encode("utf-8-sig") for line in LINES.splitlines(keepends=True))),
        ("windows.jsonl", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
        ("blank.jsonl", ("\ufeff\n\n" + LINES + "\n").encode()),
        ("lines.json", LINES.encode("utf-8-sig")),
        ("list.json", LIST.encode()),
        ("mark.json", LIST.encode("utf-8-sig")),
        ("indented.json", ("\n " + json.dumps(ROWS, indent=2)).encode("utf-8-sig")),
        ("UPPER.JSONL", LINES.encode()),
    ],
)
def test_utf_8_is_read_with_and_without_its_mark(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_rows(str(tmp_path / name))] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", LIST.encode(), "a.jsonl is one JSON list, not a row per line; name it a.json"),
        (
            "a.jsonl",
            json.dumps(ROWS, indent=1).encode("utf-8-sig"),
            "a.jsonl is one JSON list, not a row per line; name it a.json",
        ),
        (
            "a.json",
            json.dumps({"data": ROWS, "version": 1}, indent=1).encode(),
            "a.json is one JSON object (with data, version), not a list of rows; write its rows as one list",
        ),
        (
            "a.jsonl",
            "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
            "a.jsonl has JSON objects of several lines; write one object per line",
        ),
        (
            "a.csv",
            b"question,answer\n",
            "a.csv is neither .jsonl nor .parquet; convert it to one of them, for example with pandas.",
        ),
        ("a.txt", b"1 + 1\n", "a.txt is neither .jsonl nor .parquet; convert it to one of them"),
        ("a.jsonl", b"question,answer\n", "a.jsonl, line 1 is not JSON"),
        (
            "a.jsonl",
            b'{"question":' + b"[" * 9_999,
            "a.jsonl, line 1 is not JSON (its brackets are nested too deep)",
        ),
        ("a.jsonl.gz", GZIPPED, "a.jsonl.gz is compressed by gzip; unpack it"),
        ("a.jsonl", GZIPPED, "a.jsonl is compressed by gzip; unpack it with gunzip"),
        ("a.jsonl", b"PK\x03\x04rest", "a.jsonl is a zip archive; unpack it with unzip"),
        ("a.jsonl", b"\x28\xb5\x2f\xfdrest", "a.jsonl is compressed by zstd; unpack it with unzstd"),
        ("a.jsonl", LINES.encode("utf-16"), "a.jsonl is UTF-16 text; convert it to UTF-8"),
        ("a.jsonl", LINES.encode("utf-16-le"), "a.jsonl is UTF-16 text; convert it to UTF-8"),
        ("a.json", LIST.encode("utf-16-be"), "a.json is UTF-16 text; convert it to UTF-8"),
        ("a.jsonl", b"PAR1rest", "a.jsonl is a Parquet file; name it a.parquet"),
        ("a.parquet", LINES.encode(), "a.parquet is JSON text, not Parquet; name it a.jsonl"),
        ("a.parquet", LIST.encode(), "a.parquet is JSON text, not Parquet; name it a.json"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a.parquet is a pointer of Git LFS, not the data; fetch the data with git lfs pull",
        ),
        ("a.jsonl", b"\n<!DOCTYPE html>\n<html>", "a.jsonl is a web page, not the data; download the file"),
    ],
)
def test_a_file_that_is_something_else_is_named_as_what_it_is(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + LINES + "\n{oops\n")
    assert "a.jsonl, line 5 is not JSON" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n" + LINES)
    assert [number for number, _ in read_rows(str(tmp_path / "b.jsonl"))] == [2, 3]


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("8", "8"),
        ("8.0", "8.0"),
        ("1.50", "1.50"),
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("1e22", "10000000000000000000000"),
        ("1E5", "100000"),
        ("1.5e3", "1500"),
        ("-2.5e-3", "-0.0025"),
        ("0.1", "0.1"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("1" + "0" * 500, "1" + "0" * 500),
        ("1e400", "1" + "0" * 400),
    ],
)
def test_a_number_of_json_keeps_its_digits_and_has_no_exponent(written: str, text: str) -> None:
    assert scalar_text(parse_json(f'{{"answer": {written}}}')["answer"]) == text


def test_the_text_of_any_number_of_json_reads_back_as_that_number() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        digits = "".join(rng.choices("0123456789", k=rng.randint(1, 25))).lstrip("0") or "0"
        fraction = (
            "." + "".join(rng.choices("0123456789", k=rng.randint(1, 25))) if rng.random() < 0.5 else ""
        )
        exponent = f"{rng.choice('eE')}{rng.choice(['', '+', '-'])}{rng.randint(0, 300)}"
        written = rng.choice(["", "-"]) + digits + fraction + (exponent if rng.random() < 0.5 else "")
        text = scalar_text(parse_json(written))
        assert text is not None and "e" not in text.lower()
        assert Decimal(text) == Decimal(written)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (8.0, "8"),
        (2.5, "2.5"),
        (1e22, "10000000000000000000000"),
        (0.00001, "0.00001"),
        (1e-7, "0.0000001"),
        (0.1, "0.1"),
        (-0.3, "-0.3"),
        (1 / 3, "0.3333333333333333"),
        (123456789012345680.0, "123456789012345680"),
        (np.float32(0.1), "0.1"),
        (np.float32(16777216), "16777216"),
        (np.float16(0.2), "0.2"),
        (12, "12"),
        (2**63, "9223372036854775808"),
        (Decimal("12.50"), "12.50"),
        (Decimal("1E+2"), "100"),
    ],
)
def test_a_number_of_a_table_is_its_shortest_text(number: object, text: str) -> None:
    assert scalar_text(number) == text


@pytest.mark.parametrize(("kind", "pattern"), [(np.float64, "d"), (np.float32, "f"), (np.float16, "e")])
def test_the_text_of_any_float_reads_back_as_that_float(kind: type, pattern: str) -> None:
    rng = random.Random(2)
    size = struct.calcsize(pattern)
    for _ in range(3000):
        number = kind(struct.unpack(pattern, rng.randbytes(size))[0])
        text = scalar_text(number)
        if not math.isfinite(number):
            assert text is None
            continue
        assert text is not None and "e" not in text and not text.endswith(".0")
        assert kind(text) == number
        assert len(Decimal(text).normalize().as_tuple().digits) <= len(Decimal(str(number)).as_tuple().digits)


def test_a_column_of_parquet_gives_the_numbers_that_were_written(tmp_path: Path) -> None:
    arrow, parquet = require("pyarrow", "make setup-dev"), require("pyarrow.parquet", "make setup-dev")
    columns = {
        "float": (arrow.float64(), [8.0, 2.5, 1e22, 0.00001], ["8", "2.5", "1" + "0" * 22, "0.00001"]),
        "single": (arrow.float32(), [8.0, 0.1, 1e-5, 3.3], ["8", "0.1", "0.00001", "3.3"]),
        "int": (arrow.int64(), [8, -1, 0, 2**62], ["8", "-1", "0", str(2**62)]),
        "byte": (arrow.uint8(), [8, 1, 0, 255], ["8", "1", "0", "255"]),
        "decimal": (
            arrow.decimal128(38, 4),
            [
                Decimal("8"),
                Decimal("0.0001"),
                Decimal("-12.5"),
                Decimal("1234567890123456789012345678901234"),
            ],
            ["8.0000", "0.0001", "-12.5000", "1234567890123456789012345678901234.0000"],
        ),
        "text": (arrow.string(), ["8", "8.0", "1e22", "1e-05"], ["8", "8.0", "1e22", "1e-05"]),
        "nested": (
            arrow.struct([("truth", arrow.list_(arrow.float32())), ("style", arrow.string())]),
            [{"truth": [number], "style": "rule"} for number in (8.0, 0.1, 1e-5, 3.3)],
            None,
        ),
    }
    table = arrow.table({name: arrow.array(values, kind) for name, (kind, values, _) in columns.items()})
    parquet.write_table(table, tmp_path / "d.parquet")
    rows = [row for _, row in read_rows(str(tmp_path / "d.parquet"))]
    for name, (_, _, texts) in columns.items():
        if texts is not None:
            assert [scalar_text(row[name]) for row in rows] == texts, name
    nested = [find_field("", row, "nested.truth.0", "") for row in rows]
    assert [scalar_text(number) for number in nested] == ["8", "0.1", "0.00001", "3.3"]


def test_a_data_set_of_the_hub_gives_the_numbers_of_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("datasets", "make setup-dev")
    arrow, parquet = require("pyarrow", "make setup-dev"), require("pyarrow.parquet", "make setup-dev")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    answers = {
        "answer": arrow.array([8.0, 0.1, 1e-5], arrow.float32()),
        "cost": arrow.array([Decimal("8.50"), Decimal("0.01"), Decimal("7")], arrow.decimal128(9, 2)),
    }
    (tmp_path / "set").mkdir()
    parquet.write_table(arrow.table(answers), tmp_path / "set" / "train.parquet")
    rows = dict(read_rows(f"hub:{tmp_path / 'set'}"))
    assert [scalar_text(rows[number]["answer"]) for number in (1, 2, 3)] == ["8", "0.1", "0.00001"]
    assert [scalar_text(rows[number]["cost"]) for number in (1, 2, 3)] == ["8.50", "0.01", "7.00"]


# ---------------------------------------------------------------------- empty cells and other values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "answer is None, not text; fix or remove the row"),
        (math.nan, "answer is nan, not text"),
        (np.float32("nan"), "answer is nan, not text"),
        (Decimal("NaN"), "answer is NaN, not text"),
        (math.inf, "answer is inf, not text"),
        ("", "answer is empty, not text"),
        (" \t\n\u00a0\u2003", "answer is white space alone, not text"),
        (True, "answer is True, not text"),
        (False, "answer is False, not text"),
        (b"12", "answer is b'12', not text"),
        ([], "answer is a list of 0, not text; fix or remove the row"),
        (["34"], "answer is a list of 1, not text; name one of its entries, like task.answer_field=answer.0"),
        (
            {"value": 3},
            "answer is a mapping with value, not text; name one of its entries, like task.answer_",
        ),
        ("\ud800", "answer is '\\ud800', not text"),
        (Decimal("1e999999"), "answer is 1E+999999, not text"),
        (parse_json("1e99999999999999999999"), "answer is inf, not text"),
        (parse_json("NaN"), "answer is nan, not text"),
    ],
)
def test_a_value_that_is_neither_text_nor_a_number_is_refused_with_its_row(value: object, words: str) -> None:
    with pytest.raises(RowError) as error:
        text_of("d.jsonl, row 7", "answer", value, "task.answer_field")
    assert str(error.value).startswith("d.jsonl, row 7: ") and words in str(error.value)


# ---------------------------------------------------------------------- paths of fields

NESTED = {
    "question": "1 + 1 =",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "truths": '["34", "35"]',
    "extra.info": {"answer": "7"},
    "info": '{"answer": 0.10}',
    "a.b": "literal",
    "a": {"b": "nested"},
    "0": "zero",
    "messages": [{"role": "user", "content": "hi"}],
    "empty": None,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("question", "1 + 1 ="),
        ("reward_model.ground_truth", "2"),
        ("truths.1", "35"),
        ("extra.info.answer", "7"),
        ("info.answer", Decimal("0.10")),
        ("a.b", "literal"),
        ("0", "zero"),
        ("messages.0.content", "hi"),
        ("empty", None),
    ],
)
def test_a_field_is_found_by_its_name_or_its_path(field: str, value: object) -> None:
    found = find_field("d.jsonl, row 7", NESTED, field, "task.answer_field")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("solution", "(it has question, reward_model, truths,"),
        ("reward_model.truth", "(reward_model is a mapping with ground_truth, style)"),
        ("reward_model.ground_truth.0", "(reward_model.ground_truth is '2')"),
        ("truths.2", "(truths is a list of 2)"),
        ("truths.-1", "(truths is a list of 2)"),
        ("question.text", "(question is '1 + 1 =')"),
        ("empty.answer", "(empty is None)"),
        ("messages.content", "(messages is a list of 1)"),
        ("extra.info.solution", "(extra.info is a mapping with answer)"),
    ],
)
def test_a_missing_field_names_where_its_path_ended(field: str, words: str) -> None:
    with pytest.raises(RowError) as error:
        find_field("d.jsonl, row 7", NESTED, field, "task.answer_field")
    assert str(error.value).startswith(f"d.jsonl, row 7 has no field {field!r} ")
    assert words in str(error.value) and str(error.value).endswith("set task.answer_field")
