"""Problems and text from files: what is taken, what is left out and counted, what is refused."""
import json
import random
import re

import numpy as np
import pytest

from data.arithmetic import Arithmetic
from data.own import SIDES, OwnCorpus, OwnProblems, Problem, documents, fingerprint, number, path_of
from data.tokenizer import get_tokenizer
from rewards import accuracy_reward
from tests.conftest import QUICK as SETTINGS
from train import load_corpus, main, majority

QUICK = [*SETTINGS, "--rl_steps=2", "--distill_steps=1", "--distill_prompts=32", "--eval_problems=8"]


def write(path, rows):
    """Rows as JSONL; a row that is text as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def numbered(n, **more):
    return [{"prompt": f"Twice {i}?", "answer": str(2 * i)} | more for i in range(n)]


# Answers


@pytest.mark.parametrize("answer, right, wrong", [
    ("37", ("37", "+37", "037", "37.0", "74/2"), ("-37", "37.01", "3 7", "37e0", "\u0663\u0667", "", "37/0", "thirty")),
    ("1/3", ("1/3", "2/6", "0001/3"), ("0.3333333333333333", "1/3.0", "1 / 3", "3/1", "1/0", "/3")),
    ("0.1", ("0.1", ".1", "1/10", "0.1000"), ("0.10000000000000001", "0,1", "1e-1", ".", "0.1.0")),
    ("-0", ("0", "-0", "0.0", "0/5"), ("", "-", "O")),
    ("New  Delhi", ("new delhi", "NEW DELHI", " New\nDelhi"), ("newdelhi", "Delhi", "")),
    ("stra\u00dfe", ("STRASSE",), ("strase",)),
    ("9" * 101, ("9" * 101,), ("9" * 101 + ".0", "9" * 5000)),
])
def test_answers_are_compared_exactly(tmp_path, answer, right, wrong):
    """Floats, for which 0.1 is 0.10000000000000001; eval; a number that is compared as text, or text as a number."""
    rows = [{"prompt": "Q", "answer": answer, "split": "train"}, *numbered(2, split="test")]
    problem = OwnProblems(Arithmetic(), write(tmp_path / "p.jsonl", rows), 40, 120).parse("q")
    assert all(map(problem.check, right))
    assert not any(map(problem.check, wrong))


@pytest.mark.parametrize("given, same", [
    ("1e-5", "0.00001"), ("1E16", "10000000000000000"), ("0.12345678901234567891", "0.12345678901234567891"),
    ("-2.50", "-5/2"), ("12345678901234567890123", "12345678901234567890123"), ("7.0", "7")])
def test_json_numbers_keep_their_digits(tmp_path, given, same):
    """A JSON number read as a float: 0.00001 becomes the text 1e-05, which no answer equals."""
    rows = [f'{{"prompt": "Q", "answer": {given}, "split": "train"}}', *numbered(2, split="test")]
    problem = OwnProblems(Arithmetic(), write(tmp_path / "p.jsonl", rows), 40, 120).parse("Q")
    assert problem.check(same) and not problem.check(same + "1")


def test_equal_answers_vote_together():
    """Six votes for 0.5 and five for 1/2 lose against seven for 3."""
    problem = Problem("A half?", "1/2")
    answers = ["0.5"] * 6 + ["1/2"] * 5 + ["3"] * 7
    assert problem.check(majority([problem.canonical(answer) for answer in answers])) and not problem.check("3")


def test_numbers_are_read_in_linear_time():
    """A fraction of a million digits: minutes of arithmetic for one sample."""
    assert number("1" * 100) == int("1" * 100) and number("1" * 101) is None and number("1/" + "0" * 50) is None


# Files of problems


def test_problems_are_those_of_the_file(tmp_path):
    """A split that is not kept, answers of another row, a seed that does not decide what is asked."""
    halves = [{"prompt": f"Half of {i}", "answer": i / 2, "split": "test"} for i in range(9)]
    rows = [*numbered(20, split="train"), *halves]
    task = OwnProblems(Arithmetic(), write(tmp_path / "p.jsonl", rows), 40, 20)
    assert task.held_out == ("test",) and task.notes == [f"{tmp_path}/p.jsonl: 20 problems to train on, 9 to test on"]
    rng = random.Random(0)
    drawn = {problem.question: problem.answer for problem in (task.make_problem(rng) for _ in range(500))}
    assert drawn == {row["prompt"]: row["answer"] for row in rows[:20]}
    tested = task.heldout_problems(5, "test", seed=0)
    assert tested == task.heldout_problems(5, "test", seed=0) != task.heldout_problems(5, "test", seed=1)
    assert len({p.question for p in tested}) == 5 and all(p.question.startswith("Half of") for p in tested)
    assert {p.question: p.answer for p in task.heldout_problems(100, "test", 0)} == {
        f"Half of {i}": str(i / 2) for i in range(9)}
    assert tested[0].prompt == f"User: {tested[0].question}\nAssistant: "
    assert task.max_prompt_tokens == max(len(get_tokenizer().encode_ordinary(f"User: {row['prompt']}\nAssistant: "))
                                         for row in rows)
    assert accuracy_reward(f"<think>x</think><answer>{tested[0].answer}0</answer>", tested[0]) == 1
    assert task.parse(" twice 3? ").answer == "6" and task.parse("Twice 99?").answer == ""


def test_without_a_split_a_tenth_is_tested_on(tmp_path, assert_frequencies):
    """A split by line number: sorted files, or a line inserted, move problems from one side to the other."""
    rows = numbered(3000)
    task = OwnProblems(Arithmetic(), write(tmp_path / "a.jsonl", rows), 40, 20)
    assert_frequencies([len(task.listed[side]) for side in SIDES], [0.9, 0.1])
    random.Random(0).shuffle(rows)
    other = OwnProblems(Arithmetic(), write(tmp_path / "b.jsonl", rows[:-1]), 40, 20)
    assert all(set(other.sides[side]) <= set(task.sides[side]) for side in SIDES)


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path):
    """A prompt that is cut to fit, an answer that costs RL its time and is never right, a test problem trained on."""
    rows = [*numbered(9, split="train"), *numbered(1, split="test"),              # lines 1 to 10
            {"prompt": " ", "answer": "1"}, {"prompt": "", "answer": "1"},        # 11, 12
            {"prompt": "a" * 39, "answer": "1"}, {"prompt": "a" * 38, "answer": "1", "split": "train"},
            {"prompt": "b", "answer": " "}, {"prompt": "c", "answer": "<answer>1"}, {"prompt": "d", "answer": "7" * 21},
            {"prompt": "TWICE  8?", "answer": "16", "split": "train"}, "",
            {"prompt": "e", "answer": "7" * 20, "split": "test"}]
    task = OwnProblems(Arithmetic(), path := write(tmp_path / "p.jsonl", rows), 40, 20)
    assert set(task.notes) == {
        f"{path}: 9 problems to train on, 2 to test on",
        f"{path}: 2 left out for an empty prompt, the first in line 11",
        f"{path}: 1 left out for a prompt of more than 40 tokens, the first in line 13",
        f"{path}: 3 left out for an answer that no reward could match, the first in line 15",
        f"{path}: 1 left out for a prompt that was there before, the first in line 18",
        f"{path}: 1 of the test side not trained on, though given for that too"}
    assert "twice 0?" not in task.sides["train"] and "a" * 38 in task.sides["train"]


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "a", "answer": "1"', "not JSON"), ("hello", "not JSON"), ("[" * 100_000, "not JSON"),
    ('["a", "1"]', "not a JSON object"), ('"a"', "not a JSON object"),
    ('{"answer": "1"}', '"prompt" must be given, as text'),
    ('{"prompt": 1, "answer": "1"}', '"prompt" must'),
    ('{"prompt": "a"}', '"answer" must be given, as text or a number'),
    ('{"prompt": "a", "answer": NaN}', "not JSON"), ('{"prompt": "a", "answer": -Infinity}', "not JSON"),
    ('{"prompt": "a\\ud800", "answer": "1"}', "half of a character"),
    ('{"prompt": "a", "answer": "\\ud800"}', "half of a character"),
    ('{"prompt": "a", "answer": "1", "split": false}', "train, test"),
    ('{"prompt": "a", "answer": true}', '"answer" must'), ('{"prompt": "a", "answer": ["1"]}', '"answer" must'),
    ('{"prompt": "a", "answer": "1", "split": "dev"}', "train, test"),
    ('{"prompt": "a", "answer": "1", "split": 1}', "train, test"),
])
def test_a_bad_line_is_named(tmp_path, capsys, line, words):
    """A traceback from the middle of a file, or a run that begins without the line."""
    path = write(tmp_path / "p.jsonl", [*numbered(3, split="train"), *numbered(3, split="test"), "", line])
    assert main([*QUICK, f"--problems={path}", f"--out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and f"{path}, line 8: " in printed.err and words in printed.err
    assert not printed.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, words", [
    (b"", "0 problems to train on"), (b"\n \n", "0 problems to train on"), (b"\xff\xfe{}", "line 1: not UTF-8"),
    (b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xe9"', "line 2: not UTF-8"),
    (b'{"prompt": "a", "answer": "1", "split": "train"}', "0 to test on"),
    (b'{"prompt": "a", "answer": "1", "split": "test"}\n{"prompt": "b", "answer": "1", "split": "test"}', "0 problems"),
])
def test_files_without_problems_are_refused(tmp_path, capsys, content, words):
    """An empty test side, over which a mean is NaN at the end of the run."""
    (tmp_path / "p.jsonl").write_bytes(content)
    assert main([*QUICK, f"--problems={tmp_path / 'p.jsonl'}", f"--out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and words in printed.err and not (tmp_path / "out").exists()


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path):
    """What some editors put first makes the first line no JSON."""
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(
        {"prompt": "a\u2028b", "answer": "1"}, ensure_ascii=False).encode() + b"\r\n")
    with pytest.raises(ValueError, match="1 problems to train on"):
        OwnProblems(Arithmetic(), str(tmp_path / "p.jsonl"), 40, 20)


# Text


def make_text(n=400):
    return [f"Document {i}. " + " ".join(f"Line {j} of {i}." for j in range(1 + i % 7)) for i in range(n)]


@pytest.mark.parametrize("kind", ("jsonl", "txt"))
def test_text_is_read_whole_and_a_fiftieth_is_kept(tmp_path, kind):
    """Documents lost, torn, or both read and measured on; an end of text that the text itself brings."""
    texts = [*make_text(), "So it ends.<|endoftext|>Not yet."]
    if kind == "jsonl":
        path = write(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    else:
        (tmp_path / "t.txt").write_text("\n \n".join(texts) + "\n\n\n")
        path = str(tmp_path / "t.txt")
    task, encoding = OwnCorpus(Arithmetic(), path, 1.0), get_tokenizer()
    assert f"{len(texts)} documents" in task.notes[-1]
    whole = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)
    assert f" {whole} tokens" in task.notes[-1]
    once = documents(task.make_corpus(whole - whole // 50, seed=0))
    held_out = documents(task.make_corpus(whole // 50, seed=0, heldout=True))
    read = [encoding.decode(part[:-1].tolist()) for part in once]
    kept = [encoding.decode(part[:-1].tolist()) for part in held_out[:-1]]  # the last may go on in what is read
    assert set(kept) and not set(read) & set(kept)
    assert len(read) == len(set(read)) >= 0.97 * len(texts)
    assert len(set(read) - set(texts)) <= 1 and len(set(kept) - set(texts)) <= 1


def test_too_little_text_is_read_again_in_another_order(tmp_path):
    """A corpus that ends early, or that comes in the same order every time."""
    path = write(tmp_path / "t.jsonl", [{"text": text} for text in make_text()])
    task = OwnCorpus(Arithmetic(), path, 1.0)
    n = len(task.kept[False])
    first, second = (task.make_corpus(3 * n, seed) for seed in (0, 1))
    assert 3 * n <= len(first) < 3 * n + 200
    assert np.array_equal(first, task.make_corpus(3 * n, 0)) and not np.array_equal(first[:n], second[:n])
    assert not np.array_equal(first[:n], first[n:2 * n])
    assert sorted(first[:n].tolist()) == sorted(first[n:2 * n].tolist())


@pytest.mark.parametrize("share", (0.25, 0.5, 0.9))
@pytest.mark.parametrize("size", (1, 60, 100_000))
def test_the_share_is_of_tokens_and_everywhere_the_same(tmp_path, share, size):
    """A share of documents, whatever their size, or all of the own text first: only the beginning may be read."""
    texts = make_text()
    texts = ["\n".join(texts[i:i + size]) for i in range(0, len(texts), size)]
    mixed = OwnCorpus(Arithmetic(), write(tmp_path / "t.jsonl", [{"text": text} for text in texts]), share).make_corpus(
        100_000, seed=0)
    assert len(mixed) >= 100_000
    for part in np.split(mixed[:100_000], 4):
        own = [len(d) for d in documents(part) if not re.match("User: |Facts:", get_tokenizer().decode(d[:9].tolist()))]
        assert sum(own) / len(part) == pytest.approx(share, abs=0.1)
    built_in = {d.tobytes() for d in documents(Arithmetic().make_corpus(100_000, seed=0))}
    others = [d for d in documents(mixed) if d.tobytes() in built_in]
    assert sum(map(len, others)) / len(mixed) == pytest.approx(1 - share, abs=0.03)


def test_long_documents_are_read_on_from_inside(tmp_path):
    """A book is one document: without it only its first row is read."""
    (tmp_path / "book.txt").write_text("\n".join(f"{i} is a number, and so is {i + 1}." for i in range(3000)))
    task = OwnCorpus(Arithmetic(), str(tmp_path / "book.txt"), 1.0)
    tokens, starts = load_corpus(task, 240, 0, 129)
    assert starts[:3].tolist() == [0, 129, 258] and len(starts) == 240
    assert len(task.kept[False]) > 240 * 129 and len(set(tokens[starts].tolist())) > 10


@pytest.mark.parametrize("length", (100, 150, 250, 380, 600))
def test_most_of_the_text_is_read(tmp_path, length):
    """Rows that start at documents only: of paragraphs of a few rows each but the first row is never seen."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=length)) for _ in range(60_000 // length)]
    task = OwnCorpus(Arithmetic(), write(tmp_path / "t.jsonl", [{"text": text} for text in texts]), 1.0)
    tokens, starts = load_corpus(task, 200, 0, 129)
    read = np.zeros(len(tokens), dtype=bool)
    for start in starts.tolist():
        assert not read[start:start + 129].any(), "nothing is read twice"
        read[start:start + 129] = True
    assert read[:starts.max()].mean() > 0.5
    more = load_corpus(task, 900, 0, 129)[1]
    assert len(more) == 900 and np.array_equal(more[:200], starts)


