"""A task in two languages, for DeepSeek-R1's whole pipeline (r1.py): arithmetic in symbols and in words, and everyday
questions.

A base model that was trained on two languages mixes them if RL rewards only correct answers. This happened to R1-Zero,
and it happens here. Each question of data/arithmetic.py is asked in symbols or in words, half of the time each. Half of
the answers have their steps in the question's language, a quarter in the other, a quarter at random step by step:

    User: 8*7-19                     User: 8 times 7 minus 19
    Assistant: 8*7=56, 56-19=37      Assistant: 8 times 7 is 56, 56-19=37

Everyday questions need no steps. RL on arithmetic does not ask them, so they show what the model forgets in RL:

    User: say 37                     User: larger 37 52               User: reverse 374
    Assistant: thirty seven          Assistant: 52                    Assistant: 473

Steps in words are wrong more often than steps in symbols (SLIP). A hash decides which questions are held out. A
question in words is on the same side as the same question in symbols. All else is as in data/arithmetic.py.
"""
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from data.arithmetic import (RECHECK_SLIP, WORKED, Arithmetic, format_answer, is_test, near_miss, solve,
                             write_answer)
from data.arithmetic import Problem as SymbolProblem
from data.tokenizer import PIECES, get_tokenizer
from rewards import format_reward, rule_rewards, split_completion

WORDS = {"*": " times ", "+": " plus ", "-": " minus ", "=": " is "}
SLIP = {False: 0.03, True: 0.06}  # probability that a step is wrong, in symbols and in words
EVERYDAY_SHARE = 0.15             # share of the forum's threads that are everyday questions
EVERYDAY_RIGHT = 0.95             # probability that the answer to such a question is correct
STEPS = {False: re.compile("-?[0-9]+[-+*]-?[0-9]+=-?[0-9]+"),
         True: re.compile("-?[0-9]+ (times|plus|minus) -?[0-9]+ is -?[0-9]+")}
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(text: str) -> str:
    """Operations and equals signs as words. The sign of a negative number stays.

    >>> in_words("8*7=56, 3-10=-7")
    '8 times 7 is 56, 3 minus 10 is -7'
    """
    return re.sub("(?<=[0-9])[-+*=]", lambda sign: WORDS[sign[0]], text)


def in_symbols(text: str) -> str:
    """Words as operations and equals signs: the inverse of in_words.

    >>> in_symbols(in_words("3-10=-7"))
    '3-10=-7'
    """
    for sign, word in WORDS.items():
        text = text.replace(word, sign)
    return text


@dataclass(frozen=True)
class Problem(SymbolProblem):
    """An expression, asked in symbols or in words."""
    words: bool = False

    @property
    def working(self) -> str:
        """The steps of a correct solution, in the question's language."""
        working = ", ".join(solve(in_symbols(self.question))[0])
        return in_words(working) if self.words else working

    def in_language(self, step: str) -> bool:
        """Is this a step in the question's language?"""
        return STEPS[self.words].fullmatch(step) is not None


@dataclass(frozen=True)
class Everyday(SymbolProblem):
    """An everyday question, whose answer is a text."""
    working = ""


def say(number: int) -> str:
    """A number from 0 to 99 in words.

    >>> say(37), say(40), say(13)
    ('thirty seven', 'forty', 'thirteen')
    """
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]} {ONES[ones]}" if ones else TENS[tens]


def everyday(question: str) -> Everyday:
    """The problem of an everyday question. Raises ValueError for any other text."""
    if re.fullmatch("say ([0-9]|[1-9][0-9])", question):
        return Everyday(question, say(int(question.split()[1])))
    if re.fullmatch("larger [1-9][0-9]? [1-9][0-9]?", question):
        return Everyday(question, max(question.split()[1:], key=int))
    if re.fullmatch("reverse [0-9]{3}", question):
        return Everyday(question, question.split()[1][::-1])
    raise ValueError(f"{question[:60]!r} is no everyday question, such as say 37, larger 37 52 or reverse 374")


def everyday_answer(completion: str) -> str:
    """The answer in a completion to an everyday question, without a thought and without the answer's tags. The reward
    neither requires nor punishes these.

    >>> [everyday_answer(text) for text in ("52", "<think>37, 52</think><answer>52</answer>", "<answer>52</answer>")]
    ['52', '52', '52']
    """
    if completion.startswith("<think>"):
        completion = completion.partition("</think>")[2]
    return completion.strip().removeprefix("<answer>").removesuffix("</answer>").strip()


