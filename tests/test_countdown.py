"""The task where looking again pays: its verifier against Python's grammar, its corpus against its documentation."""
import random
import re
from collections import Counter

import pytest

from data import countdown
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
    """An answer that uses a number twice, none, or another one; what Python would execute."""
    problem = parse("3 4 7 = 25")
    assert problem.check(answer) is right
    assert accuracy_reward(f"<think>?</think><answer>{answer}</answer>", problem) == right


def test_equal_values_vote_together_and_only_they():
    """A wrong answer whose text is the target would vote for it; a majority that is right and not counted as such."""
    problem = parse("3 4 7 = 25")
    assert problem.canonical("3*7+4") == problem.canonical("4+3*7") and problem.check(problem.canonical("4+3*7"))
    others = [problem.canonical(a) for a in ("25", "3+4+7", "3*7", "", "3*4+7")]
    assert len({*others, problem.canonical("3*7+4")}) == 6 and not any(map(problem.check, others))


@pytest.mark.parametrize("n", (3, 4))
def test_attempts_are_what_they_say(n):
    """Parentheses forgotten; a step that is not right; a value beyond those that the corpus writes."""
    rng = random.Random(n)
    for _ in range(500):
        numbers = tuple(rng.randint(1, 20) for _ in range(n))
        attempt = random_attempt(rng, numbers)
        expression, steps = write_expression(attempt), write_steps(attempt).split(", ")
        assert by_python(expression) == evaluate(expression, list(map(str, numbers))) == attempt[-1][2]
        assert all(map(is_right, steps)) and len(steps) == n - 1
        assert steps[-1].endswith(f"={attempt[-1][2]}")
        assert all(0 <= int(step.split("=")[1]) <= LARGEST for step in steps)


def test_random_attempts_are_those_there_are(assert_frequencies):
    """A way that is never tried, or one that is tried more often than others."""
    every = attempts((2, 5, 9))
    assert len(every) == len(set(every)) and ("", 9, 9) in {attempt[0] for attempt in every}
    rng = random.Random(0)
    counts = Counter(random_attempt(rng, (2, 5, 9)) for _ in range(20_000))
    assert set(counts) <= set(every)
    assert_frequencies([counts[attempt] for attempt in every], [1 / len(every)] * len(every))


def test_every_problem_can_be_solved_and_stands_on_its_side():
    rng = random.Random(1)
    problems = [TASK.make_problem(rng) for _ in range(500)]
    assert all(len(p.numbers) == 3 and p.check(p.answer) and not is_test(p) for p in problems)
    for kind, n in TASK.held_out.items():
        held = TASK.heldout_problems(200, kind, seed=3)
        assert all(len(p.numbers) == n and p.check(p.answer) and is_test(p) for p in held)
        assert len({(*sorted(p.numbers), p.target) for p in held}) == 200
        assert held == TASK.heldout_problems(200, kind, seed=3) != TASK.heldout_problems(200, kind, seed=4)
        longest = max(len(get_tokenizer().encode_ordinary(p.prompt)) for p in held + problems)
        assert longest <= TASK.max_prompt_tokens
    with pytest.raises(ValueError, match="fewer than"):
        Countdown(max_number=1).heldout_problems(50, "test", 0)


@pytest.mark.parametrize("text", ("3 4 = 7", "1 1 1 = 99", "1 2 3 4 5 = 15", "0 1 2 = 3", "3 4 7 25", "3 4 x = 7", "",
                                  "3 4 7 = -4", "3 4 7 = 025", "100 1 1 = 2"))
def test_parse_refuses_what_is_no_problem(text):
    with pytest.raises(ValueError):
        parse(text)


def test_test_problems_are_never_seen(documents):
    """A test problem in a thread, or in marked homework, in another order of its numbers."""
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
    """A verdict that teaches the wrong comparison."""
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


def test_who_looks_again_goes_on_until_it_is_right(assert_frequencies):
    """A "wait" after the target was hit, which would teach that looking again is idle."""
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


def test_a_corpus_without_waiting_has_none():
    """The control's corpus with a "wait" in it."""
    for task in (Countdown(wait_share=0.0), Countdown(worked_share=0.0)):
        text = get_tokenizer().decode(task.make_corpus(200_000, seed=0).tolist())
        assert "wait" not in text
    assert "=" not in "".join(re.findall("Assistant: (.*?)<.endoftext", text, re.DOTALL))


def test_the_style_table_is_of_this_task():
    table = countdown.style_table(TASK, 500)
    assert all(f"| {style} |" in table for style in STYLES)
