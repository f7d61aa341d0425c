"""The default task, and the small "web" that the base model reads before RL.

All problems are arithmetic expressions over + - *, and all answers are integers. By default a problem has 1 to 6
operations, operands from 1 to 20, factors from 2 to 9, and at most two factors in a product.

    User: 8*7-19
    Assistant: <think>8*7=56, 56-19=37</think><answer>37</answer>

The corpus has two kinds of documents. Textbook pages list single facts. Forum threads have one question and one answer,
as above, in one of several response styles (STYLES). Half of the answers are a number without any steps. Others show
their steps, with tags or without. A minority has the format <think>...</think><answer>...</answer>. Each step is wrong
with probability SLIP, and the next step then starts from the wrong value. In the style "rechecked", "wait" and the
correct step follow a wrong one. Pretraining imitates all styles, and correct and wrong answers alike.

Training and test problems are disjoint: a hash of the expression decides its side. No test expression is ever the
`User:` line of a document or of a prompt in RL. (A textbook page may have single steps of it, such as 8*7=56.)

    python experiments/styles.py    prints each style with its share, how often it is correct, and an example
"""
import operator
import random
import re
import zlib
from dataclasses import dataclass

import numpy as np

from data.corpus import write_corpus
from data.tokenizer import END_OF_TEXT_ID, get_tokenizer
from rewards import TAGS, rule_rewards

