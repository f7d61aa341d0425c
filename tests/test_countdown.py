"""Countdown: the verifier is compared with a table and with known attempts, the corpus with its documentation."""
import random
import re
from collections import Counter

import pytest

from data.countdown import (LARGEST, MAX_TRIES, STYLES, Countdown, attempts, evaluate, is_test, parse, random_attempt,
                            write_expression, write_steps)
from data.tokenizer import END_OF_TEXT, get_tokenizer
from rewards import accuracy_reward
from test_data import evaluate as by_python
from test_data import is_right

TASK = Countdown()


@pytest.fixture(scope="module")
def documents():
    tokens, encoding = TASK.make_corpus(500_000, seed=0), get_tokenizer()
    return encoding.decode(tokens.tolist()).split(END_OF_TEXT)[:-1]


@pytest.mark.parametrize("answer, right", (
    ("3*7+4", True), ("4+7*3", True), ("4 + (3*7)", True), ("((3)*(7))+4", True), ("(3*7+4)", True),
    ("25", False), ("3*7+4+0", False), ("3*7", False), ("3*7+4*4-4", False), ("37-12", False), ("3*7+4=25", False),
    ("3**7", False), ("-4+3*7", False), ("4--3*7", False), ("3*7+(4", False), ("3*7+4)", False), ("()3*7+4", False),
    ("3*7+٤", False), ("3*7+04", False), ("3*7+4.0", False), ("3*7+4j", False), ("3 7 4", False), ("", False),
    ("(" * 90 + "3*7+4", False), ("3*7+4" + ")" * 10_000, False), ("__import__('os')", False), ("3*7+4\n5", False),
    ("99**99**99", False), ("3*7+4?", False)))
def test_the_verifier(answer, right):
    """An answer must get no reward if it uses a number twice, omits one, or uses one that is not given. The same holds
    for text that only Python could execute."""
    problem = parse("3 4 7 = 25")
    assert problem.check(answer) is right
    assert accuracy_reward(f"<think>?</think><answer>{answer}</answer>", problem) == right


def test_only_equal_values_vote_together():
    """A wrong answer that consists of the target must not vote for the solution. The common spelling of equal correct
    answers must pass the check."""
    problem = parse("3 4 7 = 25")
    assert problem.canonical("3*7+4") == problem.canonical("4+3*7") and problem.check(problem.canonical("4+3*7"))
    others = [problem.canonical(a) for a in ("25", "3+4+7", "3*7", "", "3*4+7")]
    assert len({*others, problem.canonical("3*7+4")}) == 6 and not any(map(problem.check, others))


@pytest.mark.parametrize("n", (3, 4))
def test_the_expression_and_the_steps_of_an_attempt_agree(n):
    """An expression must not lack parentheses, and a step must not be wrong or leave the range that the corpus
    promises."""
    rng = random.Random(n)
    for _ in range(500):
        numbers = tuple(rng.randint(1, 20) for _ in range(n))
        attempt = random_attempt(rng, numbers)
        expression, steps = write_expression(attempt), write_steps(attempt).split(", ")
        assert by_python(expression) == evaluate(expression, list(map(str, numbers))) == attempt[-1][2]
        assert all(map(is_right, steps)) and len(steps) == n - 1
        assert steps[-1].endswith(f"={attempt[-1][2]}")
        assert all(0 <= int(step.split("=")[1]) <= LARGEST for step in steps)


def test_random_attempts_are_uniform(assert_frequencies):
    """All possible attempts must be equally frequent."""
    every = attempts((2, 5, 9))
    assert len(every) == len(set(every)) and ("", 9, 9) in {attempt[0] for attempt in every}
    rng = random.Random(0)
    counts = Counter(random_attempt(rng, (2, 5, 9)) for _ in range(20_000))
    assert set(counts) <= set(every)
    assert_frequencies([counts[attempt] for attempt in every], [1 / len(every)] * len(every))


def test_every_problem_has_a_solution_and_is_on_the_right_side():
    """A problem must have a solution, be on the correct side of the split, and be held out only once. No prompt may be
    longer than max_prompt_tokens."""
    rng = random.Random(1)
    problems = [TASK.make_problem(rng) for _ in range(500)]
    assert all(len(p.numbers) == 3 and p.check(p.answer) and not is_test(p) for p in problems)
    for kind, n in TASK.held_out.items():
        held = TASK.heldout_problems(200, kind, seed=3)
        assert all(len(p.numbers) == n and p.check(p.answer) and is_test(p) for p in held)
        assert len({(*sorted(p.numbers), p.target) for p in held}) == 200
        assert held == TASK.heldout_problems(200, kind, seed=3) != TASK.heldout_problems(200, kind, seed=4)
        assert max(len(TASK.encode_prompt(p)) for p in held + problems) <= TASK.max_prompt_tokens
    with pytest.raises(ValueError, match="fewer than"):
        Countdown(max_number=1).heldout_problems(50, "test", 0)


