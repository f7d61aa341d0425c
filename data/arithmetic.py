"""The default task, and the little "web" that the base model reads before RL.

A problem is an expression of 1 to 6 operations over + - *: operands 1 to 20, factors 2 to 9, at most two factors a
product. Its question is the expression itself, its answer an integer.

    User: 8*7-19
    Assistant: <think>8*7=56, 56-19=37</think><answer>37</answer>

The corpus has two kinds of documents: textbook pages of single facts, and forum threads as above, whose authors answer
in the styles of STYLES. Most blurt a number; some show working, with tags or without; a minority works inside
<think>...</think><answer>...</answer>; a few look again ("wait"). Whoever works makes a slip in SLIP of the steps and
carries on from the wrong value. Pretraining imitates them all, right and wrong alike.

Train and test never meet: a hash of the expression decides which side it is on, and no expression of the test side is
ever the `User:` line of a document or a prompt of RL.

    python -m data.arithmetic      prints the styles with their share, their share of correct answers and an example
"""
import random
import re
import zlib
from dataclasses import dataclass

import numpy as np

from data.tokenizer import END_OF_TEXT, get_tokenizer

MAX_OPS = 6
MAX_PROMPT_TOKENS = 2 + 2 * (MAX_OPS + 1) + MAX_OPS  # the two speakers, numbers of two digits, operations
TRAIN_OPS = (1, 4)                           # fewest and most operations of RL's problems; the corpus has 1 to MAX_OPS
HELD_OUT = {"test": (2, 4), "hard": (5, 6)}  # and of those that models are measured on
SLIP = 0.03          # chance that a step of somebody's working is wrong
PAGE_SHARE = 0.3     # share of documents that are textbook pages (they are longer than threads)
RECHECK_SLIP = 0.15  # the same for those who look again, and then see it
BLURT_RIGHT = 0.3    # chance that a number blurted out is right
STYLES = {           # share of the forum's answers
    "blurt": 0.34,         # 37
    "answer tag": 0.10,    # <answer>37</answer>
    "empty thought": 0.06, # <think></think><answer>37</answer>
    "plain working": 0.12, # 8*7=56, 56-19=37, so 37
    "lost tag": 0.10,      # <think>8*7=56, 56-19=37<answer>37</answer>
    "worked": 0.24,        # <think>8*7=56, 56-19=37</think><answer>37</answer>
    "rechecked": 0.04,     # <think>8*7=54, wait, 8*7=56, 56-19=37</think><answer>37</answer>
}


@dataclass(frozen=True)
class Problem:
    """An expression to evaluate. `question` is what the user asks, `answer` the exact integer as text.

    >>> parse("8*7-19").prompt
    'User: 8*7-19\\nAssistant: '
    """
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The text up to where the model goes on."""
        return f"User: {self.question}\nAssistant: "

    def check(self, answer: str) -> bool:
        """Is this text the answer? Exactly: "-0", "007", "+3", " 3" and other digits than ASCII's are wrong.

        >>> [parse("8*7-19").check(a) for a in ("37", "037", "37.0", "8*7-19")]
        [True, False, False, False]
        """
        return answer == self.answer


def parse(text: str) -> Problem:
    """The problem that an expression such as "8*7-19" states; white space around numbers is dropped.

    Raises ValueError if it is not numbers of 1 to 3 digits (no leading zero) joined by 1 to MAX_OPS of + - *.

    >>> parse("2*3*4 - 5").answer
    '19'
    """
    question = re.sub(r"\s*([-+*])\s*", r"\1", text.strip())
    if not re.fullmatch(r"(0|[1-9][0-9]{0,2})([-+*](0|[1-9][0-9]{0,2})){1,%d}" % MAX_OPS, question):
        raise ValueError(f"{text[:60]!r} is no expression of 1 to {MAX_OPS} operations + - * over numbers of 1 to 3 "
                         "digits, such as 8*7-19")
    return Problem(question, str(solve(question)[1]))


def write_step(step: str, value: int) -> tuple[str, int]:
    """A step as somebody who makes no mistakes writes it, and the value that the next step goes on from."""
    return f"{step}={value}", value


def solve(question: str, write=write_step) -> tuple[list[str], int]:
    """The steps of working an expression out, left to right, each term when it is reached, and its value.

    `write` maps a step ("3*4") and its right value to its text and to the value that is carried on from.

    >>> solve("20-3*4+1")
    (['3*4=12', '20-12=8', '8+1=9'], 9)
    """
    steps, total = [], None
    for sign, term in re.findall(r"([-+]?)([0-9*]+)", question):
        value, *factors = map(int, term.split("*"))
        for factor in factors:
            text, value = write(f"{value}*{factor}", value * factor)
            steps.append(text)
        if total is not None:
            text, value = write(f"{total}{sign}{value}", total + value if sign == "+" else total - value)
            steps.append(text)
        total = value
    return steps, total


def make_question(rng: random.Random, n_ops: int) -> str:
    """A random expression of n_ops operations: no two products touch, so that a term is a number or a*b."""
    ops = []
    for _ in range(n_ops):
        ops.append(rng.choice("+-" if ops and ops[-1] == "*" else "+-*"))
    text, ops = "", ["", *ops, ""]
    for before, after in zip(ops, ops[1:]):
        text += before + str(rng.randint(2, 9) if "*" in (before, after) else rng.randint(1, 20))
    return text


def is_test(question: str) -> bool:
    """True for the tenth of all expressions that neither the corpus nor RL ever asks."""
    return zlib.crc32(question.encode()) % 10 == 0


def make_problem(rng: random.Random, n_ops: tuple[int, int] = TRAIN_OPS, test: bool = False) -> Problem:
    """A random problem with n_ops[0] to n_ops[1] operations (each number equally likely) from one side of the split.

    >>> problem = make_problem(random.Random(0), n_ops=(2, 2))
    >>> problem.check(problem.answer), is_test(problem.question)
    (True, False)
    """
    while True:
        question = make_question(rng, rng.randint(*n_ops))
        if is_test(question) == test:
            return Problem(question, str(solve(question)[1]))


def heldout_problems(n: int, kind: str, seed: int) -> list[Problem]:
    """n different problems of the test side, of a kind in HELD_OUT. Raises ValueError if there are not that many."""
    rng, found = random.Random(f"{kind}/{seed}"), {}
    for _ in range(100 * n):
        problem = make_problem(rng, HELD_OUT[kind], test=True)
        found[problem.question] = problem
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"there are fewer than {n} {kind} problems")


# The corpus


def near(rng: random.Random, value: int) -> int:
    """A wrong value of the kind that people write: off by a few, or by ten."""
    return value + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))


def write_working(rng: random.Random, question: str, style: str) -> tuple[str, int]:
    """An author's steps, slips included, and the value that they reach."""
    def write(step: str, value: int) -> tuple[str, int]:
        if style == "rechecked":
            if rng.random() >= RECHECK_SLIP:
                return write_step(step, value)
            return f"{step}={near(rng, value)}, wait, {step}={value}", value
        return write_step(step, near(rng, value) if rng.random() < SLIP else value)

    steps, value = solve(question, write)
    return ", ".join(steps), value


