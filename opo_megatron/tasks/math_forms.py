r"""What an answer is: a number with its unit, a list, a tuple, an interval, a choice, words, an expression.

`read` takes an answer apart at its separators and brackets; `math_compare.py` compares the parts.

    1, 2  ·  1 and 2         Group ""        values in any order
    \{1, 2\}                 Group "{}"      the same, each value once
    (1, 2)  [1, 2]  1:2      Group "()" …    values in this order, in these brackets
    [0, 1)  0 \le x < 1      Region          a union of intervals and sets
    x = 5                    Named           a value and what has it
    (C) 5                    Choice          a letter, and what it stands for
    even                     Words
    20\%  5\text{ cm}        Quantity        an expression, and its sign or unit
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from opo_megatron.tasks.math_notation import plain
from opo_megatron.tasks.math_units import Unit, is_written_out, multiplier_of, nouns_of, unit_of


@dataclass(frozen=True)
class Quantity:
    text: str
    """An expression."""
    unit: Unit | None = None
    is_percent: bool = False
    nouns: frozenset[str] = frozenset()
    """Words behind it that are no unit."""


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Choice:
    letter: str
    content: Form | None


@dataclass(frozen=True)
class Named:
    name: str
    value: Form
    sides: tuple[str, str]
    """The equation's two texts."""