SLIP = 0.03          # probability that a step is wrong
RECHECK_SLIP = 0.15  # the same in the style "rechecked", which then corrects the step
BLURT_RIGHT = 0.3    # probability that a number without steps is correct
STYLES = {           # share of each style among the forum's answers
    "blurt": 0.34,         # 37
    "answer tag": 0.10,    # <answer>37</answer>
    "empty thought": 0.06, # <think></think><answer>37</answer>
    "plain working": 0.12, # 8*7=56, 56-19=37, so 37
    "lost tag": 0.10,      # <think>8*7=56, 56-19=37<answer>37</answer>
    "worked": 0.24,        # <think>8*7=56, 56-19=37</think><answer>37</answer>
    "rechecked": 0.04,     # <think>8*7=54, wait, 8*7=56, 56-19=37</think><answer>37</answer>
}
WORKED = ("plain working", "lost tag", "worked", "rechecked")  # the styles that show their steps
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Problem:
    """An expression to evaluate. `question` is the expression, `answer` is the exact integer as text.

    >>> parse("8*7-19").prompt
    'User: 8*7-19\\nAssistant: '
    """
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The text that the model completes."""
        return f"User: {self.question}\nAssistant: "

    @property
    def working(self) -> str:
        """The steps of a correct solution."""
        return ", ".join(solve(self.question)[0])

    def canonical(self, answer: str) -> str:
        """One spelling for all equal answers, so that their votes count together."""
        return answer

    def check(self, answer: str) -> bool:
        """Is this text the answer? The match is exact: "-0", "007", "+3", " 3" and non-ASCII digits are wrong.

        >>> [parse("8*7-19").check(a) for a in ("37", "037", "37.0", "8*7-19")]
        [True, False, False, False]
        """
        return answer == self.answer


def write_step(step: str, value: int) -> tuple[str, int]:
    """The text of a correct step, and the value that the next step starts from."""
    return f"{step}={value}", value


def solve(question: str, write=write_step) -> tuple[list[str], int]:
    """Evaluate a valid expression from left to right, term by term -> (the texts of the steps, the value).

    `write` maps a step ("3*4") and its correct value to the step's text, and to the value that the next step uses.

    >>> solve("20-3*4+1")
    (['3*4=12', '20-12=8', '8+1=9'], 9)
    """
    steps = []

    def take_step(left: int, sign: str, right: int) -> int:
        text, value = write(f"{left}{sign}{right}", OPERATIONS[sign](left, right))
        steps.append(text)
        return value

    total = 0
    for sign, term in re.findall("([-+]?)([0-9*]+)", question):  # the first term has no sign
        value, *factors = map(int, term.split("*"))
        for factor in factors:
            value = take_step(value, "*", factor)
        total = take_step(total, sign, value) if sign else value
    return steps, total


def is_test(question: str) -> bool:
    """True for a tenth of all expressions. Neither the corpus nor RL ever asks these."""
    return zlib.crc32(question.encode()) % 10 == 0


def near_miss(rng: random.Random, value: int) -> int:
    """A wrong value of the kind that people write: off by 1, 2, 3 or 10."""
    return value + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))


def write_working(rng: random.Random, question: str, style: str) -> tuple[str, int]:
    """The steps of an answer in this style, wrong steps included -> (their text, the value that they reach)."""
    def write(step: str, value: int) -> tuple[str, int]:
        if style == "rechecked":
            if rng.random() >= RECHECK_SLIP:
                return write_step(step, value)
            return f"{step}={near_miss(rng, value)}, wait, {step}={value}", value
        return write_step(step, near_miss(rng, value) if rng.random() < SLIP else value)

    steps, value = solve(question, write)
    return ", ".join(steps), value


def format_answer(rng: random.Random, working: str, answer: str, style: str) -> str:
    """The steps and the answer as one text in this style."""
    text = f"<think>{working}</think><answer>{answer}</answer>"
    if style == "lost tag":
        text = text.replace(rng.choice(TAGS), "")
    untagged = {"blurt": answer, "answer tag": f"<answer>{answer}</answer>",
                "plain working": f"{working}, so {answer}"}
    return untagged.get(style, text)


def write_answer(rng: random.Random, question: str, style: str) -> tuple[str, int]:
    """An answer in this style -> (its text, the number that it states)."""
    if style in WORKED:
        working, value = write_working(rng, question, style)
    else:
        working, value = "", solve(question)[1]
        if rng.random() >= BLURT_RIGHT:
            value = near_miss(rng, value)
    return format_answer(rng, working, str(value), style), value


@dataclass(frozen=True)
class Arithmetic:
    """The task: its prompts, reward, training problems, held-out problems and corpus (see docs/own.md)."""
    max_ops: int = 4      # most operations in RL; the corpus and the hard problems have up to 2 more
    max_number: int = 20  # largest number that is added or subtracted
    max_factor: int = 9   # largest factor

    notes = ()                     # lines about the task to print when a run begins
    styles = STYLES                # the share of each response style in the forum
    stop_ids = (END_OF_TEXT_ID,)   # the tokens that end a completion
    reward = staticmethod(rule_rewards)
    encoding = get_tokenizer()     # the tiktoken.Encoding of prompts, completions and corpus

    def encode_prompt(self, problem) -> list[int]:
        """The token ids of a problem's prompt."""
        return self.encoding.encode_ordinary(problem.prompt)

    @property
    def held_out(self) -> dict[str, tuple[int, int]]:
        """The kinds of held-out problems -> (the fewest operations, the most operations)."""
        return {"test": (2, self.max_ops), "hard": (self.max_ops + 1, self.max_ops + 2)}

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt: the two speakers, the numbers, the operations."""
        digits = len(str(max(self.max_number, self.max_factor)))
        return 2 + digits * (self.max_ops + 3) + self.max_ops + 2

    def parse(self, text: str) -> Problem:
        """The problem of an expression such as "8*7-19". White space around numbers is ignored. Raises ValueError
        unless the text is numbers of 1 to 3 digits, without leading zeros, and 1 to max_ops + 2 operations."""
        question = re.sub(r"\s*([-+*])\s*", r"\1", text.strip())
        number = "(0|[1-9][0-9]{0,2})"
        most = self.max_ops + 2
        if not re.fullmatch(f"{number}([-+*]{number}){{1,{most}}}", question):
            raise ValueError(f"{text[:60]!r} is no expression of 1 to {most} operations + - * "
                             "over numbers of 1 to 3 digits, such as 8*7-19")
        return Problem(question, str(solve(question)[1]))

    def make_question(self, rng: random.Random, n_ops: int) -> str:
        """A random expression of n_ops operations. A term is a number or a*b, never a longer product."""
        signs = []
        for _ in range(n_ops):
            signs.append(rng.choice("+-" if signs[-1:] == ["*"] else "+-*"))
        text = ""
        for before, after in zip(["", *signs], [*signs, ""]):
            is_factor = "*" in (before, after)
            number = rng.randint(2, self.max_factor) if is_factor else rng.randint(1, self.max_number)
            text += f"{before}{number}"
        return text

    def make_problem(self, rng: random.Random, longer: bool = False, *, n_ops: tuple[int, int] | None = None,
                     test: bool = False) -> Problem:
        """A random training problem of 1 to max_ops operations, all equally likely, or up to max_ops + 2 with `longer`.
        n_ops sets the fewest and the most operations instead. `test` takes the test side of the split."""
        fewest, most = n_ops or (1, self.max_ops + 2 if longer else self.max_ops)
        while True:
            question = self.make_question(rng, rng.randint(fewest, most))
            if is_test(question) == test:
                return Problem(question, str(solve(question)[1]))

    def heldout_problems(self, n: int, kind: str, seed: int) -> list[Problem]:
        """n different problems of the test side, of a kind in held_out. Raises ValueError if there are fewer."""
        rng, problems = random.Random(f"{kind}/{seed}"), {}
        for _ in range(1000 * n):
            question = self.make_question(rng, rng.randint(*self.held_out[kind]))
            if is_test(question):
                problems[question] = Problem(question, str(solve(question)[1]))
            if len(problems) == n:
                return list(problems.values())
        raise ValueError(f"there are fewer than {n} {kind} problems of this difficulty: lower --eval_problems")

    def write_thread(self, rng: random.Random) -> tuple[str, str, bool]:
        """A forum thread -> (its text, the style of its answer, whether the answer is correct). Long questions are
        more frequent than short ones, because they are harder: the number of operations is the larger of two draws."""
        n_ops = max(rng.randint(1, self.max_ops + 2), rng.randint(1, self.max_ops + 2))
        problem = self.make_problem(rng, n_ops=(n_ops, n_ops))
        style, = rng.choices(tuple(self.styles), tuple(self.styles.values()))
        text, value = write_answer(rng, problem.question, style)
        return problem.prompt + text, style, problem.check(str(value))

    def write_page(self, rng: random.Random) -> str:
        """A textbook page: the correct steps of a few expressions, in random order."""
        questions = (self.make_question(rng, rng.randint(1, self.max_ops + 2)) for _ in range(4))
        facts = [step for question in questions for step in solve(question)[0]]
        rng.shuffle(facts)
        return "Facts:\n" + "\n".join(facts)

    def make_corpus(self, n_tokens: int, seed: int, heldout: bool = False) -> np.ndarray:
        """At least n_tokens token ids, uint16 (n,). The held-out corpus of a seed has other documents."""
        name = f"corpus/{seed}/heldout" if heldout else f"corpus/{seed}"
        return write_corpus(self, n_tokens, name)


make_problem = Arithmetic().make_problem
parse = Arithmetic().parse
