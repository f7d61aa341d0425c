"""Problems and text from files: what is used, what is left out and counted, and what is refused."""
import json
import pickle
import random
import re
from fractions import Fraction

import numpy as np
import pytest
import tiktoken

from data.arithmetic import Arithmetic
from data.countdown import Countdown
from data.own import OwnCorpus, OwnProblems, Problem, fingerprint, path_of
from data.tokenizer import END_OF_TEXT, get_tokenizer
from engine.corpus import cut_rows
from engine.evaluation import majority
from rewards import accuracy_reward
from tests.conftest import QUICK as SETTINGS
from tests.conftest import main

QUICK = [*SETTINGS, "--rl_steps=2", "--distill_steps=1", "--distill_prompts=32", "--eval_problems=8"]


def write(path, rows):
    """Write rows as JSONL. A row that is a string is written unchanged."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def numbered(n, **more):
    return [{"prompt": f"Twice {i}?", "answer": str(2 * i)} | more for i in range(n)]


# Answers


@pytest.mark.parametrize("answer, right, wrong", [
    ("37", ("37", "+37", "037", "37.0", "74/2"), ("-37", "37.01", "3 7", "37e0", "\u0663\u0667", "", "37/0", "thirty")),
    ("1/3", ("1/3", "2/6", "0001/3", "1 / 3"), ("0.3333333333333333", "1/3.0", "3/1", "1/0", "/3")),
    ("0.1", ("0.1", ".1", "1/10", "0.1000"), ("0.10000000000000001", "0,1", "1e-1", ".", "0.1.0")),
    ("-0", ("0", "-0", "0.0", "0/5"), ("", "-", "O")),
    ("New  Delhi", ("new delhi", "NEW DELHI", " New\nDelhi"), ("newdelhi", "Delhi", "")),
    ("stra\u00dfe", ("STRASSE",), ("strase",)),
    ("9" * 101, ("9" * 101,), ("9" * 101 + ".0", "9" * 5000)),
])
def test_answers_are_compared_exactly(tmp_path, answer, right, wrong):
    """Answers must not be compared as floats, for which 0.1 equals 0.10000000000000001. Numbers must not be compared as
    text, nor text as numbers."""
    rows = [{"prompt": "Q", "answer": answer, "split": "train"}, *numbered(2, split="test")]
    problem = OwnProblems(Arithmetic(), write(tmp_path / "p.jsonl", rows), 40, 120).parse("q")
    assert all(map(problem.check, right))
    assert not any(map(problem.check, wrong))


@pytest.mark.parametrize("given, same", [
    ("0.12345678901234567891", "0.12345678901234567891"), ("12345678901234567890123", "12345678901234567890123"),
    ("-2.50", "-5/2"), ("7.0", "7"), ("1e-5", "1E-5"), ("9" * 5000, "9" * 5000)])
def test_json_numbers_keep_their_digits(tmp_path, given, same):
    """A JSON number must not be read as a float, which drops digits, or as an int, which Python refuses above 4,300
    digits."""
    rows = [f'{{"prompt": "Q", "answer": {given}, "split": "train"}}', *numbered(2, split="test")]
    problem = OwnProblems(Arithmetic(), write(tmp_path / "p.jsonl", rows), 40, 5000).parse("Q")
    assert problem.answer == given and problem.check(same) and not problem.check(same + "1")


def test_equal_answers_vote_together():
    """Six votes for 0.5 and five for 1/2 are eleven votes for one answer, and must not lose against seven for 3."""
    problem = Problem("A half?", "1/2")
    answers = ["0.5"] * 6 + ["1/2"] * 5 + ["3"] * 7
    assert problem.check(majority([problem.canonical(answer) for answer in answers])) and not problem.check("3")


def test_no_answer_takes_long_to_compare():
    """The text of a sample must not reach Fraction unchecked: for some short texts Fraction takes seconds, and it reads
    1_000 as a number."""
    canonical = Problem("?", "").canonical
    assert Fraction(canonical("0" + "1" * 99)) == int("1" * 99) and canonical("0" + "1" * 100) == "0" + "1" * 100
    for text in ("1e3000000", "1_000", "\u0663", "1/" + "0" * 50, "1" * 1_000_000):
        assert canonical(text) == text


# Files of problems


def test_problems_are_those_of_the_file(tmp_path):
    """A problem must not be on the wrong side of the split or have another row's answer, and the seed must decide which
    problems are drawn."""
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
    assert all(len(task.encode_prompt(p)) <= task.max_prompt_tokens == 40 for p in task.heldout_problems(9, "test", 0))
    assert task.make_problem(random.Random(7), longer=True) == task.make_problem(random.Random(7))
    assert accuracy_reward(f"<think>x</think><answer>{tested[0].answer}0</answer>", tested[0]) == 1
    assert task.parse(" twice 3? ").answer == "6" and task.parse("Twice 99?").answer == ""


def test_without_a_split_a_tenth_is_tested_on(tmp_path, assert_frequencies):
    """If the split depended on line numbers, an inserted line would move problems from one side to the other."""
    rows = numbered(3000)
    task = OwnProblems(Arithmetic(), write(tmp_path / "a.jsonl", rows), 40, 20)
    assert_frequencies([len(task.problems[side]) for side in ("train", "test")], [0.9, 0.1])
    random.Random(0).shuffle(rows)
    other = OwnProblems(Arithmetic(), write(tmp_path / "b.jsonl", rows[:-1]), 40, 20)
    assert all({p.question for p in other.problems[side]} <= {p.question for p in task.problems[side]}
               for side in ("train", "test"))


def test_unusable_problems_are_left_out_and_counted(tmp_path):
    """These problems must be left out: a prompt that does not fit, an answer that no completion can match and that only
    costs RL time, a repeated prompt, and a training problem that is also a test problem."""
    rows = [*numbered(9, split="train"), {"prompt": "  twice 0? ", "answer": "0", "split": "test"},  # lines 1 to 10
            {"prompt": " ", "answer": "1"}, {"prompt": "", "answer": "1"},
            {"prompt": "a" * 39, "answer": "1"}, {"prompt": "a" * 38, "answer": "1", "split": "train"},
            {"prompt": "b", "answer": " "}, {"prompt": "c", "answer": "<answer>1"}, {"prompt": "d", "answer": "7" * 21},
            {"prompt": "TWICE  8?", "answer": "17", "split": "train"}, "",
            {"prompt": "e", "answer": "7" * 20, "split": "test"}]
    task = OwnProblems(Arithmetic(), path := write(tmp_path / "p.jsonl", rows), 40, 20)
    assert task.notes[0] == f"{path}: 9 problems to train on, 2 to test on" and len(task.notes) == 2
    assert task.notes[1].startswith(f"{path}: 8 problems left out, the first in line 1: ")
    assert [p.question for p in task.problems["train"]] == [*(f"Twice {i}?" for i in range(1, 9)), "a" * 38]
    assert [p.question for p in task.problems["test"]] == ["twice 0?", "e"] and task.parse("twice 8?").answer == "16"
    usable = write(tmp_path / "q.jsonl", [*numbered(1, split="train"), *({"prompt": i, "answer": i, "split": "test"}
                                                                         for i in "ab")])
    assert OwnProblems(Arithmetic(), usable, 40, 20).notes == [f"{usable}: 1 problems to train on, 2 to test on"]


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "a", "answer": "1"', "not JSON"), ("hello", "not JSON"), ("[" * 100_000, "not JSON"),
    ('["a", "1"]', "not a JSON object"), ('"a"', "not a JSON object"),
    ('{"answer": "1"}', 'no "prompt" or "question" or "problem"; its keys are "answer"'),
    ('{"prompt": "a"}', 'no "answer" or "solution"; its keys are "prompt"'), ("{}", "its keys are none"),
    ('{"prompt": "a", "answer": NaN}', '"answer" is NaN'), ('{"prompt": "a", "answer": -Infinity}', "is -Infinity"),
    ('{"prompt": "a\\ud800", "answer": "1"}', "surrogate"), ('{"prompt": "a", "answer": "\\ud800"}', "surrogate"),
    ('{"prompt": "a", "answer": true}', '"answer" is true'), ('{"prompt": "a", "answer": ["1"]}', 'is ["1"]'),
    ('{"prompt": null, "answer": "1"}', '"prompt" is null'), ('{"prompt": "a", "answer": null}', '"answer" is null'),
    *(('{"prompt": "a", "answer": "1", "solution": %s}' % solution, f'"solution" is {shown}')
      for solution, shown in (("null", "null"), ("[]", "[]"), ("5", "a number"), ("0.5", "a number"))),
    ('{"prompt": "a", "solution": "so 5"}', 'no "answer", and no \\boxed{...} in "solution"'),
    *(('{"prompt": "a", "answer": "1", "split": %s}' % split, '"train" or "test"')
      for split in ("false", '"dev"', "1", "null", '["test"]')),
])
def test_a_bad_line_is_named(tmp_path, capsys, line, words):
    """A bad line must not end in a traceback, and the run must not begin without that line."""
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
    """If the test side were empty, the mean over it would be NaN at the end of the run."""
    (tmp_path / "p.jsonl").write_bytes(content)
    assert main([*QUICK, f"--problems={tmp_path / 'p.jsonl'}", f"--out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and words in printed.err and not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Some editors write a byte-order mark at the start of a file. It must not make the first line bad JSON."""
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(
        {"prompt": "a\u2028b", "answer": "1"}, ensure_ascii=False).encode() + b"\r\n")
    with pytest.raises(ValueError, match="1 problems to train on"):
        OwnProblems(Arithmetic(), str(tmp_path / "p.jsonl"), 40, 20)