@dataclass(frozen=True)
class Chain:
    """Values joined by equality signs."""

    values: tuple[Form, ...]


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is not solved for a variable; `b < a` where `a > b` was written."""

    sign: str
    left: str
    right: str


@dataclass(frozen=True)
class Group:
    brackets: str
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Interval:
    low: Form
    high: Form
    brackets: str


@dataclass(frozen=True)
class Region:
    parts: tuple[Interval | Group, ...]
    variable: str | None = None


Form: TypeAlias = Quantity | Words | Choice | Named | Chain | Relation | Group | Region

LOWEST, HIGHEST = Quantity(r"-\infty"), Quantity(r"\infty")
DOTS = r"\dots"

_OPENING, _CLOSING = r"\\\{|[({\[]|\\langle|\\begin\{[a-z]+\*?\}", r"\\\}|[)}\]]|\\rangle|\\end\{[a-z]+\*?\}"
_AND_OR = r"\\text\{[\s,;]*(?:and|or)\s*\}|,?\s\b(?:and|or)\b\s"
_NAME = (
    r"(?:[A-Za-z]|\\(?!infty|pi(?![a-z]))[A-Za-z]+)(?:'|_\{?\w+\}?)*(?:\^\{-1\})?(?:\s*\(\s*[a-z]\s*\))?"
    r"|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)|\\text\{[^{}]*\}|\\(?:angle|triangle|overline|vec|hat)\s*\{?[A-Za-z]{1,4}\}?|[A-Z]\([^()]*\)|[a-z]\(\d+\)|[A-Z]{2,3}"
)
_MEMBER = re.compile(rf"({_NAME})\s*\\in(?![a-z])\s*(.*)")
_GREEK = "alpha|beta|gamma|delta|theta|phi|omega|lambda|mu|rho|sigma|tau|epsilon"
_SYMBOL = re.compile(rf"(?:[A-Za-z]|\\(?:{_GREEK}))(?:_\{{?\w+\}}?)?")
_VARIABLE = re.compile(rf"(?<![\\A-Za-z])[a-zA-Z](?![A-Za-z]{{2}})|\\(?:{_GREEK})(?![a-z])")
_ORDER = re.compile(r"<|>|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)\s*(?P<behind>.*)|([A-J])\s*[.:]\s*(?P<after>.*)|([A-J])")
_NO_CONTENT = re.compile(r"(?<![A-Za-z\\])[A-J]\s*[:=)]|^\\?(?:cup|cap|[-+=<>,;])|=")
"""What stands behind a letter that is no choice: `A: 5, B: 3`, `(A) \\cup (B)`."""
_DAY = re.compile(r"[A-Za-z]{3,} \d+")
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}")
_LABEL = re.compile(r"[A-Z]{2,}")
_PROSE = re.compile(r"[\s(]*[A-Za-z][A-Za-z\s'-]{2,}[\s).]*")
_TIME = re.compile(r"\d{1,2} ?: ?\d\d\s*(?:\\text\{\s*)?[ap]\.? ?m\.?\s*\}?", re.IGNORECASE)
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}\s*(?:\{[lcr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)


def read(answer: str, joins_thousands: bool = True) -> Form:
    """The form of an answer as it was written.

    Args:
        joins_thousands: whether `100,200` is one number; with a space, `100, 200` never is.
    """
    return _read(_unwrapped(plain(answer)), joins_thousands)


_ANNOUNCEMENT = re.compile(
    r"(\\text\{)?\s*(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|option|choice)\b(?:\s+is\b)?\s*[:=]?\s*"
    r"(?(1)\})\s*(?=\S)",
    re.IGNORECASE,
)
"""`The answer is`, in front of an answer."""


def _unwrapped(text: str) -> str:
    r"""Without final dots, an announcement, and what encloses all of it: `\text{…}`, `{…}`."""
    text = text.strip()
    while True:
        stripped = re.sub(r"(?<!\\dots)(?<!\\)[.;,]+$", "", text).strip()
        stripped = _ANNOUNCEMENT.sub("", stripped, count=1) if _ANNOUNCEMENT.match(stripped) else stripped
        inner = re.fullmatch(r"(?:\\text)?\{([^{}]*)\}", stripped)
        stripped = inner.group(1).strip() if inner else stripped
        if stripped == text:
            return text
        text = stripped


def _read(text: str, joins: bool) -> Form:
    if _is_prose(text):
        return Words(text)
    choice = _CHOICE.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", text, count=1))
    if choice is not None:
        letter = next(group for group in choice.group(1, 3, 5) if group)
        content = _unwrapped(choice["behind"] or choice["after"] or "")
        if not _NO_CONTENT.search(content):
            return Choice(letter, _read(content, joins) if content else None)
    if _THOUSANDS.search(text) and joins and not re.search(r"[(\[]|\\\{", text):
        text = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    for reader in (_read_union, _read_list, _read_equality, _read_order, _read_brackets):
        form = reader(text, joins)
        if form is not None:
            return form
    return _read_leaf(text)


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(
        rf"(?P<separator>{separator})|(?P<up>{_OPENING})|(?P<down>{_CLOSING})|\\text\{{[^{{}}]*\}}", text
    ):
        if match.lastgroup == "up":
            depth += 1
        elif match.lastgroup == "down":
            depth -= 1
        elif match.lastgroup == "separator" and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()] if depth == 0 else [text]


def _read_union(text: str, joins: bool) -> Form | None:
    parts = split(text, r"\\cup(?![a-z])")
    if len(parts) == 1:
        return None
    member = _MEMBER.fullmatch(text)
    if member is not None:
        parts_of = _read_union(member[2], joins)
        return Region(parts_of.parts, member[1]) if isinstance(parts_of, Region) else None
    return union([_read(part, joins) for part in parts])


def union(forms: list[Form]) -> Region | None:
    """The union of intervals and sets; None where one is neither."""
    regions = [region(form, is_interval=True) for form in forms]
    variables = {one.variable for one in regions if one is not None and one.variable}
    if None in regions or len(variables) > 1:
        return None
    parts = tuple(part for one in regions if one is not None for part in one.parts)
    return Region(parts, next(iter(variables), None))


def region(form: Form, is_interval: bool = False) -> Region | None:
    r"""The form as a set of numbers, if it is an interval, a set or a union.

    Args:
        is_interval: whether `(0, 1)` is one; otherwise only where an end is infinite.
    """
    if isinstance(form, Region):
        return form
    if isinstance(form, Group) and form.brackets == "{}":
        return Region((form,) if form.items else ())
    if isinstance(form, Group) and len(form.items) == 2 and form.brackets in ("()", "[]", "(]", "[)"):
        infinite = any(isinstance(item, Quantity) and r"\infty" in item.text for item in form.items)
        if form.brackets != "()" or is_interval or infinite:
            return Region((Interval(form.items[0], form.items[1], form.brackets),))
    return None


def _read_list(text: str, joins: bool) -> Form | None:
    for separator, is_union in (
        (r"\\text\{\s*or\s*\}|\sor\s", True),
        (rf"[,;]?\s*(?:{_AND_OR})|[,;]", False),
    ):
        parts = split(text, separator)
        if len(parts) == 1:
            continue
        items = [_read(part, joins) for part in parts if part]
        if is_union and any(isinstance(item, Region) for item in items):
            return union(items)
        both = _intersection(items) if re.search(r"\band\b", text) else None
        return both or Group("", tuple(_spread(items)))
    return None if r"\pm" not in text else _plus_minus(text, joins)


def _spread(items: list[Form]) -> list[Form]:
    r"""Items, with those of an inner list (`2, \pm 1`) among them."""
    return [
        inner
        for item in items
        for inner in (item.items if isinstance(item, Group) and item.brackets == "" else [item])
    ]


def _plus_minus(text: str, joins: bool) -> Form | None:
    r"""`1 \pm \sqrt2` is two values; with more than one sign it is unclear which."""
    if text.count(r"\pm") > 1 or re.search(r"=|<|>|[(\[]\s*\S*,", text):
        return None
    return Group("", tuple(_read(text.replace(r"\pm", sign), joins) for sign in ("+", "-")))


def _intersection(items: list[Form]) -> Region | None:
    """`x > 0 and x < 1` as one interval."""
    regions = [item for item in items if isinstance(item, Region) and len(item.parts) == 1]
    rays = [part for one in regions for part in one.parts if isinstance(part, Interval)]
    if len(rays) != 2 or len(items) != 2 or regions[0].variable != regions[1].variable:
        return None
    below, above = sorted(rays, key=lambda ray: ray.low == LOWEST)
    if above.low != LOWEST or below.high != HIGHEST or below.low == LOWEST:
        return None
    between = Interval(below.low, above.high, below.brackets[0] + above.brackets[1])
    return Region((between,), regions[0].variable)


def _read_equality(text: str, joins: bool) -> Form | None:
    member = _MEMBER.fullmatch(text)
    if member is not None:
        value = _read(member[2], joins)
        found = region(value, is_interval=True)
        return (
            Named(member[1], value, (member[1], member[2]))
            if found is None
            else Region(found.parts, member[1])
        )
    exact, *roundings = re.split(r"\\approx(?![a-z])", text)
    if roundings and (rounded := roundings[-1].strip()):
        return _read(rounded if not exact or re.fullmatch(_NAME, exact.strip()) else exact.strip(), joins)
    parts = split(text, "=")
    if len(parts) == 1 or "" in parts[1:] or _ORDER.search(text):
        return _read(parts[1], joins) if len(parts) == 2 and not parts[0] and parts[1] else None
    if not parts[0]:
        parts = parts[1:]
    named = [part for part in (parts[0], parts[-1]) if re.fullmatch(_NAME, part)]
    values = [part for part in parts if part not in named] or parts[-1:]
    if named:
        forms = tuple(_read(part, joins) for part in values)
        value = forms[0] if len(forms) == 1 else Chain(forms)
        return Named(named[0], value, (parts[0], parts[-1]))
    if len(parts) == 2 and _VARIABLE.search(re.sub(r"\\text\{[^{}]*\}", " ", text)):
        return Relation("=", *parts)
    return Chain(tuple(_read(part, joins) for part in parts))


def _read_order(text: str, joins: bool) -> Form | None:
    parts = split(text, _ORDER.pattern)
    signs = _ORDER.findall(text)
    if len(parts) < 2 or len(parts) > 3 or len(signs) != len(parts) - 1 or "" in parts:
        return None
    if signs[0] in (">", r"\ge"):
        if any(sign not in (">", r"\ge") for sign in signs):
            return None
        parts, signs = parts[::-1], [{">": "<", r"\ge": r"\le"}[sign] for sign in signs[::-1]]
    if len(parts) == 3:
        if not _SYMBOL.fullmatch(parts[1]) or any(sign not in ("<", r"\le") for sign in signs):
            return None
        brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        return Region((Interval(_read(parts[0], joins), _read(parts[2], joins), brackets),), parts[1])
    left, right = parts
    is_strict = signs[0] == "<"
    if signs[0] == r"\ne":
        name, value = (left, right) if _SYMBOL.fullmatch(left) else (right, left)
        if not _SYMBOL.fullmatch(name):
            return None
        hole = _read(value, joins)
        return Region((Interval(LOWEST, hole, "()"), Interval(hole, HIGHEST, "()")), name)
    if _SYMBOL.fullmatch(left):
        return Region((Interval(LOWEST, _read(right, joins), "()" if is_strict else "(]"),), left)
    if _SYMBOL.fullmatch(right):
        return Region((Interval(_read(left, joins), HIGHEST, "()" if is_strict else "[)"),), right)
    return Relation(signs[0], left, right)


def _read_brackets(text: str, joins: bool) -> Form | None:
    if text in (r"\mathbb{R}", r"\emptyset"):
        return Region((Interval(LOWEST, HIGHEST, "()"),) if "R" in text else ())
    removed = re.fullmatch(r"\\mathbb\{R\}\s*(?:\\setminus|-|/)\s*\\\{([^,{}]*)\\\}", text)
    if removed is not None:
        return _read_order(rf"x\ne {removed[1]}", joins)
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None:
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        cells = [
            Group("row", tuple(_read(_unwrapped(cell), joins) for cell in row.split("&"))) for row in rows
        ]
        return Group("determinant" if matrix[1] in ("vmatrix", "Vmatrix") else "matrix", tuple(cells))
    match = re.fullmatch(r"(\\\{|\\langle|[(\[])(.*)(\\\}|\\rangle|[)\]])", text, re.DOTALL)
    if match is None or len(split(text[: match.start(3)] + "\0", "\0")) > 1 or not _encloses(text):
        ratio = split(text, ":")
        is_ratio = len(ratio) > 1 and all(ratio)
        return Group(":", tuple(_read(part, joins) for part in ratio)) if is_ratio else None
    opening, inner, closing = match.groups()
    brackets = {r"\{": "{", r"\langle": "("}.get(opening, opening) + {r"\}": "}", r"\rangle": ")"}.get(
        closing, closing
    )
    if brackets == "{}":
        builder = split(inner, r"\||:")
        if len(builder) == 2:
            head = re.fullmatch(rf"({_NAME})\s*(?:\\in(?![a-z])\s*\\mathbb\{{R\}}\s*)?", builder[0])
            return Words(text) if head is None else _read(builder[1], joins)
    parts = split(inner, "[,;]")
    items = tuple(_read(part, joins=False if len(parts) > 1 else joins) for part in parts if part)
    if any(isinstance(item, Group) and item.brackets == "" for item in items):
        return _read_signs(brackets, items) or Words(text)
    if len(items) == 1 and brackets in ("()", "[]") and len(parts) == 1:
        return items[0] if brackets == "()" and not isinstance(items[0], Quantity) else None
    return Group(brackets, items)


def _read_signs(brackets: str, items: tuple[Form, ...]) -> Form | None:
    r"""`(1, \pm 2)` is two pairs; in a set, the values are more members."""
    if brackets == "{}":
        return Group(brackets, tuple(_spread(list(items))))
    lists = [item for item in items if isinstance(item, Group) and item.brackets == ""]
    if len(lists) != 1:
        return None
    at = items.index(lists[0])
    return Group("", tuple(Group(brackets, (*items[:at], one, *items[at + 1 :])) for one in lists[0].items))


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last."""
    depth = 0
    for match in re.finditer(rf"(?P<up>{_OPENING})|(?P<down>{_CLOSING})", text):
        depth += 1 if match.lastgroup == "up" else -1
        if depth == 0:
            return match.end() == len(text)
    return False


