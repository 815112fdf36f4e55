r"""The laws by which `\boxed{answer}` is graded: for each, right answers and wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opo_megatron.tasks.math_answers import grade

Cases = list[tuple[str, str]]
"""(gold, answer)."""

LAWS: dict[str, tuple[Cases, Cases]] = {
    "a comma followed by a space never separates thousands": (
        [
            ("100, 200", "200, 100"), ("100, 200", "100,200"), ("1234", "1,234"), ("1{,}234", "1234"),
            (r"1,\!234", "1234"), (r"12\,345\,678", "12,345,678"), ("1234", "1 234"),
            ("1, 200, 3000", "3000, 200, 1"), ("1,000, 2,000", "2000, 1000"),
            (r"\$306,\!956.63", "306956.63"), ("(1,200)", "(1, 200)"),
        ],
        [
            ("100, 200", "100200"), ("1,234", "1, 234"), ("1234", "1, 234"), ("(1,200)", "1200"),
            ("1,2,3", "123"), ("(1, 200)", "(1200)"), ("1, 200, 300", "1200300"), ("7", "3 4"),
            ("12", "1 2"),
        ],
    ),
    "a list without brackets is a set of values, in any order": (
        [
            ("1,2", "2,1"), ("1,2", r"\{1,2\}"), (r"\{1,2\}", "2, 1"), (r"19 \text{ and } 43", "43, 19"),
            ("1, 2", "1 or 2"), (r"\frac52", r"\frac52 \text{ or } 2.5"),
            (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt{2}"), ("2,-2", r"\pm 2"), ("1,2", r"x=2, x=1"),
            (r"\{5\}", "5"), (r"\text{A, D, F}", "F, A, D"), (r"10^\circ, 50^\circ", r"50^\circ,10^\circ"),
            (r"\{1, 1, 2\}", r"\{1,2\}"),
        ],
        [
            ("1,2", "1,3"), ("1,2", "1,2,3"), ("1,2", "(1,2)"), (r"\{1,2\}", "(1,2)"),
            ("1, 1, 2", "1, 2, 2"), ("1,2", "[1,2]"), (r"\pm 2", "2"), ("(1,2)", "1,2"),
        ],
    ),
    "order counts where there are brackets": (
        [("(1,2)", r"\left( 1, 2 \right)"), ("(3,\\frac{\\pi}{2})", "(3, 0.5\\pi)"), ("1:2", r"1\!:\!2"),
         (r"\langle 1,2\rangle", "⟨1, 2⟩"),
         (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
         (r"\begin{pmatrix}1&-1\\1&\phantom -1\end{pmatrix}", r"\begin{pmatrix}1&-1\\1&1\end{pmatrix}")],
        [("(1,2)", "(2,1)"), ("1:2", "2:1"), ("1:2", "12"), ("[2,3]", "[3,2]"),
         (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
         (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
         (r"\begin{vmatrix}1\\2\end{vmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}")],
    ),
    "signs of Unicode are what they mean": (
        [
            ("π", "π"), ("∞", "∞"), ("½", "½"), ("甲", "甲"), ("无解", "无解"),
            (r"\pi", "π"), ("2π", r"2\pi"),
            (r"\sqrt2", "√2"), (r"2\sqrt{3}", "2√3"), ("25", "5²"), ("42", "6·7"), ("42", "6×7"),
            ("-5", "−5"), (r"\frac12", "½"), (r"\frac32", "1½"), ("x^2+1", "x²+1"), ("10^{-3}", "10⁻³"),
            (r"\infty", "∞"), ("(0,1]", "（0，1］"), (r"x \le 5", "x≤5"), (r"60^\circ", "60°"),
            (r"\alpha+\beta", "β+α"), ("2", "∛8"), (r"\emptyset", "∅"), ("x_1", "x₁"), ("50\\%", "50％"),
            (r"(-\infty,0)\cup(1,2)", "(−∞,0)∪(1,2)"), ("12", "１２"),
        ],
        [("甲", "乙"), (r"\infty", "−∞"), (r"\pi", "3.14"), (r"\sqrt2", "√3"), ("25", "52"), ("52", "5²"),
         ("无解", "有解"), ("x_1", "x_2"), ("½", "12")],
    ),
    "an answer without content is wrong": (
        [("0", "0"), (r"\emptyset", r"\{\}"), (r"\{\}", r"\emptyset")],
        [("5", ""), ("5", "$"), ("5", "()"), ("5", r"\,"), ("5", r"\text{}"), ("", ""), ("", "0"),
         ("5", "."), ("5", "{}"), ("0", "-")],
    ),
    "an interval and its inequality are one set": (
        [
            ("[0,1)", r"0\le x<1"), ("0<x<1", "(0,1)"), (r"(-\infty,3)", "x<3"), ("x>3", r"(3,\infty)"),
            (r"[3,\infty)", r"3\le x"), ("[0,1)", r"x\in[0,1)"), ("0<x<1", "1>x>0"),
            (r"(-\infty,0)\cup(1,\infty)", r"x<0 \text{ or } x>1"),
            (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)"),
            (r"(-\infty,3)\cup(3,\infty)", r"x\ne 3"),
            (r"(-\infty,3)\cup(3,\infty)", r"\mathbb{R}\setminus\{3\}"),
            (r"x \in \mathbb{R}", r"(-\infty,\infty)"), (r"x>0 \text{ and } x<1", "0<x<1"),
            (r"\{3\}\cup[5,6)", r"[5,6)\cup\{3\}"), ("[1,2]", r"1 \leq y \leq 2"),
            (r"\{x \mid 0<x<1\}", "0<x<1"), (r"x \in (0,1)", "0<x<1"), ("x>=5", r"[5,\infty)"),
            (r"(-\infty,2]", r"(-\infty,\frac{4}{2}]"),
        ],
        [
            ("(0,1)", "0<x<1"), ("(0,1)", "[0,1]"), ("[0,1)", "(0,1)"), ("0<x<1", r"0\le x<1"),
            ("0<x<1", "0<y<1"), ("[0,1)", "[0,2)"), ("x>3", "x<3"), ("x>3", r"[3,\infty)"),
            (r"(-\infty,0)\cup(1,\infty)", "(0,1)"),
            (r"(-\infty,0)\cup(1,\infty)", r"x<0 \text{ and } x>1"), (r"\mathbb{R}", r"x\ne 0"),
            (r"[1,2]", r"\{1,2\}"),
        ],
    ),
    "a percent sign divides by 100, or names a number above 1": (
        [(r"20\%", "0.2"), (r"20\%", r"\frac15"), (r"20\%", "20"), ("50", r"50\%"), ("0.5", r"50\%"),
         (r"12.5\%", r"\frac18"), (r"33\frac13\%", r"\frac{1}{3}"), (r"20\%", "20 percent"),
         (r"20\%", r"20\text{ percent}"), (r"150\%", "1.5"), ("0.56 = 56\\%", "0.56")],
        [("0.5", r"0.5\%"), (r"20\%", "2"), (r"20\%", r"0.2\%"), ("1", r"1\%"), (r"0.5\%", "0.5"),
         (r"20\%", "200"), (r"50\%", r"5\%"), (r"-0.5", r"-0.5\%")],
    ),
    "a unit may be left out, and not exchanged": (
        [
            ("5", "€5"), ("5", r"\$5.00"), ("5", "5 dollars"), ("6", r"6\text{ cm}"), ("120", r"120^\circ"),
            (r"6\text{ cm}", "6"), (r"2\text{ hours}", r"120\text{ minutes}"),
            (r"\$0.50", r"50\text{ cents}"), (r"440\text{ cm}^2", r"440\text{ square centimeters}"),
            (r"3\text{ ways}", r"3\text{ different ways}"), ("5", "5 cm"), ("5", "5 apples"),
            (r"1\text{ km}", r"1000\text{ meters}"), ("-5", r"-\$5"),
            (r"60\text{ mph}", r"60\text{ miles per hour}"), (r"9\text{ a.m.}", "9 am"),
            ("2000000", r"2\text{ million}"), (r"\$2\text{ million}", "2 million dollars"),
            ("24", "2 dozen eggs"),
        ],
        [
            (r"5\text{ cm}", r"5\text{ m}"), (r"\$5", "€5"), (r"440\text{ cm}^2", r"440\text{ cm}"),
            (r"9\text{ a.m.}", r"9\text{ p.m.}"), ("5", "5x"), ("3", "3t"),
            (r"2\text{ hours}", r"2\text{ minutes}"), (r"20^\circ", r"20\text{ radians}"),
            (r"5\text{ kg}", r"5\text{ pounds}"), (r"60\text{ mph}", r"60\text{ km/h}"),
            ("2", r"2\text{ million}"), ("5", r"5\text{ squared}"), ("5", "5 hundred"),
            ("2", r"2\text{ and a half}"), (r"20^\circ\text{C}", r"20^\circ\text{F}"),
        ],
    ),
    "what encloses an answer is not part of it": (
        [
            ("5", "5=x"), ("5", "x = 5"), ("5", r"5^{\text{th}}"), ("5", "5th"), ("1", r"1^\text{st}"),
            ("5", r"\text{5}"), ("5", "$5$"), ("5", r"\boxed{5}"), ("5", r"\mathbf{5}"), ("5", r"5."),
            ("x^2", "f(x)=x^2"), ("5", r"2+3=5"), ("5", r"\textbf{5}"), ("5", r"\displaystyle 5"),
            ("5", r"\left(5\right)"), ("5", "{5}"), ("5", r"\( 5 \)"), (r"\frac{3}{2}", r"\dfrac{3}{2}."),
            ("5", r"P(A) = 5"), (r"\frac13", r"x=\frac{1}{3}"), ("(1,2)", "(x,y) = (1,2)"),
            ("(x, y, z) = (1,2,3)", "(1,2,3)"), ("5", r"\text{The answer is } 5"),
            ("C", r"\text{Option C}"), ("a=1, b=2", "b=2, a=1"), ("5", r"\text{Answer: } 5"),
        ],
        [("5", "5=6"), ("1", "9=1"), ("x=5", "y=5"), ("5", r"2+4=5"), ("5", "5^{2}"),
         ("a=1, b=2", "a=2, b=1"), ("5", r"\text{The answer is not } 5"), ("5", r"6^{\text{th}}"),
         ("5", "5i")],
    ),
    "a choice is its letter": (
        [
            ("C", r"\textbf{(C)}\ 5"), ("C", "(C)"), ("C", "C. 5"), ("C", "C) 5"), ("C", "C: 5"),
            ("A", r"\text{A. Paris}"), ("A", r"\text{(A)}"), ("A", r"\mathrm{A}"), (r"\text{(C)}", "C"),
            (r"\textbf{(C)}\ 5", "C"), (r"\textbf{(C)}\ 5", "5"), ("B, D", "D, B"), ("5", "(C) 5"),
        ],
        [("C", r"\textbf{(D)}\ 5"), ("A", r"\text{B. Paris}"), ("A", "A+1"), ("C", "5"), ("B, D", "B"),
         ("(C) 5", "(C) 6"), ("A", "AB")],
    ),
    "numbers of every notation are equal by value, exactly": (
        [
            ("1500", "1.5e3"), ("1500", r"1.5\times10^3"), ("1500", r"1.5 \cdot 10^{3}"),
            ("0.00001", "1e-5"), ("0.00001", "1E-05"), ("0.5", r"\frac{1}{2}"),
            (r"\frac72", r"3\frac{1}{2}"), (r"\frac72", "3 1/2"), (r"\frac12", "1/2"),
            (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac13", r"0.\overline{3}"), ("720", "6!"),
            (r"\binom{10}{3}", "120"), ("2^{4950}", "4^{2475}"), (r"\frac{2}{3} \approx 0.67", r"\frac23"),
            ("5.0", "5"), ("-3.5", r"-3\frac12"), ("52_8", "52_{8}"),
        ],
        [
            (r"\frac13", "0.333"), (r"\frac13", "0.3333333333"), (r"\frac{31}{2}", "3 1/2"),
            (r"-\frac12", r"\frac12"), ("2^{4950}", "2^{4951}"), ("3", "100000000!"),
            ("5", "9^{9^{9^{9}}}"), ("52_8", "52"), ("10000000000000001", "10000000000000000"),
            ("0.1", "0.10000000000000001"), (r"\frac{1}{2004!}", r"\frac{2}{2004!}"), ("1", r"1+10^{-300}"),
        ],
    ),
    "an ellipsis stands for what is left out": (
        [(r"1, 2, \ldots, n", "1, 2, ..., n"), (r"1,2,\dots,n", r"1, 2, \cdots, n"),
         (r"1+2+\cdots+n", r"1+2+\dots+n"), ("1, 2, …, n", r"1,2,\ldots,n"),
         (r"a_1, \ldots, a_n", r"a_1,\dots,a_n")],
        [(r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"), (r"1, 2, \ldots, n", "1, 2, n"),
         (r"1+2+\cdots+n", r"1+3+\cdots+n"), (r"1, 2, \ldots", "1, 2"),
         (r"1,2,\ldots,10", r"2,1,\ldots,10"), (r"0.3\ldots", "0.3")],
    ),
    "capital letters alone are a label, and lower-case letters a product": (
        [("BC", r"\text{BC}"), ("ab", "ba"), ("xyz", "zxy"), ("BC", "B C"), ("2ab", "2ba"),
         ("AB+C", "C+AB"), (r"\overline{AB}", r"\overline{AB}")],
        [("BC", "CB"), ("ABC", "CAB"), (r"\text{CBAD}", "ABCD"), ("BC", "bc"), ("BC", "B"),
         (r"\overline{AB}", r"\overline{BA}"), ("ab", "a+b"), ("VW", r"\text{WV}")],
    ),
    "words are compared as words": (
        [(r"\text{Evelyn}", "evelyn"), (r"\text{even}", "even"), (r"\text{4:30 p.m.}", r"4:30 \text{ PM}"),
         (r"\text{two lines}", "two lines"), ("Friday", r"\text{Friday}"), (r"\text{June 20}", "June 20"),
         (r"8\!:\!34 \text{ p.m.}", "8:34 p.m.")],
        [("Monday", r"\text{Friday}"), (r"\text{5:30 p.m.}", r"\text{4:30 p.m.}"),
         (r"\text{4:30 p.m.}", r"\text{4:30 a.m.}"), (r"\text{even}", r"\text{neve}"), ("yes", "no"),
         (r"\text{June 20}", "July 20")],
    ),
    "expressions are equal where they have equal values": (
        [
            ("1 + x", "x+1"), (r"\sqrt{12}", r"2\sqrt{3}"), ("(x+1)(x-1)", "x^2-1"),
            (r"2007 + \frac\pi 2", r"2007+\frac{\pi}{2}"), (r"\sin^2x+\cos^2x", "1"), ("i", r"\sqrt{-1}"),
            (r"e^{i\pi}", "-1"), ("|x|", r"\sqrt{x^2}"), (r"2\cos 15^\circ", r"2\cos\frac{\pi}{12}"),
            (r"\frac{1}{2}x", "1/2x"), (r"10x \sqrt{21x}", r"10\sqrt{21}x^{3/2}"), ("3+4i", "4i+3"),
            (r"\sqrt[3]{-8}", "-2"), (r"\log_2 8", "3"), (r"2\ln 3", r"\ln 9"),
            (r"\frac{\log 8}{\log 2}", "3"), ("y=2x+1", "2x+1"), ("y=2x+1", "y-2x=1"),
            ("y=2x+1", "2x-y+1=0"), ("x+y=1", "1=x+y"), ("x+y<1", "1>x+y"), ("2x+2y<2", "x+y<1"),
            (r"f(4 - x)", "f(4-x)"), ("3-2f(x)", "-2f(x)+3"), (r"\frac{x^2-1}{x-1}", "x+1"),
            ("sqrt(2)", r"\sqrt2"), ("x**2", "x^2"), (r"\arctan 1", r"\tan^{-1} 1"),
            (r"\lfloor 2.5\rfloor", "2"), (r"\frac{n!}{k!(n-k)!}", r"\binom{n}{k}"),
            (r"x \equiv 3 \pmod{5}", r"x\equiv3\pmod 5"),
        ],
        [
            ("(x+1)(x-1)", "x^2+1"), ("x", r"\sqrt{x^2}"), ("y=2x+1", "x=2y+1"), ("x+y<1", "x+y>1"),
            (r"2\log 3", r"\ln 9"), ("x", "y"), ("x", "X"), (r"\sin x", r"\cos x"), ("a-b", "b-a"),
            ("x+1", "x+1.0000000001"), (r"f(x)", "f(y)"), ("xy", "x+y"), ("x^2", "x_2"),
            (r"2^3", "2^{3^1}+1"), ("6/5", "6/2(3)"), ("y=2x+1", "y=2x-1"), ("i", "1"),
            (r"\int_0^1 x dx", "x"),
        ],
    ),
    "nothing that is not understood is left out": (
        [
            (r"\frac13", r"0.\bar{3}"), (r"\frac13", r"0.\dot{3}"), (r"\frac16", r"0.1\bar{6}"),
            ("3+2i", r"3+2\mathrm{i}"), ("2e", r"2\mathrm{e}"), ("2n", r"2\text{n}"),
            (r"(0,\infty)", r"\{x\in\mathbb{R}: x>0\}"), (r"100,\;200", "200, 100"), ("x=1, y=2", "1, 2"),
            (r"(1,\pm2)", "(1,2),(1,-2)"), (r"\pi", r"\pi\approx3.14"), (r"\sqrt2", r"\sqrt2\approx1.41"),
            ("5", "AB=5"), ("5", "f(2)=5"), (r"\frac12", r"P(X=1)=\frac12"), ("10", r"{5 \choose 2}"),
            (r"\pm2", r"\mp2"), (r"5\text{ m}", r"5\mathrm{m}"), ("5", r"5\,\mathrm{m}"),
            (r"3\text{ ways}", r"3\text{ different ways}"), ("24", "2 dozen eggs"),
            ("y=2x+1", "f(x)=2x+1"), (r"60\text{ miles per hour}", r"60\text{ mph}"),
            (r"4\text{ meters per second}", r"4\text{ meters per second}"),
        ],
        [
            ("15米", "1.5米"), ("35 元", "3.5 元"), (r"15\ldots", r"1.5\ldots"),
            (r"3.14\ldots", r"31.4\ldots"),
            (r"\$15.0\text{ per }2\text{ lb}", r"\$1.50\text{ per }2\text{ lb}"),
            (r"\text{Chapter 12}", r"\text{Chapter 1.2}"), (r"X\text{ plus }y", r"x\text{ plus }Y"),
            (r"0.\bar{3}", "0"), (r"0.\bar{3}", r"0.\bar{6}"), ("0", "0.(3)"), ("15", "5.(3)"),
            ("0", "0.x"), ("0", r"0.\pi"), ("5", r"3+2\mathrm{i}"), ("2", r"2\mathrm{e}"),
            (r"4\text{y}", r"4\text{x}"), ("5", r"5\text{x}"),
            (r"\{n^2 : n\in\mathbb{Z}\}", r"\{n^3 : n\in\mathbb{Z}\}"), ("x<5", r"\{x^2\mid x<5\}"),
            (r"(0,\infty)", r"\{x\in\mathbb{Z}: x>0\}"),
            (r"\{x\in\mathbb{R}: x>0\}", r"\{x\in\mathbb{Z}: x>0\}"), (r"100,\;200", "100200"),
            (r"100,\,200", "100200"), ("5", r"5\text{ or 6}"), ("5", r"5\text{ apples and 3 pears}"),
            ("5", r"5\text{ or more}"), ("5", r"5\text{ is wrong}"), ("5", r"5\text{ factorial}"),
            ("5", r"5\text{!}"), ("2", r"2\text{ thirds}"), ("7", r"7\text{ hundredths}"),
            ("3", "3 quarters"), (r"32\text{ (base 6)}", r"32\text{ (base 5)}"),
            ("101", r"101\text{ in base 2}"), (r"\$5\text{ loss}", r"\$5\text{ profit}"),
            (r"5\text{ km south}", r"5\text{ km north}"),
            (r"5\text{ degrees south}", r"5\text{ degrees north}"),
            (r"5\text{ (min)}", r"5\text{ (max)}"),
            (r"3\text{ boys}, 5\text{ girls}", r"5\text{ boys}, 3\text{ girls}"),
            (r"5\text{ W}", r"5\text{ kW}"), (r"5\text{ GB}", r"5\text{ MB}"),
            (r"5\text{ nm}", r"5\text{ mm}"), (r"5\text{ bytes}", r"5\text{ bits}"),
            (r"5^\circ\text{C}", r"5\text{ K}"), (r"5\text{ m/s}^2", r"5\text{ m/s}"),
            (r"5\text{ m}", r"5\text{ ms}"), ("f'(x)=2x", "f(x)=2x"), ("f^{-1}(x)=x+1", "f(x)=x+1"),
            ("(x,y)=(1,2)", "(y,x)=(1,2)"), (r"\angle B=30", r"\angle A=30"),
            (r"\text{height}=5", r"\text{width}=5"),
            (r"\text{Alice}=3, \text{Bob}=5", r"\text{Alice}=5, \text{Bob}=3"), ("P(B)=0.5", "P(A)=0.5"),
            (r"\overline{CD}=5", r"\overline{AB}=5"), ("x=1, y=2", "2, 1"), ("a=1, b=2, c=3", "3, 2, 1"),
            ("A: 5, B: 3", "A"), ("A:B=2:3", "A"), (r"(A) \cup (B)", "A"),
            ("A: 20, B: 10", "A: 10, B: 20"), ("(1,2,-2)", r"(1,\pm2)"), ("2020-06-05", "2020-05-06"),
            ("2/4/2020", "1/2/2020"), (r"\frac{y}{x}", r"\frac{dy}{dx}"), ("1.5", "1. 5"),
            ("0", "e^{-1000}"), ("1", "1+e^{-1000}"), ("10^{300}", r"\sqrt{10^{600}+1}"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_answers_are_right_by_law(law: str) -> None:
    refused = [(gold, answer) for gold, answer in LAWS[law][0] if grade(rf"\boxed{{{answer}}}", gold) != 1.0]
    assert not refused, f"{law}: refused as (gold, answer)"


@pytest.mark.parametrize("law", LAWS)
def test_answers_are_wrong_by_law(law: str) -> None:
    accepted = [(gold, answer) for gold, answer in LAWS[law][1] if grade(rf"\boxed{{{answer}}}", gold) != 0.0]
    assert not accepted, f"{law}: accepted as (gold, answer)"


@pytest.mark.parametrize("law", LAWS)
def test_a_gold_answer_is_right_in_its_own_words(law: str) -> None:
    golds = {gold for gold, _ in LAWS[law][0] if gold}
    assert [gold for gold in golds if grade(rf"\boxed{{{gold}}}", gold) != 1.0] == []


def test_the_table_of_the_documentation_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| [a-z ,]+ \| (`.*`) \| (`.*`) \|$", text.partition("| | the same")[2], re.MULTILINE
    )
    assert len(rows) == 9
    for same, different in rows:
        groups = [re.findall("`([^`]+)`", group) for group in same.split(";")]
        for first, *others in groups:
            for other in others:
                pairs = (first, other), (other, first)
                assert all(grade(rf"\boxed{{{one}}}", gold) == 1.0 for one, gold in pairs), pairs
        for answer, gold in re.findall("`([^`]+)`(?: for `([^`]+)`)?", different):
            assert grade(rf"\boxed{{{answer}}}", gold or groups[0][0]) == 0.0, (answer, gold)


POINT, SET = "Find the ordered pair.", "Solve for x. The solution is the interval"


@pytest.mark.parametrize(
    ("gold", "answer", "context", "reward"),
    [
        ("(0,1)", "0<x<1", f"{SET} (0,1).", 1.0),
        ("(0,1)", "(0,1)", f"{SET} (0,1).", 1.0),
        ("(0,1)", "[0,1)", f"{SET} (0,1).", 0.0),
        ("(0,1)", r"0\le x<1", f"{SET} (0,1).", 0.0),
        (r"\left(-\frac12, 2\right)", "-0.5<x<2", f"{SET} below.", 1.0),
        ("(0,1)", "0<x<1", POINT, 0.0),
        ("(0,1)", "0<x<1", f"{POINT} On the interval, y is 1.", 0.0),
        ("(0,1)", "0<x<1", None, 0.0),
        ("(0,1,2)", "0<x<1", f"{SET} (0,1).", 0.0),
        ("(1,0)", "(0,1)", f"{SET} (0,1).", 0.0),
    ],
)
def test_a_pair_is_an_open_interval_only_where_its_solution_says_so(
    gold: str, answer: str, context: str | None, reward: float
) -> None:
    assert grade(rf"\boxed{{{answer}}}", gold, context=context) == reward
