"""The default task, and the little "web" that the base model reads before RL.

A problem is an expression over + - *, its question the expression itself, its answer an integer. How hard they are is
set (`Arithmetic`): by default 1 to 6 operations, operands 1 to 20, factors 2 to 9, at most two factors a product, and
no parentheses.

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
import functools
import operator
import random
import re
import zlib
from dataclasses import dataclass

import numpy as np

from data.tokenizer import END_OF_TEXT, get_tokenizer

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
WORKED = ("plain working", "lost tag", "worked", "rechecked")  # the styles that show working
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


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

    def canonical(self, answer: str) -> str:
        """The same for answers that are equal, which have one vote together."""
        return answer

    def check(self, answer: str) -> bool:
        """Is this text the answer? Exactly: "-0", "007", "+3", " 3" and other digits than ASCII's are wrong.

        >>> [parse("8*7-19").check(a) for a in ("37", "037", "37.0", "8*7-19")]
        [True, False, False, False]
        """
        return answer == self.answer


def write_step(step: str, value: int) -> tuple[str, int]:
    """A step as somebody who makes no mistakes writes it, and the value that the next step goes on from."""
    return f"{step}={value}", value


def solve(question: str, write=write_step) -> tuple[list[str], int]:
    """The steps of working an expression out, left to right, each term when it is reached, and its value.

    `write` maps a step ("3*4") and its right value to its text and to the value that is carried on from. Raises
    ValueError if the question is no expression.

    >>> solve("20-3*4+1")
    (['3*4=12', '20-12=8', '8+1=9'], 9)
    >>> solve("2-(3+4)*5")
    (['3+4=7', '7*5=35', '2-35=-33'], -33)
    """
    steps, left = [], [""] + re.findall("[0-9]+|.", question)[::-1]  # what is still to be read, its end first

    def apply(a: int, sign: str, b: int) -> int:
        text, value = write(f"{a}{sign}{b}", OPERATIONS[sign](a, b))
        steps.append(text)
        return value

    def factor() -> int:
        if left[-1] != "(":
            return int(left.pop())
        left.pop()
        value = total()
        if left.pop() != ")":
            raise ValueError("parentheses do not match")
        return value

    def term() -> int:
        value = factor()
        while left[-1] == "*":
            value = apply(value, left.pop(), factor())
        return value

    def total() -> int:
        value = term()
        while left[-1] in ("+", "-"):
            value = apply(value, left.pop(), term())
        return value

    value = total()
    if left != [""]:
        raise ValueError("more than an expression")
    return steps, value


def is_test(question: str) -> bool:
    """True for the tenth of all expressions that neither the corpus nor RL ever asks."""
    return zlib.crc32(question.encode()) % 10 == 0


def parse(text: str, max_ops: int = 6, parentheses: bool = False) -> Problem:
    """The problem that an expression such as "8*7-19" states; white space around numbers is dropped.

    Raises ValueError if it is not numbers of 1 to 3 digits (no leading zero) joined by 1 to max_ops of + - *, with
    parentheses only if they are allowed.

    >>> parse("2*3*4 - 5").answer
    '19'
    """
    question = re.sub(r"\s*([-+*()])\s*", r"\1", text.strip())
    token = r"(0|[1-9][0-9]{0,2})(?![0-9])|" + ("[-+*()]" if parentheses else "[-+*]")
    try:
        ops, depth = len(re.findall("[-+*]", question)), question.count("(")
        if not (1 <= ops <= max_ops and depth <= max_ops and re.fullmatch(f"({token})+", question)):
            raise ValueError
        _, value = solve(question)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is no expression of 1 to {max_ops} operations + - * over numbers of 1 to 3 "
                         "digits, such as 8*7-19") from None
    return Problem(question, str(value))


# The styles


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


def dress(rng: random.Random, working: str, answer: str, style: str) -> str:
    """Working and an answer as an author of this style writes them."""
    if style == "blurt":
        return answer
    if style == "answer tag":
        return f"<answer>{answer}</answer>"
    if style == "plain working":
        return f"{working}, so {answer}"
    text = f"<think>{working}</think><answer>{answer}</answer>"
    if style == "lost tag":
        text = text.replace(rng.choice(("<think>", "</think>", "<answer>", "</answer>")), "")
    return text


def write_answer(rng: random.Random, question: str, style: str) -> tuple[str, int]:
    """What an author of this style answers, and the number that it comes to."""
    if style in WORKED:
        working, value = write_working(rng, question, style)
    else:
        working, value = "", solve(question)[1]
        if rng.random() >= BLURT_RIGHT:
            value = near(rng, value)
    return dress(rng, working, str(value), style), value


def mixture(styles: dict[str, float], worked_share: float, wait_share: float) -> dict[str, float]:
    """The shares of styles when only a share of the authors who look again does ("rechecked"; the others are "worked"),
    and then only a share of all who show working does (the others blurt).

    >>> round(mixture(STYLES, 0.0, 1.0)["blurt"], 2), mixture(STYLES, 1.0, 1.0) == STYLES
    (0.84, True)
    """
    styles = dict(styles)
    for style, share, instead in [("rechecked", wait_share, "worked")] + [(w, worked_share, "blurt") for w in WORKED]:
        moved = styles[style] * (1 - share)
        styles[style] -= moved
        styles[instead] += moved
    return styles


# The task


@dataclass(frozen=True)
class Arithmetic:
    """The task, as hard as it is set: its problems, what of them is held out, and the corpus.

    >>> problem = Arithmetic().make_problem(random.Random(0), n_ops=(2, 2))
    >>> problem.check(problem.answer), is_test(problem.question)
    (True, False)
    """
    max_ops: int = 4           # most operations of a problem that RL sees; the corpus has up to two more
    max_number: int = 20       # largest number that is added or subtracted
    max_factor: int = 9        # largest factor
    parentheses: bool = False  # a sum in parentheses in half of all problems that have room for one
    worked_share: float = 1.0  # of the authors who show working
    wait_share: float = 1.0    # of the authors who look again

    notes = ()  # lines about the task to print when a run begins

    @property
    def held_out(self) -> dict[str, tuple[int, int]]:
        """The kinds of held-out problems: fewest and most operations of each."""
        return {"test": (2, self.max_ops), "hard": (self.max_ops + 1, self.max_ops + 2)}

    @functools.cached_property
    def styles(self) -> dict[str, float]:
        """The share of each style."""
        return mixture(STYLES, self.worked_share, self.wait_share)

    @property
    def max_prompt_tokens(self) -> int:
        """Of the longest prompt: the two speakers, the numbers, the operations, the parentheses."""
        digits = len(str(max(self.max_number, self.max_factor)))
        return 2 + digits * (self.max_ops + 3) + self.max_ops + 2 + 2 * self.parentheses

    def parse(self, text: str) -> Problem:
        """The problem that an expression states. Raises ValueError if it is none of this task."""
        return parse(text, self.max_ops + 2, self.parentheses)

    def make_sum(self, rng: random.Random, n_ops: int, signs: str = "+-*") -> str:
        """An expression without parentheses: no two products touch, so that a term is a number or a*b."""
        ops = []
        for _ in range(n_ops):
            ops.append(rng.choice(signs.replace("*", "") if ops and ops[-1] == "*" else signs))
        text, ops = "", ["", *ops, ""]
        for before, after in zip(ops, ops[1:]):
            text += before + str(rng.randint(2, self.max_factor) if "*" in (before, after)
                                 else rng.randint(1, self.max_number))
        return text

    def make_question(self, rng: random.Random, n_ops: int) -> str:
        """A random expression of n_ops operations; with parentheses, a sum of one or two of them takes the place of a
        number."""
        if not self.parentheses or n_ops < 2 or rng.random() < 0.5:
            return self.make_sum(rng, n_ops)
        inside = rng.randint(1, min(2, n_ops - 1))
        outer, inner = self.make_sum(rng, n_ops - inside), self.make_sum(rng, inside, "+-")
        number = rng.choice(list(re.finditer("[0-9]+", outer)))
        return f"{outer[:number.start()]}({inner}){outer[number.end():]}"

    def make_problem(self, rng: random.Random, n_ops: tuple[int, int] | None = None, test: bool = False) -> Problem:
        """A random problem with n_ops[0] to n_ops[1] operations (each number equally likely; RL's 1 to max_ops if not
        given) from one side of the split."""
        while True:
            question = self.make_question(rng, rng.randint(*(n_ops or (1, self.max_ops))))
            if is_test(question) == test:
                return Problem(question, str(solve(question)[1]))

    def heldout_problems(self, n: int, kind: str, seed: int) -> list[Problem]:
        """n different problems of the test side, of a kind in held_out. Raises ValueError if there are not as many."""
        rng, found = random.Random(f"{kind}/{seed}"), {}
        for _ in range(1000 * n):
            question = self.make_question(rng, rng.randint(*self.held_out[kind]))
            if is_test(question):
                found[question] = Problem(question, str(solve(question)[1]))
            if len(found) == n:
                return list(found.values())
        raise ValueError(f"there are fewer than {n} {kind} problems of this difficulty")

    def write_thread(self, rng: random.Random) -> tuple[str, str, bool]:
        """A forum thread -> (its text, the style of its answer, is the answer right)."""
        problem = self.make_problem(rng, (1, self.max_ops + 2))
        style, = rng.choices(tuple(self.styles), tuple(self.styles.values()))
        text, value = write_answer(rng, problem.question, style)
        return problem.prompt + text, style, problem.check(str(value))

    def write_page(self, rng: random.Random) -> str:
        """A textbook page: the right steps of a few problems, in any order."""
        questions = (self.make_question(rng, rng.randint(1, self.max_ops + 2)) for _ in range(4))
        facts = [step for question in questions for step in solve(question)[0]]
        rng.shuffle(facts)
        return "Facts:\n" + "\n".join(facts)

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """At least n_tokens token ids, uint16 (n,): documents in random order, each followed by end of text. The
        held-out corpus of a seed has other documents."""
        return write_corpus(self, n_tokens, random.Random(f"corpus/{seed}" + "/heldout" * heldout))


def write_corpus(task, n_tokens: int, rng: random.Random) -> np.ndarray:
    """At least n_tokens token ids, uint16 (n,), of a task's pages and threads."""
    parts, size, encoding = [], 0, get_tokenizer()
    while size < n_tokens:
        documents = [task.write_page(rng) if rng.random() < PAGE_SHARE else task.write_thread(rng)[0]
                     for _ in range(1000)]
        text = "".join(document + END_OF_TEXT for document in documents)
        parts.append(np.array(encoding.encode(text, allowed_special="all"), dtype=np.uint16))
        size += len(parts[-1])
    return np.concatenate(parts)


make_problem = Arithmetic().make_problem


def style_table(task, n: int = 20_000, seed: int = 0) -> str:
    """A Markdown table of the styles in a task's forum, counted over n threads."""
    rng, rows = random.Random(f"table/{seed}"), {style: [] for style in task.styles}
    for _ in range(n):
        text, style, right = task.write_thread(rng)
        rows[style].append((right, text.split("Assistant: ")[1]))
    lines = ["| style | share of threads | right | example |", "|---|---|---|---|"]
    for style, found in rows.items():
        share, right = len(found) / n, sum(right for right, _ in found) / len(found)
        examples = [text for _, text in found if "wait" in text or style != "rechecked"]
        example = min(examples, key=lambda text: abs(len(text) - 60))
        lines.append(f"| {style} | {share:.1%} | {right:.0%} | `{example}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(style_table(Arithmetic()))