def _is_prose(text: str) -> bool:
    """Words outside of commands: a name, a weekday, `even`; also labels, times, and other alphabets."""
    if (
        _LABEL.fullmatch(text)
        or _TIME.fullmatch(text)
        or _DATE.fullmatch(text)
        or re.fullmatch(r"[A-Za-z]{3,} \d+", text)
    ):
        return True
    shown = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if any(ord(letter) > 127 and letter.isalpha() for letter in shown):
        return not re.search(r"[,;:()\[\]{}]", shown)
    if not _PROSE.fullmatch(shown):
        return False
    longest = max((len(word) for word in re.findall(r"[A-Za-z]+", shown)), default=0)
    has_separator = bool(re.search(r"\b(?:and|or)\b", shown))
    if shown.lower().strip("(). ") in ("yes", "no", "odd", "all"):
        return True
    return (longest == 3 and shown != text) or (longest > 3 and not has_separator)


_CURRENCY = r"\\\$|[€£¥₹¢]|\\text\{\s*(?:\\\$|Rs\.?|USD|EUR|GBP)\s*\}"
_SUFFIXES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"(.+?)\s*(?:\\?%|\\text\{\s*(?:percent|\\?%)\s*\}|(?<=[\d}) ])percent)"), "percent"),
    (re.compile(r"(.+?)\s*\^\{\\circ\}\s*(?:\\text\{\s*([CF])\s*\}|([CF]))?"), "degree"),
    (
        re.compile(
            r"(\d+|[a-z])\s*\^?\s*\{?\s*(?:\\text\{\s*(?:st|nd|rd|th)\s*\}|(?<=[\d{])(?:st|nd|rd|th))\s*\}?"
        ),
        "ordinal",
    ),
    (re.compile(rf"(.+?)\s*({_CURRENCY})"), "unit"),
    (re.compile(r"(.*[\d})A-Za-z!])\s*\\text\{([^{}]*)\}\s*(?:\^\{([23])\})?"), "unit"),
    (re.compile(r"(.*[\d})])\s*\b([A-Za-z][A-Za-z./ ]*)(?:\^\{([23])\})?"), "bare unit"),
]


