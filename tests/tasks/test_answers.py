"""Answers that say the same are equal, others are not, and the final one is found."""

import pytest

from pretrain.tasks.answers import find_answer, is_same


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("18", "18.00"), ("$1,234", "1234"), ("-7.", "\u22127"), (".5", "0.50"), ("50\\%", "50"),
        ("1/2", "0.5"), ("2/4", "\\frac{1}{2}"), ("\\dfrac12", "\\frac{1}{2}"),
        ("-\\frac{3}{6}", "\\frac{-1}{2}"), ("\\frac 3 4", "0.75"), ("\\$36", "36"),
        ("11,\\!000", "11000"), ("90^\\circ", "90^{\\circ}"), ("5.4 \\text{ cents}", "5.4"),
        ("x = 5", "5"), ("x \\in [-2,7]", "[-2, 7]"), ("\\text{Even}", "even"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac\\pi2)"), ("\\sqrt2", "\\sqrt{ 2 }"),
        ("11\\sqrt{\\frac12}", "11 \\sqrt{\\frac{1}{2}}"), ("(C)", "\\text{(c)}"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ],
)  # fmt: skip
def test_the_same_said_otherwise(given: str, answer: str) -> None:
    assert is_same(given, answer)
    assert is_same(answer, given)


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("18", "81"), ("-7", "7"), ("1,2", "12"), ("0.33", "1/3"), ("", "0"), ("x", "X"),
        ("\\frac{1}{23}", "\\frac{12}{3}"), ("\\sqrt{12}", "\\sqrt{1}2"), ("1/0", "0"),
        ("(2,3)", "(3,2)"), ("\\leftarrow", "arrow"), ("3\\pi", "3"), ("x^2", "x^{3}"),
    ],
)  # fmt: skip
def test_what_differs(given: str, answer: str) -> None:
    assert not is_same(given, answer)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("First 3, then 4.\nSo \\boxed{\\frac{1}{2}} it is, of 9.", "1/2", "\\frac{1}{2}"),
        ("3 * 4 = 12\n#### 12\nand 5 more", "12", "12"),
        ("I think the answer is 7 apples, not 8.", "7", "7"),
        ("The answer is $x+1$, as shown.", "x+1", "x+1"),
        ("There are 3 and 4, together 7 birds.", "7", "7"),
        (" no digits here", "7", "no digits here"),
        (" blue\nor green", "blue", "blue"),
        ("\n \n", "7", ""),
        ("So x = -.5", "-0.5", "-.5"),
        ("7 of them, by release v1.5", "7", "7"),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str, found: str) -> None:
    assert find_answer(text, answer) == found


def test_an_answer_that_follows_at_once_is_the_first_number() -> None:
    assert find_answer("-734 and 5", "-734", at_once=True) == "-734"
    assert find_answer("-734 and 5", "-734") == "5"
    assert find_answer("7345", "-734", at_once=True) == "7345"
