"""A task where looking again pays: make the target from three or four numbers, each used once, with + - * and ( ).

    User: 3 4 7 = 25
    Assistant: <think>3+7=10, 10*4=40, 25?, wait, 3*7=21, 21+4=25, 25?</think><answer>3*7+4</answer>

Nobody sees the solution at once: who tries, compares with the target, says "wait" and tries again gets further than
who answers what came out first. The corpus has the styles of data/arithmetic.py. Whoever works in it tries an
expression at random, or in TRY_RIGHT of the cases one that is known to be right. Most answer it whatever it comes to;
those who look again ("rechecked") write the target beside it, "25?", and go on until they have hit it, for at most
MAX_TRIES. How values and targets are compared the textbook pages show: half of them are homework that somebody has
marked.

RL sees three numbers, and so does "test"; "hard" has four. Train and test never meet: a hash of the numbers, in
whatever order, and the target decides which side a problem is on. The same numbers may stand on both sides with
different targets, and an attempt that misses one target hits another: what is held out is the question.

    python -m data.countdown      prints the styles with their share, their share of correct answers and an example
"""
import functools
import random
import re
import zlib
from dataclasses import dataclass

import numpy as np

from data import arithmetic
from data.arithmetic import OPERATIONS, WORKED, dress, mixture, solve, style_table, write_corpus

LARGEST = 99       # of all values on the way, which are not negative either
TRY_RIGHT = 0.15   # chance that an author's attempt is one that they know to be right
BLURT_RIGHT = 0.3  # chance that an expression blurted out is right
MAX_TRIES = 5      # of an author who looks again
MARKED_SHARE = 0.5 # share of pages that are marked homework
MARKED_RIGHT = 0.4 # chance that an attempt in it is one that is known to be right
STYLES = {         # share of the forum's answers
    "blurt": 0.28,         # 3*7+4
    "answer tag": 0.10,    # <answer>3*7+4</answer>
    "empty thought": 0.06, # <think></think><answer>3*7+4</answer>
    "plain working": 0.12, # 3*7=21, 21+4=25, so 3*7+4
    "lost tag": 0.10,      # <think>3*7=21, 21+4=25</think>3*7+4</answer>
    "worked": 0.24,        # <think>3*7=21, 21+4=25</think><answer>3*7+4</answer>
    "rechecked": 0.10,     # <think>3+7=10, 10*4=40, 25?, wait, 3*7=21, 21+4=25, 25?</think><answer>3*7+4</answer>
}


@dataclass(frozen=True)
class Problem(arithmetic.Problem):
    """Numbers and a target: `question` is "3 4 7 = 25", `answer` one of the expressions that solve it."""

    @property
    def numbers(self) -> list[str]:
        return self.question.split(" = ")[0].split()

    @property
    def target(self) -> str:
        return self.question.split(" = ")[1]

    def canonical(self, answer: str) -> str:
        """The same for expressions of the same value that use the numbers as they should; other text stands for itself.

        >>> [parse("3 4 7 = 25").canonical(a) for a in ("4+7*3", "3*4+7", "7+3*4", "25")]
        ['3*7+4', '= 19', '= 19', '25']
        """
        value = evaluate(answer, self.numbers)
        return answer if value is None else self.answer if value == int(self.target) else f"= {value}"

    def check(self, answer: str) -> bool:
        """Does this expression use each number once, and come to the target? Nothing is executed.

        >>> [parse("3 4 7 = 25").check(a) for a in ("3*7+4", "4 + (7*3)", "25", "3*7+4+0", "(3*7+4", "3**7")]
        [True, True, False, False, False, False]
        """
        return evaluate(answer, self.numbers) == int(self.target)


def evaluate(expression: str, numbers: list[str]) -> int | None:
    """The exact value of an expression over + - * ( ) that uses each of the numbers once; None for any other text."""
    expression = re.sub(" ?([-+*()]) ?", r"\1", expression)
    if not re.fullmatch("[-+*()0-9]{1,100}", expression) or sorted(re.findall("[0-9]+", expression)) != sorted(numbers):
        return None
    try:
        return solve(expression)[1]
    except ValueError:
        return None


Attempt = tuple[tuple[str, int, int], ...]  # steps (sign, number, value): the first has the sign "" and its own number


