"""The task and its corpus are compared with Python's grammar and with an independent count. The tokenizer must give
back the text that it was given."""
import ast
import operator
import random
import re

import numpy as np
import pytest

from data.arithmetic import (BLURT_RIGHT, RECHECK_SLIP, SLIP, STYLES, Arithmetic, is_test, make_problem, parse,
                             solve)
from data.bilingual import Bilingual
from data.corpus import PAGE_SHARE
from data.countdown import Countdown
from data.tokenizer import END_OF_TEXT, PIECES, get_tokenizer
from engine.corpus import cut_rows
from rewards import accuracy_reward, format_reward, rule_rewards

TASK = Arithmetic()
HARDER = Arithmetic(max_ops=7, max_number=150, max_factor=25)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def evaluate(expression: str) -> int:
    """The exact value of an expression over + - *, by Python's parser; anything else is an error."""
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        assert isinstance(node, ast.Constant) and type(node.value) is int, expression
        return node.value
    return value(ast.parse(expression, mode="eval").body)


def is_right(step: str) -> bool:
    """Does "8*7=56" hold?"""
    left, right = step.split("=")
    return evaluate(left) == int(right)


@pytest.fixture(scope="module")
def documents():
    """The documents of a corpus of a million tokens."""
    tokens, encoding = TASK.make_corpus(1_000_000, seed=0), get_tokenizer()
    assert len(tokens) >= 1_000_000 and tokens.dtype == np.uint16
    assert tokens.max() < encoding.n_vocab and tokens[-1] == encoding.eot_token
    ends = np.flatnonzero(tokens == encoding.eot_token)
    return [encoding.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


@pytest.fixture(scope="module")
def threads():
    """20,000 forum threads: (text, style, whether the answer is correct)."""
    rng = random.Random(0)
    return [TASK.write_thread(rng) for _ in range(20_000)]


# Problems


@pytest.mark.parametrize("text", ("8*7-19", "2*3*4 - 5", "20-3*4+1", "1-20", "0-0", "999*999*999*999*999*999*999",
                                  "5 - 5", " 1+1\n", "1-2-3-4-5-6-7", "2-3*4-5*6"))
def test_answers_are_exact(text):
    """A wrong evaluator could compute from left to right without precedence, subtract from right to left, or use
    floats. It would still be correct for many expressions."""
    problem = parse(text)
    assert problem.answer == str(evaluate(text.strip())) and problem.check(problem.answer)
    assert not problem.check(str(evaluate(text.strip()) + 1))
    assert problem.prompt == f"User: {''.join(text.split())}\nAssistant: "


@pytest.mark.parametrize("task", (TASK, HARDER), ids=("default", "harder"))
def test_generated_problems_are_right_and_as_documented(task):
    """A wrong stored answer would reward wrong answers. Operands out of range would make the "hard" problems hard for
    another reason."""
    rng, products = random.Random(0), 0
    assert TASK.held_out == {"test": (2, 4), "hard": (5, 6)}
    longer = {"longer": True}
    for options in ({}, longer, *({"n_ops": n_ops} for n_ops in task.held_out.values())):
        lengths = set()
        for _ in range(1500):
            problem = task.make_problem(rng, **options, test=rng.random() < 0.5)
            tokens = ["", *re.findall("[0-9]+|[-+*]", problem.question), ""]
            lengths.add(sum(token in ("+", "-", "*") for token in tokens))
            assert problem.answer == str(evaluate(problem.question)) and problem.check(problem.answer)
            assert all(tokens[i:i + 4:2] != ["*", "*"] for i in range(len(tokens))), "products have two factors"
            for before, token, after in zip(tokens, tokens[1:], tokens[2:]):
                if token.isdigit():
                    factor = "*" in (before, after)
                    assert 2 <= int(token) <= task.max_factor if factor else 1 <= int(token) <= task.max_number
                    products += factor
            assert task.parse(problem.question) == problem
            assert len(get_tokenizer().encode_ordinary(problem.prompt)) <= task.max_prompt_tokens
        fewest, most = options.get("n_ops") or (1, task.max_ops + 2 * (options is longer))
        assert lengths == set(range(fewest, most + 1))
    assert products > 3000


@pytest.mark.parametrize("question, steps", [
    ("8*7-19", "8*7=56 56-19=37"), ("20-3*4+1", "3*4=12 20-12=8 8+1=9"), ("2*3*4", "2*3=6 6*4=24"),
    ("3-10-5*2", "3-10=-7 5*2=10 -7-10=-17")])
def test_steps_are_what_one_would_write(question, steps):
    """Steps in another order than in the expression, or steps that are correct only by luck, would teach wrong
    rules."""
    assert solve(question) == (steps.split(), evaluate(question))


@pytest.mark.parametrize("text", (
    "", "7", "+7", "-7+1", "1+", "1++1", "1--1", "1**2", "7//2*1", "7/2", "1%2", "(1+1)", "1+1=2", "01+1", "1+00",
    "1000+1", "9" * 400 + "+1", "1.5+1", "1e3+1", "1_0+1", "0x1+1", "a+1", "1+1;", "1+1#", "__import__('os')",
    "99**98**97", "1&1", "1,1", "\u0661+\u0661", "1\u0661+1", "1+1\u0661", "\uff11+\uff11",
    "1\u00d71", "1\u22121", "1+1\0", "\0", "1+1+1+1+1+1+1+1", "1+" * 10_000 + "1",
    "User: 1+1", "1+1" + END_OF_TEXT))
def test_parse_refuses_what_is_no_problem(text):
    """eval() on text from outside never ends for 99**98**97, and could execute anything. int() accepts the digits of
    every script."""
    with pytest.raises(ValueError):
        parse(text)


def test_problems_are_reproducible():
    """If anything were drawn from the global random state, a seed would not determine a run."""
    def draw(seed):
        rng = random.Random(seed)
        return [make_problem(rng) for _ in range(50)]

    assert draw(1) == draw(1) != draw(2)
    random.seed(0)
    state = random.getstate()
    draw(1), TASK.make_corpus(1000, seed=0)
    assert random.getstate() == state
    assert np.array_equal(TASK.make_corpus(5000, seed=1), TASK.make_corpus(5000, seed=1))
    assert not np.array_equal(TASK.make_corpus(5000, seed=1)[:1000], TASK.make_corpus(5000, seed=2)[:1000])


def test_a_task_gives_what_the_steps_ask_for():
    """The steps of RL and distillation use a task only by these names. If its stop token or its prompt differed from
    the corpus, the base would not answer as it was trained to."""
    problem, encoding = parse("8*7-19"), get_tokenizer()
    assert TASK.encoding is encoding and TASK.stop_ids == (encoding.eot_token,)
    assert TASK.encode_prompt(problem) == encoding.encode_ordinary("User: 8*7-19\nAssistant: ")
    for completion in ("<think>8*7=56, wait</think><answer>37</answer>", "<think>x</think><answer>36</answer>", "37"):
        assert TASK.reward(completion, problem) == rule_rewards(completion, problem)


# The split


def test_test_problems_are_never_seen(documents):
    """If a test expression were in the corpus or in RL, a correct answer could be memorised instead of computed."""
    held_out = {p.question for kind in TASK.held_out for seed in (0, 1)
                for p in TASK.heldout_problems(1000, kind, seed)}
    rng = random.Random(0)
    in_rl = {make_problem(rng, longer=longer).question for longer in (False, True) for _ in range(20_000)}
    test_side = {make_problem(rng, longer=True, test=True).question for _ in range(20_000)} | held_out
    asked = {line[len("User: "):] for d in documents for line in d.split("\n") if line.startswith("User: ")}
    assert len(asked) > 10_000 and len(test_side) > 15_000
    assert not asked & test_side and not in_rl & test_side
    assert len(in_rl & asked) > 100, "the two draw from one small pool, so a leak would have shown"


@pytest.mark.parametrize("n_ops", range(1, 7))
def test_the_split_takes_a_tenth(n_ops, assert_frequencies):
    """If the hash preferred some lengths, the test problems would be of other lengths than the training problems, or
    too few."""
    rng = random.Random(0)
    held_out = [is_test(q) for q in {TASK.make_question(rng, n_ops) for _ in range(5000)}]
    assert_frequencies([sum(held_out), held_out.count(False)], [0.1, 0.9])


@pytest.mark.parametrize("kind", ("test", "hard"))
def test_held_out_problems_are_different_and_reproducible(kind):
    """A test problem must not count twice, and an evaluation must not change with every call. The search for too many
    problems must end."""
    problems = TASK.heldout_problems(300, kind, seed=0)
    assert len({p.question for p in problems}) == 300
    fewest, most = TASK.held_out[kind]
    assert all(fewest <= len(re.findall("[-+*]", p.question)) <= most for p in problems)
    assert problems == TASK.heldout_problems(300, kind, seed=0) != TASK.heldout_problems(300, kind, seed=1)
    with pytest.raises(ValueError):
        Arithmetic(max_number=1, max_factor=2).heldout_problems(100, kind, seed=0)


# The corpus


def test_documents_are_pages_or_threads(documents, assert_frequencies):
    """Without its end-of-text token, a document would run into the next one, and the base would not learn to stop."""
    pages = [d for d in documents if d.startswith("Facts:\n")]
    others = [d for d in documents if not d.startswith("Facts:\n")]
    assert all(re.fullmatch(r"User: [-+*0-9]+\nAssistant: [^\n]+", d) for d in others)
    assert_frequencies([len(pages), len(others)], [PAGE_SHARE, 1 - PAGE_SHARE])
    facts = {fact for page in pages for fact in page.split("\n")[1:]}
    assert all(re.fullmatch(r"-?\d+[-+*]\d+=-?\d+", fact) and is_right(fact) for fact in facts)
    assert not any(END_OF_TEXT in d for d in documents)


def style_of(answer: str) -> str:
    """The style of an answer from its text alone."""
    tags = [tag for tag in ("<think>", "</think>", "<answer>", "</answer>") if tag in answer]
    if answer.startswith("<think></think>"):
        return "empty thought"
    if len(tags) == 3:
        return "lost tag"
    if len(tags) == 4:
        return "worked"
    if tags:
        return "answer tag"
    return "plain working" if "=" in answer else "blurt"


def test_styles_have_their_documented_shares(threads, assert_frequencies):
    """The base's format rate comes from these shares. With other shares in the corpus, the table in the docs would be
    wrong."""
    assert abs(sum(STYLES.values()) - 1) < 1e-9
    assert_frequencies([sum(style == s for _, style, _ in threads) for s in STYLES], list(STYLES.values()))
    seen = [style_of(text.split("Assistant: ")[1]) for text, _, _ in threads]
    assert all(look == style or (look, style) == ("worked", "rechecked") for look, (_, style, _) in zip(seen, threads))


@pytest.mark.parametrize("task", (Arithmetic, Countdown, Bilingual))
def test_a_task_may_have_styles_of_its_own(task):
    """The styles must come from the task. Otherwise a control's corpus would still have the styles that it should
    lack."""
    class Blurting(task):
        styles = {"blurt": 0.5, "answer tag": 0.5}

    documents = task.encoding.decode(Blurting().make_corpus(100_000, seed=0).tolist()).split(END_OF_TEXT)
    answers = [document.split("\nAssistant: ")[1] for document in documents if document.startswith("User: ")]
    assert len(answers) > 1000 and not any(re.search("=| is |wait|<think>", answer) for answer in answers)
    tagged = [answer for answer in answers if answer.startswith("<answer>")]
    assert 0.3 < len(tagged) / len(answers) < 0.7


def test_right_answers_have_their_documented_shares(threads, assert_frequencies):
    """The documented shares would be wrong if a wrong answer were correct by chance, if the next step did not start
    from the value of a wrong step, or if an answer counted as correct although its text states another number."""
    steps, rechecked, blurts = [], [], []
    for text, style, right in threads:
        question, answer = re.fullmatch(r"User: (.*)\nAssistant: (.*)", text).groups()
        problem = parse(question)
        stated = int(re.search(r"(-?\d+)(?:</answer>)?$", answer).group(1))
        assert right == (stated == evaluate(question)), text
        if style in ("worked", "rechecked"):
            assert format_reward(answer) == 1.0 and accuracy_reward(answer, problem) == right
        else:
            assert format_reward(answer) == accuracy_reward(answer, problem) == 0.0
        if style in ("blurt", "answer tag", "empty thought"):
            blurts.append(right)
        elif style == "rechecked":
            found = re.search("<think>(.*)</think>", answer).group(1).split(", ")
            slips = [step for step, after in zip(found, found[1:]) if after == "wait"]
            kept = [step for step, after in zip(found, [*found[1:], ""]) if step != "wait" and after != "wait"]
            assert right and all(map(is_right, kept)) and not any(map(is_right, slips))
            rechecked += [False] * len(slips) + [True] * (len(kept) - len(slips))
        else:
            found = [is_right(step) for step in re.findall(r"-?\d+[-+*]-?\d+=-?\d+", answer)]
            assert len(found) == len(re.findall("[-+*]", question)), text
            assert right or not all(found), text
            steps += found
    assert_frequencies([sum(blurts), blurts.count(False)], [BLURT_RIGHT, 1 - BLURT_RIGHT])
    assert_frequencies([steps.count(False), sum(steps)], [SLIP, 1 - SLIP])
    assert_frequencies([rechecked.count(False), sum(rechecked)], [RECHECK_SLIP, 1 - RECHECK_SLIP])


def test_working_ends_in_the_answer_it_gives(threads):
    """An answer that differs from the result of its steps would teach that steps are useless."""
    for text, style, _ in threads:
        if style in ("worked", "rechecked", "plain working"):
            last_step, answer = re.search(r"=(-?\d+)(?:</think><answer>|, so )(-?\d+)", text).groups()
            assert last_step == answer, text


@pytest.mark.parametrize("task", (Arithmetic(), Countdown(), Bilingual()))
def test_a_longer_corpus_begins_with_the_shorter_one(task):
    """base_tokens must not shape the student's base. Both bases read the same corpus from its beginning, and a run with
    another base_tokens reuses the checkpoint of the student's base."""
    short, starts = cut_rows(task, 40, 129, 0)
    long, more = cut_rows(task, 90, 129, 0)
    assert len(starts) == 40 and len(more) == 90 and np.array_equal(more[:40], starts)
    end = int(starts[-1]) + 129
    assert np.array_equal(short[:end], long[:end])


# The tokenizer


def random_text(rng: random.Random) -> str:
    """Unicode characters without surrogates, mixed with pieces of the vocabulary."""
    def character():
        code = rng.choice((rng.randrange(128), rng.randrange(0x800), rng.randrange(0x110000)))
        return "" if 0xD800 <= code < 0xE000 else chr(code)
    return "".join(rng.choice((character(), character(), rng.choice(PIECES), END_OF_TEXT))
                   for _ in range(rng.randrange(30)))


def test_any_text_comes_back():
    """The tokenizer must not silently drop or replace a character that its vocabulary lacks."""
    encoding, rng = get_tokenizer(), random.Random(0)
    for text in [random_text(rng) for _ in range(3000)] + ["".join(map(chr, range(0x700))), "naïve \U0001f600\r\n\0"]:
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text and all(0 <= t < encoding.n_vocab for t in tokens)


def test_pieces_are_single_tokens_wherever_they_stand():
    """tiktoken first splits a text by a pattern, then looks up each part. If the pattern did not isolate a word piece,
    the piece would become single bytes."""
    encoding = get_tokenizer()
    assert len(set(PIECES)) == len(PIECES) and encoding.n_vocab == 256 + len(PIECES) + 1 == encoding.eot_token + 1
    for i, piece in enumerate(PIECES):
        assert encoding.encode_ordinary(piece) == [256 + i]
        assert encoding.encode_ordinary(f"7{piece}8") == [ord("7"), 256 + i, ord("8")]
    assert encoding.encode_ordinary("<think>12*3</think>") == [256, *b"12*3", 257], "digits stay single"


def test_text_from_outside_cannot_end_itself():
    """If special tokens were allowed in text from outside, a prompt could stop the model, or a document could be cut in
    two."""
    encoding = get_tokenizer()
    for text in (END_OF_TEXT, f"1+1{END_OF_TEXT}", END_OF_TEXT * 3, f"<|endof{END_OF_TEXT}text|>"):
        tokens = encoding.encode_ordinary(text)
        assert encoding.eot_token not in tokens and encoding.decode(tokens) == text
    assert encoding.special_tokens_set == {END_OF_TEXT} and encoding.decode([encoding.eot_token]) == END_OF_TEXT