def test_longer_problems_have_three_or_four_numbers():
    """A stage that asks for longer problems must not get test problems, or only problems of the usual length."""
    rng = random.Random(2)
    problems = [TASK.make_problem(rng, longer=True) for _ in range(500)]
    counts = Counter(len(p.numbers) for p in problems)
    assert set(counts) == {3, 4} and min(counts.values()) > 200 and not any(map(is_test, problems))


def test_the_members_shared_with_arithmetic_work():
    """A member taken from class Arithmetic must not refer to Arithmetic, or get the task as its first argument by
    mistake."""
    problem = parse("3 4 7 = 25")
    assert TASK.encoding.decode(TASK.encode_prompt(problem)) == problem.prompt == "User: 3 4 7 = 25\nAssistant: "
    assert [TASK.encoding.decode([token]) for token in TASK.stop_ids] == [END_OF_TEXT]
    assert TASK.reward("<think>3*7=21</think><answer>4+7*3</answer>", problem) == {
        "accuracy": 1.0, "format": 1.0, "reflection": 0.0}


def test_max_number_has_a_limit():
    """Numbers of three digits must be refused, because `parse` and max_prompt_tokens do not allow for them."""
    Countdown(max_number=LARGEST)
    with pytest.raises(ValueError, match="max_number must be at most 99"):
        Countdown(max_number=LARGEST + 1)


@pytest.mark.parametrize("text", ("3 4 = 7", "1 1 1 = 99", "1 2 3 4 5 = 15", "0 1 2 = 3", "3 4 7 25", "3 4 x = 7", "",
                                  "3 4 7 = -4", "3 4 7 = 025", "100 1 1 = 2"))
def test_parse_refuses_text_that_is_no_problem(text):
    """A text without a solution, or with too few numbers, must not be accepted as a problem."""
    with pytest.raises(ValueError):
        parse(text)


def test_test_problems_are_never_seen(documents):
    """A test problem must not occur in a thread or in marked homework, not even with its numbers in another order."""
    seen = 0
    for document in documents:
        found = re.match(r"(?:User: )?([0-9 ]+ = [0-9]+)\n", document)
        if found:
            seen += 1
            assert not is_test(parse(found[1])), document
        else:
            assert document.startswith("Facts:\n") and all(map(is_right, document.split("\n")[1:]))
    assert seen > 5_000


def test_marked_homework_is_marked_right(documents):
    """A wrong mark would teach a wrong comparison."""
    verdicts = Counter()
    for page in documents:
        if re.match("[0-9]", page):
            question, *lines = page.split("\n")
            numbers, target = question.split(" = ")
            assert len(lines) == 4
            for line in lines:
                *steps, again, verdict = line.split(", ")
                assert again == f"{target}?" and all(map(is_right, steps))
                assert verdict == ("right" if steps[-1].split("=")[1] == target else "no")
                verdicts[verdict] += 1
    assert 0.35 < verdicts["right"] / verdicts.total() < 0.65


def test_authors_who_recheck_continue_until_they_reach_the_target(assert_frequencies):
    """A "wait" after the target was reached would teach that checking is useless."""
    rng = random.Random(5)
    threads = [TASK.write_thread(rng) for _ in range(10_000)]
    assert_frequencies([sum(style == s for _, style, _ in threads) for s in STYLES], list(STYLES.values()))
    tries = Counter()
    for text, style, right in threads:
        problem = parse(re.match("User: (.*)\n", text)[1])
        expression = re.split("<answer>|, so |</think>|Assistant: ", text)[-1].split("</answer>")[0]
        if style != "lost tag":
            assert problem.check(expression) == right
        if style == "rechecked":
            attempts = text.split("<think>")[1].split("</think>")[0].split(", wait, ")
            assert all(attempt.endswith(f", {problem.target}?") for attempt in attempts)
            hits = [attempt.endswith(f"={problem.target}, {problem.target}?") for attempt in attempts]
            assert not any(hits[:-1]) and (hits[-1] or len(hits) == MAX_TRIES) and len(set(attempts)) == len(attempts)
            tries[len(hits)] += 1
        else:
            assert "wait" not in text
    assert min(tries[n] for n in range(1, MAX_TRIES + 1)) > 20
