"""A task in which it pays to try again: make a target from three or four numbers, each used once, with + - * and ( ).

    User: 3 4 7 = 25
    Assistant: <think>3+7=10, 10*4=40, 25?, wait, 3*7=21, 21+4=25, 25?</think><answer>3*7+4</answer>

A solution is hard to see at once. So an answer that compares an attempt with the target, and tries again after a miss,
is correct more often than an answer with the first attempt. The corpus has the kinds of documents and the response
styles of data/arithmetic.py. Answers with steps make random attempts; with probability TRY_RIGHT an attempt is a known
solution. Most styles end with the first attempt, correct or not. The style "rechecked" writes the target after each
attempt ("25?"), and tries again until an attempt reaches the target, or until there are MAX_TRIES attempts. Half of the
textbook pages are marked homework, which shows how a value is compared with a target.

Problems in RL and of the held-out kind "test" have three numbers, those of the kind "hard" four. Training and test
problems are disjoint: a hash of the target and the sorted numbers decides the side of a problem.

    python experiments/styles.py countdown    prints each style with its share, how often it is correct, and an example
"""
import ast
import random
import re
import zlib
from dataclasses import dataclass

import numpy as np

from data import arithmetic
from data.arithmetic import OPERATIONS, WORKED, Arithmetic, format_answer
from data.corpus import write_corpus

LARGEST = 99        # every value in an attempt is from 0 to LARGEST
TRY_RIGHT = 0.15    # probability that an attempt in an answer with steps is a known solution
BLURT_RIGHT = 0.3   # the same for an answer without steps
MARKED_RIGHT = 0.4  # the same for an attempt in marked homework
MAX_TRIES = 5       # most attempts in the style "rechecked"
MARKED_SHARE = 0.5  # share of the textbook pages that are marked homework
STYLES = {          # share of each style among the forum's answers
    "blurt": 0.28,         # 3*7+4
    "answer tag": 0.10,    # <answer>3*7+4</answer>
    "empty thought": 0.06, # <think></think><answer>3*7+4</answer>
    "plain working": 0.12, # 3*7=21, 21+4=25, so 3*7+4
    "lost tag": 0.10,      # <think>3*7=21, 21+4=25</think>3*7+4</answer>
    "worked": 0.24,        # <think>3*7=21, 21+4=25</think><answer>3*7+4</answer>
    "rechecked": 0.10,     # <think>3+7=10, 10*4=40, 25?, wait, 3*7=21, 21+4=25, 25?</think><answer>3*7+4</answer>
}

SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}  # of Python's syntax tree
Attempt = tuple[tuple[str, int, int], ...]  # steps (sign, number, value reached); the first is ("", number, number)


@dataclass(frozen=True)
class Problem(arithmetic.Problem):
    """Numbers and a target. `question` is "3 4 7 = 25", `answer` is "3*7+4", `solution` is the attempt behind it."""
    solution: Attempt

    @property
    def numbers(self) -> list[str]:
        return self.question.split(" = ")[0].split()

    @property
    def target(self) -> int:
        return self.solution[-1][2]

    @property
    def working(self) -> str:
        return write_steps(self.solution)

    def canonical(self, answer: str) -> str:
        """One spelling for all expressions that use the numbers correctly and have the same value. Other text stays.

        >>> [parse("3 4 7 = 25").canonical(a) for a in ("4+7*3", "3*4+7", "7+3*4", "25")]
        ['3*7+4', '= 19', '= 19', '25']
        """
        value = evaluate(answer, self.numbers)
        if value is None:
            return answer
        return self.answer if value == self.target else f"= {value}"

    def check(self, answer: str) -> bool:
        """Does this expression use each number once and have the target as its value? Nothing is executed."""
        return evaluate(answer, self.numbers) == self.target


