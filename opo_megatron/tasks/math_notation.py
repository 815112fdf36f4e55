r"""One spelling for each notation of mathematics: `½`, `\dfrac12` and `\tfrac{1}{2}` become `\frac{1}{2}`.

`plain` changes how an answer is written, never what it says: signs (%, $, units, degrees), brackets and
separators stay, for `math_forms.py` to read.  White space stays where it separates digits or words.
"""

from __future__ import annotations

import re
import unicodedata

_LOWER = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma
sigma tau upsilon phi chi psi omega"""
_UPPER = "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega mu phi"
_GREEK = {chr(0x3B1 + index): name for index, name in enumerate(_LOWER.split())} | dict(
    zip("ΓΔΘΛΞΠΣΦΨΩµϕ", _UPPER.split(), strict=True)
)
_COMMANDS = {
    "∞": "infty", "≤": "le", "≥": "ge", "⩽": "le", "⩾": "ge", "≠": "ne", "±": "pm", "×": "cdot",
    "·": "cdot", "⋅": "cdot",
    "∙": "cdot", "•": "cdot", "∗": "cdot", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset", "…": "dots",
    "⋯": "dots", "∠": "angle", "△": "triangle", "⟨": "langle", "⟩": "rangle", "≈": "approx",
    "∖": "setminus",
    "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil",
}  # fmt: skip
_TEXTS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "÷": "/", "⁄": "/", "∕": "/", "∶": ":", "′": "'",
    "’": "'", "°": r"^{\circ}",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}",
    "℃": r"^{\circ}\text{C}", "℉": r"^{\circ}\text{F}", "｛": r"\{", "｝": r"\}", "、": ",", "。": ".",
    "〈": r"\langle ", "〉": r"\rangle ",
}  # fmt: skip
_UNICODE = str.maketrans(
    {sign: f"\\{name} " for sign, name in (_GREEK | _COMMANDS).items()}
    | _TEXTS
    | {chr(code): " " for code in (0x3000, 0x2028, 0x2029, *range(0x2000, 0x2007), 0x2008, 0x200A, 0x205F)}
    | {chr(code): "" for code in (0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF)}
    | {
        chr(code): unicodedata.normalize("NFKC", chr(code))
        for code in range(0xFF01, 0xFF5F)
        if code not in (0xFF5B, 0xFF5D)
    }
)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₖᵢⱼₓ"
_VULGAR = "".join(chr(code) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189))
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|\\?[A-Za-z]+(?=\s|$|[^A-Za-z])|[A-Za-z])?")
THIN = "\u00a0\u2007\u2009\u202f"
"""No-break and thin spaces, which separate thousands."""

_SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le",
    "leqslant": "le",
    "geq": "ge", "geqslant": "ge", "lt": "<", "gt": ">", "neq": "ne", "times": "cdot", "ast": "cdot",
    "div": "/", "ldots": "dots",
    "cdots": "dots", "dotsc": "dots", "dotsb": "dots", "varnothing": "emptyset", "lbrace": r"\{",
    "rbrace": r"\}", "lbrack": "[",
    "rbrack": "]", "lparen": "(", "rparen": ")", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "colon": ":", "degree": r"^{\circ}",
    "pounds": "£", "textsterling": "£", "euro": "€", "texteuro": "€", "yen": "¥", "infin": "infty",
    "arctg": "arctan", "tg": "tan",
    "to": "rightarrow", "mp": "pm", "land": "wedge", "percent": "%", "backslash": "setminus",
}  # fmt: skip
_SPACING = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|mathstrut|strut|quad|qquad|enspace|thinspace)"
    r"(?![A-Za-z])|(?<!\\)\\[,;:! ]|~|\\[()\[\]](?!\w)|\\hspace\*?\{[^{}]*\}"
)
_THOUSANDS = re.compile(rf"(?<=\d)(?:\{{,\}}|,\\!|(?<!,)\\[,;:! ]|\{{\\[,;:!]\}}|[{THIN}])(?=\d{{3}}(?!\d))")
"""Separators that only thousands have; a bare comma is read where it stands."""
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,/^_])\d{1,3}(?: \d{3})+(?![\d/])")
_PHANTOM = re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|[^{}\s])")
_TEXT = re.compile(
    r"\\(?:mbox|hbox|mathrm|textrm|textbf|textit|textsf|texttt|textsc|textnormal|emph|operatorname\*?|text)\s*\{"
)
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|boxed|fbox|underline)\s*\{([^{}]*)\}")
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"
_ASCII_FUNCTION = re.compile(rf"(?<![A-Za-z\\{{])({_FUNCTIONS})(?=\s*[({{\\\d^_]|\s+[a-zA-Z](?![A-Za-z]))")
_ASCII = [
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\*"), r"\\cdot "),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">=|=>"), r"\\ge "),
    (re.compile(r"!=|<>|/="), r"\\ne "),
    (re.compile(r"\+/-|\+-"), r"\\pm "),
    (re.compile(r"\.\.\.+"), r"\\dots "),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*(?=[({\d])"), r"\\sqrt "),
]


def plain(answer: str) -> str:
    """The answer in one spelling.  Idempotent on what it returns, up to white space."""
    text = _from_unicode(answer)
    text = re.sub(r"\\\\(?=[A-Za-z%$])", r"\\", text) if "\\begin" not in text else text
    text = _THOUSANDS.sub("", re.sub(r"(?<!\\)\$", "", text))
    text = re.sub(r"\\[()\[\]](?=$|\s)|^\\[(\[]", " ", text)
    text = _SPACING.sub(" ", _PHANTOM.sub("", text))
    text = _synonyms(text)
    text = _texts(text)
    for pattern, replacement in _ASCII:
        text = pattern.sub(replacement, text)
    text = _ASCII_FUNCTION.sub(r"\\\1 ", text)
    text = _braced(text)
    text = re.sub(r"([\^_])\s*\{\s*(\w+|\\[A-Za-z]+)\s*\}", r"\1{\2}", text)
    text = re.sub(r"([\^_])\s*(\d+|[A-Za-z]|\\(?!frac|sqrt|binom|text)[A-Za-z]+)", r"\1{\2}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\\pmod\s*(\w+)", r"\\pmod{\1}", text)
    text = re.sub(r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
    return re.sub(r"\s+", " ", text).strip()


def compact(text: str) -> str:
    """Plain text without spaces, but for those between digits, and between a comma and digits."""
    return re.sub(r"(?<=[\d.])(,?) (?=[\d.])", "\\1\0", text).replace(" ", "").replace("\0", " ")


def _from_unicode(text: str) -> str:
    text = re.sub(rf"[{_SUPERSCRIPTS}]+", lambda run: "^{" + _ascii(run.group()) + "}", text)
    text = re.sub(rf"[{_SUBSCRIPTS}]+", lambda run: "_{" + _ascii(run.group()) + "}", text)
    text = re.sub(f"[{_VULGAR}]", _vulgar, text)
    text = text.translate(_UNICODE)
    return _ROOT.sub(_root, text)


def _ascii(run: str) -> str:
    return unicodedata.normalize("NFKC", run).replace("−", "-")


def _vulgar(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match.group()).partition("⁄")
    return rf"\frac{{{above}}}{{{below or '1'}}}"


def _root(match: re.Match[str]) -> str:
    degree = {"√": "", "∛": "[3]", "∜": "[4]"}[match.group(1)]
    return rf"\sqrt{degree}" + (f"{{{match.group(2)}}}" if match.group(2) else "")


def _synonyms(text: str) -> str:
    def spell(match: re.Match[str]) -> str:
        spelling = _SYNONYMS.get(match.group(1))
        if spelling is None:
            return match.group()
        return f"\\{spelling} " if spelling.isalpha() and len(spelling) > 1 else spelling

    return re.sub(r"\\([A-Za-z]+)", spell, text)


def _texts(text: str) -> str:
    r"""All commands of styled text as `\text{…}`; bold and boxed mathematics without its command."""
    text = _TEXT.sub(r"\\text{", text)
    previous = None
    while previous != text:
        previous = text
        text = _BOLD.sub(r"\1", text)
        text = re.sub(r"\\text\{\s*\\text\{([^{}]*)\}([^{}]*)\}", r"\\text{\1\2}", text)
    text = re.sub(r"\\text\{\s*([A-Za-z])\s*\}", _upright, text)
    return re.sub(r"\\text\{\s*\}", " ", text)


UNIT_LETTERS = "mshgl"
"""Upright letters that are units; all others are letters: `2\\mathrm{e}`, `\\text{C}`."""


def _upright(match: re.Match[str]) -> str:
    return match.group() if match.group(1) in UNIT_LETTERS else match.group(1)


def balanced(text: str, start: int) -> int | None:
    """Index of the bracket that closes the one at `start`; None if missing."""
    opening = text[start]
    closing = {"{": "}", "(": ")", "[": "]"}[opening]
    depth, index = 0, start
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += {opening: 1, closing: -1}.get(text[index], 0)
        if depth == 0:
            return index
        index += 1
    return None


def closing_braces(text: str) -> dict[int, int]:
    """Index of each brace that opens a group → of the brace that closes it; in one pass."""
    found: dict[int, int] = {}
    stack: list[int] = []
    index = 0
    while index < len(text):
        sign = text[index]
        if sign == "{":
            stack.append(index)
        elif sign == "}" and stack:
            found[stack.pop()] = index
        index += 2 if sign == "\\" else 1
    return found


_TAKES_ARGUMENTS = re.compile(r"\\(frac|binom|sqrt)(?![A-Za-z])\s*")


def _braced(text: str) -> str:
    r"""Braces around every argument: `\frac12` → `\frac{1}{2}`, `\sqrt(x)` → `\sqrt{x}`."""
    match = _TAKES_ARGUMENTS.search(text)
    if match is None:
        return text
    name, at, arguments = match.group(1), match.end(), ""
    if name == "sqrt" and text[at : at + 1] == "[" and (end := balanced(text, at)) is not None:
        arguments, at = text[at : end + 1], end + 1
    for _ in range(1 if name == "sqrt" else 2):
        argument, at = _argument(text, at)
        arguments += "{" + _braced(argument) + "}"
    return text[: match.start()] + f"\\{name}{arguments}" + _braced(text[at:])


def _argument(text: str, at: int) -> tuple[str, int]:
    """TeX's next argument, and where it ends: a group, a command with its arguments, or one sign."""
    while text[at : at + 1].isspace():
        at += 1
    if text[at : at + 1] and text[at] in "{(" and (end := balanced(text, at)) is not None:
        return text[at + 1 : end], end + 1
    if inner := _TAKES_ARGUMENTS.match(text, at):
        end = inner.end()
        for _ in range(1 if inner.group(1) == "sqrt" else 2):
            _, end = _argument(text, end)
        return text[at:end], end
    match = re.compile(r"\\[A-Za-z]+|.", re.DOTALL).match(text, at)
    return (match.group(), match.end()) if match else ("", at)
