"""The laws by which the verifier `number` reads the last number of a text."""

from __future__ import annotations

from decimal import Decimal

import pytest

from opo_megatron.tasks.verifiers import last_number, number

LAWS: dict[str, list[tuple[str, str | None]]] = {
    "a minus sign is read in every alphabet, where nothing stands before it to subtract from": [
        ("−5", "-5"), ("is –5.", "-5"), (r"-\$5", "-5"), ("_-5_", "-5"), ("3–5", "5"),
        ("－5", "-5"), ("it is -5", "-5"), ("(-5)", "-5"), ("= -5", "-5"), ("-$5", "-5"),
        ("−$1,234.50", "-1234.50"),
        ("3-5", "5"), ("3−5", "5"), ("x-5", "5"), ("(3)-5", "5"), ("2024-11-27", "27"), ("3 -5", "-5"),
        ("5--3", "-3"), ("-.5", "-0.5"),
    ],
    "an exponent belongs to its number": [
        ("1.5e3", "1500"), ("1E+3", "1000"), ("1e-05", "0.00001"), ("1.5 × 10^3", "1500"),
        (r"1.5\times 10^{-3}", "0.0015"), ("1.5×10³", "1500"),
        ("2 * 10^2", "200"), ("-1e400", "-1e400"), ("1e", "1"), ("e5", "5"), ("12 x 10 = 120", "120"),
        ("3e5.5", "5.5"),
    ],
    "thousands are separated by commas, thin spaces and no-break spaces": [
        ("1,234", "1234"), ("1,234,567.8", "1234567.8"), ("1\u2009500", "1500"), ("1\u202f500", "1500"),
        ("1\u00a0234\u00a0567", "1234567"), ("1{,}234", "1234"),
        (r"1\,234", "1234"), ("1,00,000", "100000"), ("1,2", "2"), ("1, 234", "234"), ("1 234", "234"),
        ("1,234,5", "5"), ("1,2345", "2345"),
    ],
    "what stands around a number is not part of it": [
        ("5.", "5"), ("5.0", "5"), (".5", "0.5"), ("$5!", "5"), ("5%", "5"), ("+5", "5"), ("１２", "12"),
        ("#5#", "5"), ("no digits", None), ("", None), ("-", None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_the_last_number_is_read_by_law(law: str) -> None:
    misread = {
        text: last_number(text)
        for text, value in LAWS[law]
        if last_number(text) != (None if value is None else Decimal(value))
    }
    assert not misread, law


def test_numbers_are_compared_exactly_and_by_value() -> None:
    assert number("?", "so 1e22", "10000000000000000000000") == 1.0
    assert number("?", "0.00001", "1e-05") == 1.0
    assert number("?", "0.1", "0.1000000000000000055511151231257827") == 0.0
    assert number("?", "1e22", "22") == 0.0