# Everything else comes from the wrapped task


def test_all_other_members_are_those_of_the_wrapped_task(tmp_path):
    """The wrappers must have every member that a task gains later, and a wrapper that is sent to another process must
    still have its task."""
    class Scored(Arithmetic):
        def reward(self, completion, problem):
            return {"accuracy": 1.0, "length": float(len(completion))}

    scored = Scored(max_ops=3)
    problems = OwnProblems(scored, write(tmp_path / "p.jsonl", numbered(100)), 40, 20)
    both = OwnCorpus(problems, write(tmp_path / "t.jsonl", [{"text": text} for text in make_text()]), 0.5)
    for task in (problems, both):
        assert task.reward("abc", None) == {"accuracy": 1.0, "length": 3.0} and task.max_ops == 3
        assert task.stop_ids == scored.stop_ids and task.encoding is scored.encoding
        ids = task.encode_prompt(task.parse("Twice 2?"))
        assert ids == task.encoding.encode_ordinary("User: Twice 2?\nAssistant: ")
        assert not hasattr(task, "no_such_member")
    assert np.array_equal(problems.make_corpus(3000, 0), scored.make_corpus(3000, 0))
    assert both.make_problem(random.Random(0)) == problems.make_problem(random.Random(0))
    assert both.held_out == ("test",) and both.notes[0] == problems.notes[0] and len(both.notes) == 2
    only_text = OwnCorpus(Countdown(), str(tmp_path / "t.jsonl"), 0.5)
    assert only_text.held_out == Countdown.held_out and only_text.parse("3 4 7 = 25").answer == "3*7+4"
    assert pickle.loads(pickle.dumps(only_text)).max_prompt_tokens == Countdown.max_prompt_tokens