def evaluate(expression: str, numbers: list[str]) -> int | None:
    """The exact value of an expression over + - * ( ) that uses each of the numbers once; None for any other text."""
    expression = re.sub(" ?([-+*()]) ?", r"\1", expression)
    if not re.fullmatch("[-+*()0-9]{1,100}", expression) or sorted(re.findall("[0-9]+", expression)) != sorted(numbers):
        return None
    try:
        return value_of(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def value_of(node: ast.expr) -> int:
    """The value of Python's syntax tree of an expression. Raises ValueError unless it is numbers and + - * alone."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        apply = OPERATIONS[SIGNS[type(node.op)]]
        return apply(value_of(node.left), value_of(node.right))
    raise ValueError("this is no expression of numbers and + - *")


def attempts(numbers: tuple[int, ...]) -> list[Attempt]:
    """All ways to start with one number and add, subtract or multiply by the others, with values from 0 to LARGEST."""
    partial = [((("", n, n),), numbers[:i] + numbers[i + 1:]) for i, n in enumerate(numbers)]  # (attempt, unused)
    for _ in numbers[1:]:
        longer = []
        for attempt, unused in partial:
            for i, n in enumerate(unused):
                for sign, apply in OPERATIONS.items():
                    value = apply(attempt[-1][2], n)
                    if 0 <= value <= LARGEST:
                        longer.append((attempt + ((sign, n, value),), unused[:i] + unused[i + 1:]))
        partial = longer
    return [attempt for attempt, _ in partial]


def random_attempt(rng: random.Random, numbers: tuple[int, ...]) -> Attempt:
    """One of `attempts`, each equally likely."""
    while True:
        order = list(numbers)
        rng.shuffle(order)
        attempt = [("", order[0], order[0])]
        for n in order[1:]:
            sign = rng.choice("+-*")
            attempt.append((sign, n, OPERATIONS[sign](attempt[-1][2], n)))
        if all(0 <= value <= LARGEST for _, _, value in attempt):
            return tuple(attempt)


def write_steps(attempt: Attempt) -> str:
    """The attempt as steps, such as "3+7=10, 10*4=40"."""
    return ", ".join(f"{before}{sign}{n}={value}" for (_, _, before), (sign, n, value) in zip(attempt, attempt[1:]))


def write_expression(attempt: Attempt) -> str:
    """The attempt as one expression, such as "(3+7)*4"."""
    text, is_sum = "", False
    for sign, n, _ in attempt:
        if sign == "*" and is_sum:
            text = f"({text})"
        text, is_sum = f"{text}{sign}{n}", sign in ("+", "-")
    return text


def parse(text: str) -> Problem:
    """The problem of a text such as "3 4 7 = 25". Raises ValueError unless the text is three or four numbers from 1 to
    LARGEST, and a target that one of their `attempts` reaches."""
    match = re.fullmatch(r"\s*([1-9][0-9]?(?:\s+[1-9][0-9]?){2,3})\s*=\s*([0-9]{1,2})\s*", text)
    if not match:
        raise ValueError(f"{text[:60]!r} is no countdown: three or four numbers and a target, such as 3 4 7 = 25")
    numbers, target = match[1].split(), int(match[2])
    for attempt in attempts(tuple(map(int, numbers))):
        if attempt[-1][2] == target:
            return Problem(f"{' '.join(numbers)} = {target}", write_expression(attempt), attempt)
    raise ValueError(f"no solution of {' '.join(numbers)} = {target} was found: try another target")


def is_test(problem: Problem) -> bool:
    """True for a tenth of all problems, in any order of the numbers. Neither the corpus nor RL ever asks these."""
    return zlib.crc32(f"{sorted(problem.numbers)} {problem.target}".encode()) % 10 == 0


def make_attempt(rng: random.Random, problem: Problem, right: float) -> Attempt:
    """The problem's solution with probability `right`, else a random attempt, which may reach the target too."""
    if rng.random() < right:
        return problem.solution
    return random_attempt(rng, tuple(n for _, n, _ in problem.solution))


def write_working(rng: random.Random, problem: Problem, style: str) -> tuple[str, Attempt]:
    """The attempts of an answer in this style, all different -> (their text, the last attempt)."""
    texts = {}  # attempt -> its text
    while True:
        attempt = make_attempt(rng, problem, TRY_RIGHT)
        texts[attempt] = write_steps(attempt)
        if style == "rechecked":
            texts[attempt] += f", {problem.target}?"
        if style != "rechecked" or attempt[-1][2] == problem.target or len(texts) == MAX_TRIES:
            return ", wait, ".join(texts.values()), attempt


@dataclass(frozen=True)
class Countdown:
    """The task (see docs/own.md for its members). Raises ValueError if max_number is above LARGEST."""
    max_number: int = 20  # largest number of a problem

    styles = STYLES                            # the share of each style in the forum
    held_out = {"test": 3, "hard": 4}          # the kinds of held-out problems, with how many numbers each has
    max_prompt_tokens = 2 + 4 * 2 + 3 + 3 + 2  # two speakers, four numbers of two digits, three spaces, " = ", target
    parse = staticmethod(parse)
    notes, stop_ids, reward = Arithmetic.notes, Arithmetic.stop_ids, staticmethod(Arithmetic.reward)
    encoding, encode_prompt = Arithmetic.encoding, Arithmetic.encode_prompt

    def __post_init__(self):
        if self.max_number > LARGEST:
            raise ValueError(f"max_number must be at most {LARGEST} in countdown, not {self.max_number}")

    def random_problem(self, rng: random.Random, n_numbers: int) -> Problem:
        """A random problem of either side of the split."""
        solution = random_attempt(rng, tuple(rng.randint(1, self.max_number) for _ in range(n_numbers)))
        numbers = [str(n) for _, n, _ in solution]
        rng.shuffle(numbers)
        return Problem(f"{' '.join(numbers)} = {solution[-1][2]}", write_expression(solution), solution)

    def make_problem(self, rng: random.Random, longer: bool = False) -> Problem:
        """A random training problem of three numbers; with `longer`, of three or four, as in the corpus."""
        n_numbers = rng.choice((3, 4)) if longer else 3
        while True:
            problem = self.random_problem(rng, n_numbers)
            if not is_test(problem):
                return problem

    def heldout_problems(self, n: int, kind: str, seed: int) -> list[Problem]:
        """n different problems of the test side, of a kind in held_out. Raises ValueError if there are fewer."""
        rng, problems = random.Random(f"countdown/{kind}/{seed}"), {}
        for _ in range(1000 * n):
            problem = self.random_problem(rng, self.held_out[kind])
            if is_test(problem):
                problems.setdefault((*sorted(problem.numbers), problem.target), problem)
            if len(problems) == n:
                return list(problems.values())
        raise ValueError(f"there are fewer than {n} {kind} problems of this difficulty: lower --eval_problems")

    def write_thread(self, rng: random.Random) -> tuple[str, str, bool]:
        """A forum thread -> (its text, the style of its answer, whether the answer is correct)."""
        problem = self.make_problem(rng, longer=True)
        style, = rng.choices(tuple(self.styles), tuple(self.styles.values()))
        if style in WORKED:
            working, attempt = write_working(rng, problem, style)
        else:
            working, attempt = "", make_attempt(rng, problem, BLURT_RIGHT)
        text = format_answer(rng, working, write_expression(attempt), style)
        return problem.prompt + text, style, attempt[-1][2] == problem.target

    def write_page(self, rng: random.Random) -> str:
        """A textbook page: marked homework, or the correct steps of a few attempts in random order."""
        if rng.random() < MARKED_SHARE:
            problem = self.make_problem(rng, longer=True)
            homework = [make_attempt(rng, problem, MARKED_RIGHT) for _ in range(4)]
            return "\n".join([problem.question] + [
                f"{write_steps(attempt)}, {problem.target}?, {'right' if attempt[-1][2] == problem.target else 'no'}"
                for attempt in homework])
        facts = [step for _ in range(6) for step in write_steps(self.make_problem(rng).solution).split(", ")]
        rng.shuffle(facts)
        return "Facts:\n" + "\n".join(facts)

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """At least n_tokens token ids, uint16 (n,), in documents as in data/arithmetic.py."""
        name = f"countdown/corpus/{seed}"
        return write_corpus(self, n_tokens, f"{name}/heldout" if heldout else name)