def language_reward(completion: str, in_language: Callable[[str], bool]) -> float:
    """The share of the thought's steps that are in the question's language, from 0 to 1. (DeepSeek-R1, eq. 7, counts
    words.) It is 0 if the completion is not well formed. It is also 0 if a step occurs three times or more, so that
    repetition does not pay. Commas separate the steps, and a step has a digit.

    >>> def reward(thought):
    ...     completion = f"<think>{thought}</think><answer>7 minus 19</answer>"
    ...     return language_reward(completion, Problem("8*7-19", "37", words=False).in_language)
    >>> reward("8*7=56, 56-19=37"), reward("8*7=54, wait, 8*7=56, 56 minus 19 is 37, 1+1=2")
    (1.0, 0.75)
    >>> reward("8*7=56, 56 minus 19 is 37"), reward("8*7 is 56"), reward("so, hmm"), reward("8*7=56, " * 1000)
    (0.5, 0.0, 0.0, 0.0)
    """
    if not format_reward(completion):
        return 0.0
    clauses = (clause.strip() for clause in split_completion(completion)[1].split(","))
    steps = Counter(clause for clause in clauses if any(character.isdigit() for character in clause))
    if not steps or max(steps.values()) > 2:
        return 0.0
    return sum(n for step, n in steps.items() if in_language(step)) / steps.total()


def reward(completion: str, problem) -> dict[str, float]:
    """The scores of a completion: the two rules, the language reward, and whether the thought is consistent, which
    means wholly in the question's language. A correct answer to an everyday question earns 3. By default, a correct,
    well-formed and consistent answer to arithmetic earns as much."""
    if isinstance(problem, Everyday):
        accuracy = float(everyday_answer(completion) == problem.answer)
        return rule_rewards(completion, problem) | {"accuracy": accuracy, "language": 0.0, "consistent": 0.0,
                                                    "reward": 3 * accuracy}
    language = language_reward(completion, problem.in_language)
    return rule_rewards(completion, problem) | {"language": language, "consistent": float(language == 1)}


@dataclass(frozen=True)
class Bilingual(Arithmetic):
    """The task: class Arithmetic in two languages, and make_everyday."""
    encoding = get_tokenizer(PIECES + tuple(WORDS.values()))
    stop_ids = (encoding.eot_token,)
    reward = staticmethod(reward)

    @property
    def held_out(self) -> dict:
        return super().held_out | {"everyday": None}

    def parse(self, text: str) -> Problem | Everyday:
        """The problem of a text in either language. Raises ValueError if it is not one of this task."""
        if re.match("say|larger|reverse", text):
            return everyday(text)
        problem = super().parse(in_symbols(text))
        return self.ask(problem, in_symbols(text) != text)

    @staticmethod
    def ask(problem: SymbolProblem, words: bool) -> Problem:
        """The problem, asked in words or in symbols."""
        return Problem(in_words(problem.question) if words else problem.question, problem.answer, words)

    def make_problem(self, rng: random.Random, longer: bool = False, **more) -> Problem:
        """A random training problem, as in data/arithmetic.py, asked in either language."""
        return self.ask(super().make_problem(rng, longer, **more), rng.random() < 0.5)

    def make_everyday(self, rng: random.Random, test: bool = False) -> Everyday:
        """A random everyday question of one side of the split."""
        while True:
            question = rng.choice((f"say {rng.randint(0, 99)}", f"larger {rng.randint(1, 99)} {rng.randint(1, 99)}",
                                   f"reverse {rng.randint(0, 999):03}"))
            if is_test(question) == test:
                return everyday(question)

    def heldout_problems(self, n: int, kind: str, seed: int) -> list:
        """n different problems of the test side. Raises ValueError if there are fewer."""
        rng = random.Random(f"bilingual/{kind}/{seed}")
        if kind != "everyday":
            return [self.ask(problem, rng.random() < 0.5) for problem in super().heldout_problems(n, kind, seed)]
        drawn = (self.make_everyday(rng, test=True) for _ in range(50 * n))
        problems = {problem.question: problem for problem in drawn}
        if len(problems) < n:
            raise ValueError(f"there are fewer than {n} everyday problems: lower --eval_problems")
        return list(problems.values())[:n]

    def write_thread(self, rng: random.Random) -> tuple[str, str, bool]:
        """A forum thread -> (its text, the style of its answer, whether the answer is correct)."""
        if rng.random() < EVERYDAY_SHARE:
            problem = self.make_everyday(rng)
            answered = problem if rng.random() < EVERYDAY_RIGHT else self.make_everyday(rng)
            return problem.prompt + answered.answer, "everyday", answered.answer == problem.answer
        problem, (style,) = self.make_problem(rng, longer=True), rng.choices(tuple(self.styles), self.styles.values())
        languages, = rng.choices(((problem.words,), (not problem.words,), (False, True)), (2, 1, 1))

        def write(step: str, value: int) -> tuple[str, int]:
            words, text = rng.choice(languages), f"{step}={value}"
            if rng.random() < (RECHECK_SLIP if style == "rechecked" else SLIP[words]):
                slip = near_miss(rng, value)
                if style == "rechecked":
                    text = f"{step}={slip}, wait, {text}"
                else:
                    text, value = f"{step}={slip}", slip
            return (in_words(text) if words else text), value

        if style in WORKED:
            steps, value = solve(in_symbols(problem.question), write)
            text = format_answer(rng, ", ".join(steps), str(value), style)
        else:
            text, value = write_answer(rng, in_symbols(problem.question), style)
        return problem.prompt + text, style, problem.check(str(value))

    def write_page(self, rng: random.Random) -> str:
        """A textbook page, in either language."""
        page = super().write_page(rng)
        return in_words(page) if rng.random() < 0.5 else page