def test_files_are_read_with_the_encoding_of_the_wrapped_task(tmp_path):
    """The prompts and the text of a pretrained model must not be encoded for the model that is trained here."""
    ranks = {bytes([b]): 255 - b for b in range(256)}  # other ids for the bytes, and a larger one for the end of text
    foreign = tiktoken.Encoding("foreign", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 300})

    class Foreign(Arithmetic):
        encoding, stop_ids = foreign, (300,)

    path = write(tmp_path / "p.jsonl", [*numbered(20), {"prompt": "User: " * 9, "answer": "1", "split": "train"}])
    task = OwnProblems(Foreign(), path, 70, 20)
    assert task.encode_prompt(task.parse("Twice 2?")) == foreign.encode_ordinary("User: Twice 2?\nAssistant: ")
    assert "1 problems left out, the first in line 21" in task.notes[1], "its prompt has more tokens in this encoding"
    texts = make_text()
    task = OwnCorpus(task, write(tmp_path / "t.jsonl", [{"text": text} for text in texts]), 1.0)
    document, *_ = task.split_documents(task.make_corpus(5000, seed=0))
    assert document[-1] == 300 and foreign.decode(document[:-1].tolist()) in texts


# Text


def make_text(n=400):
    return [f"Document {i}. " + " ".join(f"Line {j} of {i}." for j in range(1 + i % 7)) for i in range(n)]