def attempts(numbers: tuple[int, ...]) -> list[Attempt]:
    """All ways to go from one number to a value by adding, subtracting or multiplying by the others, one at a time,
    without leaving 0..LARGEST.

    >>> [write_expression(attempt) for attempt in attempts((2, 3)) if attempt[-1][2] == 6]
    ['2*3', '3*2']
    """
    found: list[tuple[Attempt, tuple[int, ...]]] = [
        ((("", n, n),), numbers[:i] + numbers[i + 1:]) for i, n in enumerate(numbers)]
    for _ in numbers[1:]:
        found = [(attempt + ((sign, n, value),), left[:i] + left[i + 1:])
                 for attempt, left in found for i, n in enumerate(left) for sign, apply in OPERATIONS.items()
                 if 0 <= (value := apply(attempt[-1][2], n)) <= LARGEST]
    return [attempt for attempt, _ in found]


def write_steps(attempt: Attempt) -> str:
    """The attempt as somebody works it out.

    >>> write_steps((("", 3, 3), ("*", 7, 21), ("+", 4, 25)))
    '3*7=21, 21+4=25'
    """
    return ", ".join(f"{before}{sign}{n}={value}" for (_, _, before), (sign, n, value) in zip(attempt, attempt[1:]))


def write_expression(attempt: Attempt) -> str:
    """The attempt as one expression, with parentheses where a sum is multiplied.

    >>> write_expression((("", 3, 3), ("+", 7, 10), ("*", 4, 40)))
    '(3+7)*4'
    """
    text, is_sum = "", False
    for sign, n, _ in attempt:
        if sign == "*" and is_sum:
            text = f"({text})"
        text, is_sum = f"{text}{sign}{n}", sign in ("+", "-")
    return text


def parse(text: str) -> Problem:
    """The problem that a text such as "3 4 7 = 25" states. Raises ValueError if it is not three or four numbers from 1
    to LARGEST and a target that one of their `attempts` hits.

    >>> parse(" 3 4  7 = 25").answer
    '3*7+4'
    """
    found = re.fullmatch(r"\s*([1-9][0-9]?(?:\s+[1-9][0-9]?){2,3})\s*=\s*([0-9]{1,2})\s*", text)
    if not found:
        raise ValueError(f"{text[:60]!r} is no countdown: three or four numbers and a target, such as 3 4 7 = 25")
    numbers, target = found[1].split(), int(found[2])
    solutions = [attempt for attempt in attempts(tuple(map(int, numbers))) if attempt[-1][2] == target]
    if not solutions:
        raise ValueError(f"no way was found from {' '.join(numbers)} to {target}")
    return Problem(f"{' '.join(numbers)} = {target}", write_expression(solutions[0]))


def is_test(problem: Problem) -> bool:
    """True for the tenth of all problems that neither corpus nor RL ever poses, whatever the order of the numbers."""
    return zlib.crc32(f"{sorted(problem.numbers)} {problem.target}".encode()) % 10 == 0


def random_attempt(rng: random.Random, numbers: tuple[int, ...]) -> Attempt:
    """One of `attempts`, each equally likely."""
    while True:
        left = list(numbers)
        rng.shuffle(left)
        attempt = [("", left[0], left[0])]
        for n in left[1:]:
            sign = rng.choice("+-*")
            attempt.append((sign, n, OPERATIONS[sign](attempt[-1][2], n)))
        if all(0 <= value <= LARGEST for _, _, value in attempt):
            return tuple(attempt)


# The styles


def another(rng: random.Random, solution: Attempt) -> Attempt:
    """An attempt with the numbers of a solution, which may hit the target too."""
    return random_attempt(rng, tuple(n for _, n, _ in solution))


def write_working(rng: random.Random, solution: Attempt, style: str) -> tuple[str, Attempt]:
    """An author's attempts, and the last of them."""
    tried, texts, target = set(), [], solution[-1][2]
    while True:
        attempt = solution if rng.random() < TRY_RIGHT else another(rng, solution)
        if attempt not in tried:
            tried.add(attempt)
            texts.append(write_steps(attempt) + f", {target}?" * (style == "rechecked"))
            if style != "rechecked" or attempt[-1][2] == target or len(texts) == MAX_TRIES:
                return ", wait, ".join(texts), attempt