def _read_leaf(text: str) -> Form:
    currency = re.fullmatch(rf"([-+]?)\s*({_CURRENCY})\s*([-+]?.+)", text)
    if currency is not None:
        inner = _read_leaf(currency[1] + currency[3])
        if not isinstance(inner, Quantity):
            return Words(text)
        return Quantity(inner.text, unit_of(currency[2]), nouns=inner.nouns)
    text = re.sub(r"\\text\{([^{}]*)\}\s*/\s*\\text\{([^{}]*)\}", r"\\text{\1/\2}", text)
    for pattern, kind in _SUFFIXES:
        match = pattern.fullmatch(text)
        if match is None or (kind == "degree" and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)):
            continue
        number = match[1]
        if kind == "percent":
            return Quantity(number, is_percent=True)
        if kind == "ordinal":
            return Quantity(number)
        if kind == "degree":
            return Quantity(number, unit_of(f"°{match[2] or match[3]}" if match[2] or match[3] else "degree"))
        if kind == "bare unit" and not _is_bare_unit(match[2]):
            continue
        exponent = match[3] if kind != "unit" or pattern.groups > 2 else None
        factor = multiplier_of(match[2])
        if factor is None:
            return Words(text)
        inner = _read_leaf(number if factor == 1 else rf"{number}\cdot {factor}")
        if isinstance(inner, Quantity) and not inner.is_percent:
            unit = unit_of(match[2], int(exponent or 1)) or inner.unit
            return Quantity(inner.text, unit, nouns=nouns_of(match[2]) | inner.nouns)
    if DOTS in text or re.search(r"\\text\{[^{}]*[^{}\s][^{}]*[^{}\s]", text):
        return Words(text)
    return Quantity(text)


def _is_bare_unit(tail: str) -> bool:
    words = tail.replace(".", " ").replace("/", " ").split()
    return any(is_written_out(word) for word in words) or (
        len(words) >= 1 and all(len(word) > 3 for word in words)
    )


def words_of(text: str) -> str:
    """Words without case, spaces, outer parentheses, and dots but decimal points; labels keep their case."""
    shown = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" .")
    shown = shown[1:-1] if shown.startswith("(") and shown.endswith(")") else shown
    if not _LABEL.fullmatch(shown):
        shown = re.sub(r"[^\W\d_]{2,}", lambda word: word.group().casefold(), shown)
    shown = re.sub(r"([ap])\.\s?m\b", r"\1m", shown, flags=re.IGNORECASE)
    shown = re.sub(r"(?<=\d)(\s*)([AaPp])\s?[Mm]\b", lambda time: time.group(2).lower() + "m", shown)
    return re.sub(r"\s|(?<!\d)\.|\.(?!\d)", "", re.sub(r"(?<=[\d.]) (?=[\d.])", "_", shown))