@pytest.mark.parametrize("kind", ("jsonl", "txt"))
def test_text_is_read_whole_and_a_fiftieth_is_kept(tmp_path, kind):
    """A document must not be lost, torn, or both trained on and held out. The characters <|endoftext|> in a text must
    not become an end-of-text token."""
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
    once = task.split_documents(task.make_corpus(whole - whole // 50, seed=0))
    held_out = task.split_documents(task.make_corpus(whole // 50, seed=0, heldout=True))
    read = [encoding.decode(part[:-1].tolist()) for part in once]
    kept = [encoding.decode(part[:-1].tolist()) for part in held_out[:-1]]  # one may be cut at the border
    assert set(kept) and not set(read) & set(kept)
    assert len(read) == len(set(read)) >= 0.97 * len(texts)
    assert len(set(read) - set(texts)) <= 1 and len(set(kept) - set(texts)) <= 1


def test_too_little_text_is_read_again_in_another_order(tmp_path):
    """The corpus must not end early, or repeat the text in the same order."""
    path = write(tmp_path / "t.jsonl", [{"text": text} for text in make_text()])
    task = OwnCorpus(Arithmetic(), path, 1.0)
    n = len(task.tokens[False])
    first, second = (task.make_corpus(3 * n, seed) for seed in (0, 1))
    assert 3 * n <= len(first) < 3 * n + 200
    assert np.array_equal(first, task.make_corpus(3 * n, 0)) and not np.array_equal(first[:n], second[:n])
    assert not np.array_equal(first[:n], first[n:2 * n])
    assert sorted(first[:n].tolist()) == sorted(first[n:2 * n].tolist())


@pytest.mark.parametrize("share", (0.25, 0.5, 0.9))
@pytest.mark.parametrize("size", (1, 60, 100_000))
def test_the_share_is_of_tokens_and_everywhere_the_same(tmp_path, share, size):
    """The share must count tokens, not documents. The text must not all come first, because a run may read only the
    start."""
    texts = make_text()
    texts = ["\n".join(texts[i:i + size]) for i in range(0, len(texts), size)]
    task = OwnCorpus(Arithmetic(), write(tmp_path / "t.jsonl", [{"text": text} for text in texts]), share)
    mixed = task.make_corpus(100_000, seed=0)
    assert len(mixed) >= 100_000
    for part in np.split(mixed[:100_000], 4):
        own = [len(d) for d in task.split_documents(part)
               if not re.match("User: |Facts:", get_tokenizer().decode(d[:9].tolist()))]
        assert sum(own) / len(part) == pytest.approx(share, abs=0.1)
    built_in = {d.tobytes() for d in task.split_documents(Arithmetic().make_corpus(100_000, seed=0))}
    others = [d for d in task.split_documents(mixed) if d.tobytes() in built_in]
    assert sum(map(len, others)) / len(mixed) == pytest.approx(1 - share, abs=0.03)


def test_long_documents_fill_many_rows(tmp_path):
    """A book is one document. A run must read more of it than its first row."""
    (tmp_path / "book.txt").write_text("\n".join(f"{i} is a number, and so is {i + 1}." for i in range(3000)))
    task = OwnCorpus(Arithmetic(), str(tmp_path / "book.txt"), 1.0)
    tokens, starts = cut_rows(task, 240, 129, 0)
    assert starts[:3].tolist() == [0, 129, 258] and len(starts) == 240
    assert len(task.tokens[False]) > 240 * 129 and len(set(tokens[starts].tolist())) > 10


@pytest.mark.parametrize("length", (100, 150, 250, 380, 600))
def test_most_of_the_text_is_read(tmp_path, length):
    """If rows started only where a document starts, only the first row of each document would ever be read."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=length)) for _ in range(60_000 // length)]
    task = OwnCorpus(Arithmetic(), write(tmp_path / "t.jsonl", [{"text": text} for text in texts]), 1.0)
    tokens, starts = cut_rows(task, 200, 129, 0)
    read = np.zeros(len(tokens), dtype=bool)
    for start in starts.tolist():
        assert not read[start:start + 129].any(), "nothing is read twice"
        read[start:start + 129] = True
    assert read[:starts.max()].mean() > 0.5
    more = cut_rows(task, 900, 129, 0)[1]
    assert len(more) == 900 and np.array_equal(more[:200], starts)


@pytest.mark.parametrize("name, content, words", [
    ("t.jsonl", '{"text": "a"}\n{"texts": "b"}\n', "line 2: no \"text\"; its keys are \"texts\""),
    ("t.jsonl", "a", "line 1: not JSON"),
    ("t.txt", "", "too little text"), ("t.txt", "\n\n \n", "too little text"), ("t.txt", "hello", "too little text"),
])
def test_bad_text_is_refused(tmp_path, capsys, name, content, words):
    """Without a check, a model is pretrained on nothing, and nobody notices before the end of the stage."""
    (tmp_path / name).write_text(content)
    assert main([*QUICK, f"--corpus={tmp_path / name}", f"--out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and words in printed.err and not (tmp_path / "out").exists()


# The run


def test_a_run_on_files(tmp_path, capsys):
    """The recipe must also work on problems and text from files. A run must not resume if a file has changed."""
    problems = write(tmp_path / "p.jsonl", numbered(300))
    corpus = write(tmp_path / "t.jsonl", [{"text": f"User: Twice {i}?\nAssistant: <think>{i}+{i}={2 * i}</think>"
                                           f"<answer>{2 * i}</answer>"} for i in range(300, 700)])
    args = [*QUICK, f"--problems={problems}", f"--corpus={corpus}", "--corpus_share=0.5", f"--out={tmp_path / 'out'}"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert " problems to train on" in printed and "400 documents" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["models"]["student"]) == {"params", "test"} and found["models"]["zero"]["test"]["n_problems"] == 8
    assert "\nzero " in (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"Twice \d+\?  ->", printed)

    assert main([f"--out={tmp_path / 'out'}", "--ask=Twice 7?"]) == 0
    assert capsys.readouterr().out.startswith("Twice 7? = 14\nbase ")
    assert main([f"--out={tmp_path / 'out'}", "--ask=Why?"]) == 0
    assert capsys.readouterr().out.startswith("Why? = ?\nbase ")
    assert main([f"--out={tmp_path / 'out'}", "--ask=" + "Why? " * 40]) == 2
    assert "the prompt is too long, 20" in capsys.readouterr().err

    moved = [arg.replace("p.jsonl", "q.jsonl") for arg in args]
    (tmp_path / "p.jsonl").rename(tmp_path / "q.jsonl")
    assert main(moved) == 0, "the same problems from another place"
    write(tmp_path / "q.jsonl", numbered(301))
    assert main(moved) == 2
    error = capsys.readouterr().err
    assert "zero.pt was made with problems=" in error and error.count("\n") == 1
    assert main([f"--out={tmp_path / 'out'}", "--ask=Twice 7?"]) == 2, "the file of the models is gone"
    error = capsys.readouterr().err
    assert "p.jsonl" in error and error.count("\n") == 1
    write(tmp_path / "p.jsonl", numbered(300))
    said = [re.sub("=.*p.jsonl$", f"={fingerprint(problems)}", arg) for arg in args]
    assert main(said) == 0, "a path with its checksum, as results.json has it, is a path"
    assert path_of(fingerprint(problems)) == problems and fingerprint("") == ""


@pytest.mark.parametrize("written, number", [("1,234", "1234"), ("$5", "5"), ("5.", "5"), ("-$1,234.50", "-1234.5"),
                                             ("$0.50.", "1/2"), ("+12,345,678", "12345678")])
def test_numbers_as_people_write_them(written, number):
    """Models answer word problems with "$1,234." where the file says 1234."""
    assert Problem("?", number).check(written) and Problem("?", written).check(number)


@pytest.mark.parametrize("text", ["1,23", ",123", "1,2345", "$", ".", "$-5", "1,234,", "5..", "1.234,5"])
def test_what_is_no_number(text):
    """If commas were allowed anywhere, 1,23 would be equal to 123."""
    assert not Problem("?", "123").check(text) and not Problem("?", "1234").check(text)
    assert Problem("?", "").canonical(text) == text