def write_answer(rng: random.Random, solution: Attempt, style: str) -> tuple[str, Attempt]:
    """What an author of this style answers, and the attempt that it comes from."""
    if style in WORKED:
        working, attempt = write_working(rng, solution, style)
    else:
        working, attempt = "", solution if rng.random() < BLURT_RIGHT else another(rng, solution)
    return dress(rng, working, write_expression(attempt), style), attempt


# The task


@dataclass(frozen=True)
class Countdown:
    """The task: its problems, what of them is held out, and the corpus.

    >>> problem = Countdown().make_problem(random.Random(0))
    >>> problem.check(problem.answer)
    True
    """
    max_number: int = 20       # largest of the numbers
    worked_share: float = 1.0  # of the authors who show working
    wait_share: float = 1.0    # of the authors who look again

    notes = ()                                    # lines about the task to print when a run begins
    held_out = {"test": 3, "hard": 4}             # the kinds of held-out problems: how many numbers
    max_prompt_tokens = 2 + 4 * 2 + 3 + 3 + 2     # of the longest prompt
    parse = staticmethod(parse)

    @functools.cached_property
    def styles(self) -> dict[str, float]:
        """The share of each style."""
        return mixture(STYLES, self.worked_share, self.wait_share)

    def make_solution(self, rng: random.Random, n_numbers: int) -> tuple[Problem, Attempt]:
        """A problem from either side of the split, and an attempt that solves it."""
        solution = random_attempt(rng, tuple(rng.randint(1, self.max_number) for _ in range(n_numbers)))
        numbers = [n for _, n, _ in solution]
        rng.shuffle(numbers)
        return Problem(f"{' '.join(map(str, numbers))} = {solution[-1][2]}", write_expression(solution)), solution

    def make_seen(self, rng: random.Random, n_numbers: int) -> tuple[Problem, Attempt]:
        """The same, from the training side."""
        while True:
            problem, solution = self.make_solution(rng, n_numbers)
            if not is_test(problem):
                return problem, solution

    def make_problem(self, rng: random.Random) -> Problem:
        """A random training problem."""
        return self.make_seen(rng, 3)[0]

    def heldout_problems(self, n: int, kind: str, seed: int) -> list[Problem]:
        """n different problems of the test side, of a kind in held_out. Raises ValueError if there are not as many."""
        rng, found = random.Random(f"countdown/{kind}/{seed}"), {}
        for _ in range(1000 * n):
            problem, _ = self.make_solution(rng, self.held_out[kind])
            if is_test(problem):
                found.setdefault((*sorted(problem.numbers), problem.target), problem)
            if len(found) == n:
                return list(found.values())
        raise ValueError(f"there are fewer than {n} {kind} problems of this difficulty")

    def write_thread(self, rng: random.Random) -> tuple[str, str, bool]:
        """A forum thread -> (its text, the style of its answer, is the answer right)."""
        problem, solution = self.make_seen(rng, rng.choice((3, 4)))
        style, = rng.choices(tuple(self.styles), tuple(self.styles.values()))
        text, attempt = write_answer(rng, solution, style)
        return problem.prompt + text, style, attempt[-1][2] == solution[-1][2]

    def write_page(self, rng: random.Random) -> str:
        """A textbook page: the right steps of a few attempts in any order, or homework that somebody has marked,
        attempts at one problem that are right or not."""
        if rng.random() < MARKED_SHARE:
            problem, solution = self.make_seen(rng, rng.choice((3, 4)))
            homework = [solution if rng.random() < MARKED_RIGHT else another(rng, solution) for _ in range(4)]
            return "\n".join([problem.question] + [
                f"{write_steps(attempt)}, {problem.target}?, {'right' if attempt[-1][2] == solution[-1][2] else 'no'}"
                for attempt in homework])
        facts = [step for _ in range(6) for step in write_steps(self.make_seen(rng, 3)[1]).split(", ")]
        rng.shuffle(facts)
        return "Facts:\n" + "\n".join(facts)

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """At least n_tokens token ids, uint16 (n,), as arithmetic's."""
        return write_corpus(self, n_tokens, random.Random(f"countdown/corpus/{seed}" + "/heldout" * heldout))


if __name__ == "__main__":
    print(style_table(Countdown()))
