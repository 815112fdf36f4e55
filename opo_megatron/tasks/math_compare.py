r"""Whether two forms of answers (`math_forms.py`) are equal.

Neither side is rounded, completed or repaired: percent signs, units, order, brackets and dots count.
What a side leaves out is not asked for: a unit, the name of a variable, the text of a choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

from opo_megatron.tasks.math_expression import (
    constant,
    is_multiple,
    same_expression,
    same_value,
)
from opo_megatron.tasks.math_forms import (
    DOTS,
    Chain,
    Choice,
    Form,
    Group,
    Interval,
    Named,
    Quantity,
    Region,
    Relation,
    Words,
    region,
    words_of,
)
from opo_megatron.tasks.math_notation import compact

Part = TypeVar("Part")


def same(answer: Form, gold: Form) -> bool:
    """Whether an answer is the gold answer; the same with both exchanged, but for an open interval.

    `(0, 1)` is an interval as an answer to `0 < x < 1`, and may be a point as a gold answer.
    """
    if isinstance(answer, Choice) or isinstance(gold, Choice):
        return _same_choice(answer, gold)
    if isinstance(answer, Relation) or isinstance(gold, Relation):
        return _same_relation(answer, gold)
    if isinstance(answer, Named) or isinstance(gold, Named):
        return _same_named(answer, gold)
    if isinstance(answer, Chain) or isinstance(gold, Chain):
        return all(same(one, other) for one in _values(answer) for other in _values(gold))
    if isinstance(answer, Region) or isinstance(gold, Region):
        return _same_region(region(answer, is_interval=True), region(gold))
    if isinstance(answer, Group) or isinstance(gold, Group):
        return _same_group(answer, gold)
    if isinstance(answer, Words) or isinstance(gold, Words):
        return words_of(_text(answer)) == words_of(_text(gold))
    return _same_quantity(answer, gold)


def _text(form: Form) -> str:
    return form.text if isinstance(form, Words | Quantity) else ""


def _values(form: Form) -> tuple[Form, ...]:
    return form.values if isinstance(form, Chain) else (form,)


def _same_choice(answer: Form, gold: Form) -> bool:
    """By letter where both have one, else by what the letter stands for; what both give must agree."""
    if not isinstance(answer, Choice):
        answer, gold = gold, answer
    assert isinstance(answer, Choice)
    if not isinstance(gold, Choice):
        content = answer.content if answer.content is not None else Words(answer.letter)
        return same(content, gold)
    if answer.letter != gold.letter:
        return False
    return answer.content is None or gold.content is None or same(answer.content, gold.content)


def _same_named(answer: Form, gold: Form) -> bool:
    if isinstance(answer, Named) and isinstance(gold, Named):
        if _may_be_one(compact(answer.name), compact(gold.name)):
            return same(answer.value, gold.value)
        return _same_equation(answer.sides, gold.sides)
    if isinstance(answer, Named):
        return same(answer.value, gold)
    return isinstance(gold, Named) and same(answer, gold.value)


def _may_be_one(one: str, other: str) -> bool:
    """Whether two names may be the same thing's: equal ones, `y` and `f(x)`, words and a symbol."""
    values = [bool(re.fullmatch(r"y|[a-z]\([a-z]\)", name)) for name in (one, other)]
    words = [name.startswith("\\text") for name in (one, other)]
    return one == other or all(values) or words[0] != words[1]


def _same_relation(answer: Form, gold: Form) -> bool:
    """Equations up to a factor, inequalities up to a positive one."""
    sides = []
    for form in (answer, gold):
        if isinstance(form, Named):
            sides.append(("=", *form.sides))
        elif isinstance(form, Relation):
            sides.append((form.sign, form.left, form.right))
        else:
            return False
    if sides[0][0] != sides[1][0]:
        return False
    differences = [f"({left})-({right})" for _, left, right in sides]
    return is_multiple(differences[0], differences[1], positive=sides[0][0] not in ("=", r"\ne"))


def _same_equation(one: tuple[str, str], other: tuple[str, str]) -> bool:
    return is_multiple(f"({one[0]})-({one[1]})", f"({other[0]})-({other[1]})", positive=False)


def _same_region(answer: Region | None, gold: Region | None) -> bool:
    if answer is None or gold is None:
        return False
    if answer.variable and gold.variable and compact(answer.variable) != compact(gold.variable):
        return False
    return matches(answer.parts, gold.parts, _same_part)


