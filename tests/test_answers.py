"""When two answers are equal."""
import time

import pytest

from data.answers import canonical, last_boxed, spelled_only
from data.arithmetic import parse

EQUAL = [
    # the value of one number
    ("72", "72.0"), ("72", "72."), ("72", "+72"), ("72", "072"), ("72", "72%"), ("12%", "12.0%"), ("1234", "1,234"),
    ("1234", "$1,234"), ("5", "$5"), ("5.5", "$5.50"), ("-0", "0"), ("0.5", ".5"), ("0.5", "1/2"), ("1/2", "2/4"),
    ("1/2", "1 / 2"), ("1/2", "\\frac{1}{2}"), ("1/2", "\\dfrac{2}{4}"), ("-5", "\u22125"),
    # the same in LaTeX's wrapping
    ("72", "\\boxed{72}"), ("72", "$72$"), ("72", "$\\boxed{72}$"), ("\\boxed{72}", "$72$"), ("x^2", "$x^2$"),
    ("\\sqrt{2}", "\\boxed{\\sqrt{2}}"),
    # spelling
    ("A", "(A)"), ("b", "(B)"), ("paris", "Paris."), ("new delhi", "New  Delhi"), ("STRASSE", "stra\u00dfe"),
    ("(3, 4)", "(3,  4)"),
]
UNEQUAL = [
    ("72%", "0.72"), ("50%%", "50"), ("1e3", "1000"), ("1_000", "1000"), ("7 2", "72"), ("37", "-37"), ("37", "37.01"),
    ("37", "37 apples"), ("37", "37km"), ("\u0663\u0667", "37"), ("1/2", "1/3"), ("0.333", "1/3"), ("0.1", "0,1"),
    ("1,23", "123"), ("1/0", "0"), ("--5", "5"), ("7 / 2 / 1", "7/2"), ("\\frac{1}{2}", "\\frac12"), ("5", "five"),
    ("(3, 4)", "3, 4"), ("[1,2]", "(1,2)"), ("x=5", "5"), ("f(x)", "fx"),
    ("\\boxed{72}}", "72"), ("\\boxed{7", "7"), ("$72", "72$"),
    ("A", "B"), ("A", "a cat"), ("(AB)", "AB"), ("Paris", "Paris, France"),
]


def test_the_table_has_thirty_pairs_of_each_kind():
    """A pair that is in the table twice proves nothing the second time."""
    assert len(set(EQUAL)) == len(set(UNEQUAL)) == 30


@pytest.mark.parametrize("one, other", EQUAL)
def test_equal_answers(one, other):
    """Correct answers must not earn nothing because they are spelled in another way than in the file."""
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize("one, other", UNEQUAL)
def test_unequal_answers(one, other):
    """A comparison that is too lenient pays for wrong answers, and RL finds them."""
    assert canonical(one) != canonical(other)


def test_built_in_problems_stay_exact():
    """The lenient comparison is for files alone: the answer to 5-5 is 0, not -0 or 0.0."""
    problem = parse("5-5")
    assert problem.check("0") and not any(map(problem.check, ("-0", "0.0", "+0", "00", "\\boxed{0}", "0%", "$0")))


def test_which_answers_are_compared_letter_by_letter():
    """Nobody is told that "72 km" in a file earns nothing for "72"."""
    assert all(map(spelled_only, ("72 km", "3 and 4", "(3, 4)", "\\sqrt{2}", "1e3", "x_1")))
    assert not any(map(spelled_only, ("72", "1/2", "72%", "$5", "\\boxed{72}", "\\frac{1}{2}", "Paris", "(A)", "yes")))


def test_the_last_box():
    """The last of several boxes is the answer; braces inside it belong to it; one that never ends is none."""
    assert last_boxed("\\boxed{1}, so \\boxed{ 2 } holds") == " 2 "
    assert last_boxed("\\boxed{\\frac{1}{2}} and {3}") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{1} or \\boxed{2") is None and last_boxed("no box") is None


def test_no_answer_takes_long():
    """A sampled answer of many braces or dollar signs must not take seconds."""
    began = time.process_time()
    for text in ("\\boxed{" * 20_000, "$" * 100_000, "{" * 100_000, "\\boxed{" * 14 + "1" + "}" * 2, "$" * 100):
        canonical(text), last_boxed(text), spelled_only(text)
    assert time.process_time() - began < 5