def write_answer(rng: random.Random, question: str, style: str) -> tuple[str, int]:
    """What an author of this style answers, and the number that it comes to."""
    if style in ("blurt", "answer tag", "empty thought"):
        value = solve(question)[1]
        if rng.random() >= BLURT_RIGHT:
            value = near(rng, value)
        text = str(value) if style == "blurt" else f"<answer>{value}</answer>"
        return ("<think></think>" if style == "empty thought" else "") + text, value
    steps, value = write_working(rng, question, style)
    if style == "plain working":
        return f"{steps}, so {value}", value
    text = f"<think>{steps}</think><answer>{value}</answer>"
    if style == "lost tag":
        text = text.replace(rng.choice(("<think>", "</think>", "<answer>", "</answer>")), "")
    return text, value


def write_thread(rng: random.Random) -> tuple[str, str, bool]:
    """A forum thread -> (its text, the style of its answer, is the answer right)."""
    problem = make_problem(rng, (1, MAX_OPS))
    style, = rng.choices(tuple(STYLES), tuple(STYLES.values()))
    text, value = write_answer(rng, problem.question, style)
    return problem.prompt + text, style, problem.check(str(value))


def write_page(rng: random.Random) -> str:
    """A textbook page: the right steps of a few problems, in any order."""
    facts = [step for _ in range(4) for step in solve(make_question(rng, rng.randint(1, MAX_OPS)))[0]]
    rng.shuffle(facts)
    return "Facts:\n" + "\n".join(facts)


def make_corpus(n_tokens: int, seed: int) -> np.ndarray:
    """At least n_tokens token ids, uint16 (n,): documents in random order, each followed by end of text."""
    rng, encoding = random.Random(f"corpus/{seed}"), get_tokenizer()
    parts, size = [], 0
    while size < n_tokens:
        documents = [write_page(rng) if rng.random() < PAGE_SHARE else write_thread(rng)[0] for _ in range(1000)]
        text = "".join(document + END_OF_TEXT for document in documents)
        parts.append(np.array(encoding.encode(text, allowed_special="all"), dtype=np.uint16))
        size += len(parts[-1])
    return np.concatenate(parts)


def style_table(n: int = 20_000, seed: int = 0) -> str:
    """A Markdown table of the forum's styles, counted over n threads."""
    rng, rows = random.Random(f"table/{seed}"), {style: [] for style in STYLES}
    for _ in range(n):
        text, style, right = write_thread(rng)
        rows[style].append((right, text.split("Assistant: ")[1]))
    lines = ["| style | share of threads | right | example |", "|---|---|---|---|"]
    for style, found in rows.items():
        share, right = len(found) / n, sum(right for right, _ in found) / len(found)
        examples = [text for _, text in found if "wait" in text or style != "rechecked"]
        example = min(examples, key=lambda text: abs(len(text) - 60))
        lines.append(f"| {style} | {share:.1%} | {right:.0%} | `{example}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(style_table())
