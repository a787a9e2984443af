"""Answers as models write them, against expected answers as data sets write them."""

import contextlib

import pytest

from components.core.text.judges.worker_pool import JudgeFailed
from components.core.text.verifier import verify

RIGHT = [
    # order of terms, factors
    (r"\boxed{x^2+y^2}", "y^2+x^2"),
    (r"\boxed{a^2 - b^2}", "(a-b)(a+b)"),
    (r"\frac{x+1}{2}", "x/2 + 1/2"),
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("1<x<2", "(1,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"(0,1)\cup(2,3)", "(2,3)∪(0,1)"),
    ("1,2", r"\{2,1\}"),
    (r"2 \text{ and } 3", "3, 2"),
    (r"x \in [0,1)", "[0,1)"),
    ("x=5", "5"),
    # fractions, signs, mixed numbers, powers
    (r"\boxed{\frac{-1}{2}}", "-1/2"),
    (r"\boxed{\frac{-1}{2}}", r"-\frac{1}{2}"),
    (r"-\dfrac12", "-0.5"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"),
    ("1 1/2", "1.5"),
    (r"\frac{1}{2}", "0.5"),
    ("−5", "-5"),
    ("0.00001", "1e-05"),
    (r"1\times 10^{-5}", "0.00001"),
    ("10^{-5}", "1e-5"),
    ("10000000000000000", "1e16"),
    ("2^{10}", "1024"),
    # percent, money, thousands, degrees, units
    (r"\boxed{50\%}", "50%"),
    (r"50\%", "0.5"),
    (r"\boxed{\$18}", "18"),
    ("$18.00", "18"),
    (r"\boxed{1{,}000}", "1000"),
    (r"1\,000", "1000"),
    ("12,345", "12345"),
    (r"\boxed{90^\circ}", "90"),
    ("90°", "90^{\\circ}"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"12\text{ cm}^2", "12 cm^{2}"),
    (r"3\sqrt{2}\text{ cm}", r"3\sqrt2"),
    # words and choices
    (r"\boxed{\text{east}}", "east"),
    (r"\text{East}", "east"),
    (r"\boxed{(B)}", "B"),
    (r"\textbf{(B)}", "B"),
    # boxes and delimiters
    (r"\boxed {7}", "7"),
    (r"\boxed 7", "7"),
    (r"\boxed{\frac{1}{1+\frac{1}{x}}}", r"\frac{x}{x+1}"),
    (r"\boxed{{7}}", "7"),
    (r"\[ 7 \]", "7"),
    (r"\(7\).", "7"),
    (r"\boxed{3}", "3"),
]
WRONG = [
    (r"first \boxed{7}, no: \boxed{\frac{1}{1+\frac{1}{2}}}", "7"),
    (r"first \boxed{7}, no: \boxed{8", "7"),
    ("1,2", "12"),
    ("1,234,5", "12345"),
    ("1,00", "100"),
    ("[0, 1)", "(0, 1)"),
    ("(2,1)", "(1,2)"),
    ("0.333", r"\frac{1}{3}"),
    ("1/2 + 1/2", "1"),
    ("2+3=5", "5"),
    ("5 cm", r"5\text{ m}"),
    ("5x", "5"),
    ("b", "B"),
    ("dog bites man", "man bites dog"),
    ("x", "y"),
    ("500%", "50"),
    ("1e999999999", "1"),
    ("-1/0", "0"),
]
ENDLESS = [
    (r"\binom{1000000}{500000}", "x+1"),
    ("9^{9^{9^{9}}} + x", "x+1"),
    ("(((((1000000)!)!)!)!)!", "x+1"),
]


@pytest.mark.parametrize(("answer", "expected"), RIGHT)
def test_a_right_answer_is_right_and_the_order_makes_no_difference(answer, expected):
    assert verify(answer, expected)
    assert verify(expected, answer)


@pytest.mark.parametrize(("answer", "expected"), WRONG)
def test_a_wrong_answer_is_wrong(answer, expected):
    assert not verify(answer, expected)


@pytest.mark.parametrize(("answer", "expected"), ENDLESS)
def test_an_answer_that_cannot_be_computed_ends(answer, expected):
    with contextlib.suppress(JudgeFailed):
        assert not verify(answer, expected)
