r"""When two answers are equal: by the value of one number, or else by spelling. Both sides are treated alike.

    72   $72   72.0   72.   72%   \boxed{72}   $72$   144/2   144 / 2   \frac{144}{2}       one number, one value
    Paris   paris.   New  Delhi   (A)                                                       text: case, spaces, a dot

A percent sign is dropped, so 72% is 72, not 0.72. Everything else is compared letter by letter: units, several numbers,
intervals, scientific notation, other LaTeX.
"""
import re
from fractions import Fraction

NUMBER = re.compile(r"[-+]?([0-9]+(/0*[1-9][0-9]*)?|[0-9]*\.[0-9]+)")  # an integer, a fraction or a decimal
WRITTEN = re.compile(r"([-+]?)\$?([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(\.[0-9]+)?\.?%?")  # such as $1,234.50 or 5. or 72%
FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}|([-+]?[0-9]+) ?/ ?([0-9]+)")


def canonical(answer: str) -> str:
    r"""One spelling for all equal answers.

    subtle: Fraction alone would also accept "1_000" and Arabic digits, and would take seconds for "1e3000000".

    >>> [canonical(answer) for answer in ("0.50", "2/4", "$1,234.", "72%", r"\boxed{72}", "New  Delhi.", "(A)")]
    ['1/2', '1/2', '1234', '72', '72', 'new delhi', 'a']
    """
    if len(answer) > 100:
        return normalize(answer)
    answer = unwrap(answer.strip().replace("\u2212", "-"))  # a minus sign
    fraction = FRACTION.fullmatch(answer)
    if fraction:
        sign, over, under, plain_over, plain_under = fraction.groups()
        answer = f"{plain_over}/{plain_under}" if plain_over else f"{sign}{over}/{under}"
    written = WRITTEN.fullmatch(answer)
    if written:
        answer = written[1] + written[2].replace(",", "") + (written[3] or "")
    if NUMBER.fullmatch(answer):
        return str(Fraction(answer))
    answer = re.sub(r"(?<=[^\W\d_]|\))\.$", "", answer)  # the dot of a sentence
    choice = re.fullmatch(r"\(([A-Za-z])\)", answer)  # of several, such as (A)
    return normalize(choice[1] if choice else answer)


def unwrap(answer: str) -> str:
    r"""The answer without \boxed{} or dollar signs around the whole of it."""
    boxed = last_boxed(answer)
    if boxed is not None and answer == f"\\boxed{{{boxed}}}":
        return unwrap(boxed.strip())
    inside = re.fullmatch(r"\$([^$]+)\$", answer)
    return unwrap(inside[1].strip()) if inside else answer


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of a text, whose braces must match; None if there is none.

    >>> last_boxed(r"so \boxed{1} or \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{") + len("\\boxed{")
    if start < len("\\boxed{"):
        return None
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def spelled_only(answer: str) -> bool:
    r"""Is this answer compared letter by letter although it is no plain word: a unit, several numbers, LaTeX?

    >>> [answer for answer in ("72", "1/2", "Paris", "72 km", "(3, 4)", r"\sqrt{2}", "1e3") if spelled_only(answer)]
    ['72 km', '(3, 4)', '\\sqrt{2}', '1e3']
    """
    spelling = canonical(answer)
    return not NUMBER.fullmatch(spelling) and re.search(r"[0-9\\${}]", spelling) is not None


def normalize(text: str) -> str:
    """The text in lower case, with each stretch of white space replaced by one space."""
    return " ".join(text.split()).casefold()