def _same_part(one: Interval | Group, other: Interval | Group) -> bool:
    if isinstance(one, Interval) and isinstance(other, Interval):
        is_same = same(one.low, other.low) and same(one.high, other.high)
        return is_same and _ends(one) == _ends(other)
    return isinstance(one, Group) and isinstance(other, Group) and _same_group(one, other)


def _ends(interval: Interval) -> str:
    """Brackets; an infinite end is open, however it is written."""
    low = (
        "(" if isinstance(interval.low, Quantity) and r"\infty" in interval.low.text else interval.brackets[0]
    )
    high = (
        ")"
        if isinstance(interval.high, Quantity) and r"\infty" in interval.high.text
        else interval.brackets[1]
    )
    return low + high


_SETS = ("", "{}")


def _same_group(answer: Form, gold: Form) -> bool:
    if not (isinstance(answer, Group) and isinstance(gold, Group)):
        group, single = (answer, gold) if isinstance(answer, Group) else (gold, answer)
        assert isinstance(group, Group)
        values = _distinct(group.items) if group.brackets in _SETS else []
        return len(values) == 1 and same(values[0], single)
    items = answer.items, gold.items
    if _are_positions(answer, gold):
        return len(items[0]) == len(items[1]) and all(map(same, *items))
    if (
        answer.brackets in _SETS
        and gold.brackets in _SETS
        and not any(_has_dots(form) for form in (answer, gold))
    ):
        if "{}" in (answer.brackets, gold.brackets):
            items = tuple(_distinct(items[0])), tuple(_distinct(items[1]))
        return matches(*items, same)
    is_bracketed = answer.brackets == gold.brackets or {answer.brackets, gold.brackets} == {"", "{}"}
    return is_bracketed and len(items[0]) == len(items[1]) and all(map(same, *items))


def _are_positions(one: Group, other: Group) -> bool:
    """Whether one list names different variables, and the other only values: `1, 2` for `x = 1, y = 2`."""
    names = [
        [compact(item.name) for item in group.items if isinstance(item, Named)] for group in (one, other)
    ]
    longer = max(names, key=len)
    return not min(names, key=len) and len(set(longer)) == len(longer) > 1


def _has_dots(group: Group) -> bool:
    return any(isinstance(item, Words) and DOTS in item.text for item in group.items)


def _distinct(items: Sequence[Form]) -> list[Form]:
    kept: list[Form] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def matches(one: Sequence[Part], other: Sequence[Part], equal: Callable[[Part, Part], bool]) -> bool:
    """Whether two sequences hold equal parts, in any order, each as often."""
    if len(one) != len(other):
        return False
    left = list(other)
    for part in one:
        index = next((index for index, candidate in enumerate(left) if equal(part, candidate)), None)
        if index is None:
            return False
        del left[index]
    return True


def _same_quantity(answer: Form, gold: Form) -> bool:
    assert isinstance(answer, Quantity) and isinstance(gold, Quantity)
    if answer.is_percent != gold.is_percent:
        percent, number = (answer, gold) if answer.is_percent else (gold, answer)
        return number.unit is None and _is_percentage(percent.text, number.text)
    if answer.nouns and gold.nouns and not (answer.nouns <= gold.nouns or gold.nouns <= answer.nouns):
        return False
    if (answer.unit is None and answer.nouns and gold.unit) or (
        gold.unit is None and gold.nouns and answer.unit
    ):
        return False
    scale = Fraction(1)
    if answer.unit is not None and gold.unit is not None:
        if answer.unit[:2] != gold.unit[:2]:
            return False
        scale = (answer.unit.size / gold.unit.size) ** gold.unit.power
    if scale != 1:
        values = constant(answer.text), constant(gold.text)
        return (
            isinstance(values[0], Fraction)
            and isinstance(values[1], Fraction)
            and values[0] * scale == values[1]
        )
    return compact(answer.text) == compact(gold.text) or same_expression(answer.text, gold.text)


def _is_percentage(percent: str, number: str) -> bool:
    r"""Whether p\% is this number: a hundredth of p; also p itself, where p is above 1: `50` for `50\%`."""
    if same_expression(rf"\frac{{{percent}}}{{100}}", number):
        return True
    value = constant(percent)
    other = constant(number)
    if value is None or other is None or not isinstance(value, Fraction):
        return False
    return abs(value) > 1 and same_value(value, other)