@pytest.mark.parametrize("name, content, words", [
    ("t.jsonl", '{"text": "a"}\n{"texts": "b"}\n', 'line 2: "text" must be given'),
    ("t.jsonl", "a", "line 1: not JSON"),
    ("t.txt", "", "too little text"), ("t.txt", "\n\n \n", "too little text"), ("t.txt", "hello", "too little text"),
])
def test_bad_text_is_refused(tmp_path, capsys, name, content, words):
    """A model that has read nothing, found out after pretraining."""
    (tmp_path / name).write_text(content)
    assert main([*QUICK, f"--corpus={tmp_path / name}", f"--out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and words in printed.err and not (tmp_path / "out").exists()


# The run


def test_a_run_on_files(tmp_path, capsys):
    """The whole recipe on problems and text that are not ours; and files that change under a run."""
    problems = write(tmp_path / "p.jsonl", numbered(300))
    corpus = write(tmp_path / "t.jsonl", [{"text": f"User: Twice {i}?\nAssistant: <think>{i}+{i}={2 * i}</think>"
                                           f"<answer>{2 * i}</answer>"} for i in range(300, 700)])
    args = [*QUICK, f"--problems={problems}", f"--corpus={corpus}", "--corpus_share=0.5", f"--out={tmp_path / 'out'}"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert " problems to train on" in printed and "400 documents" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["models"]["student"]) == {"params", "test"} and found["models"]["zero"]["test"]["n_problems"] == 8
    assert "| zero |" in (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"Twice \d+\?  ->", printed)

    assert main([f"--out={tmp_path / 'out'}", "--ask=Twice 7?"]) == 0
    assert capsys.readouterr().out.startswith("Twice 7? = 14\nbase ")
    assert main([f"--out={tmp_path / 'out'}", "--ask=Why?"]) == 0
    assert capsys.readouterr().out.startswith("Why? = ?\nbase ")

    moved = [arg.replace("p.jsonl", "q.jsonl") for arg in args]
    (tmp_path / "p.jsonl").rename(tmp_path / "q.jsonl")
    assert main(moved) == 0, "the same problems from another place"
    write(tmp_path / "q.jsonl", numbered(301))
    assert main(moved) == 2
    error = capsys.readouterr().err
    assert "zero.pt was made with problems=" in error and error.count("\n") == 1
    assert main([f"--out={tmp_path / 'out'}", "--ask=Twice 7?"]) == 0
    assert capsys.readouterr().out.startswith("Twice 7? = ?\nbase "), "of another file, no answer is known"
    write(tmp_path / "p.jsonl", numbered(300))
    said = [re.sub("=.*p.jsonl$", f"={fingerprint(problems)}", arg) for arg in args]
    assert main(said) == 0, "as the refusal says it"
    assert path_of(fingerprint(problems)) == problems and fingerprint("") == ""
