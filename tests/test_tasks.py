"""Rewards and files of problems as people write them, and runs that start from a checkpoint."""
import json
import random

import numpy as np
import pytest
import torch

from data.arithmetic import Arithmetic, parse
from data.own import OwnProblems
from engine.tasks import RESERVED, Checked
from engine.terminal import UsageError, step_line
from tests.conftest import NAMES, QUICK, copy, main, results, weights_equal

PROBLEM = parse("8*7-19")


class Scores(Arithmetic):
    """Arithmetic whose reward returns what it is given."""

    def reward(self, completion, problem):
        return self.given(completion)


def checked(given):
    task = Scores()
    vars(task)["given"] = given if callable(given) else lambda completion: given
    return Checked(task)


# Rewards


@pytest.mark.parametrize("value, number", [
    (1, 1.0), (0, 0.0), (True, 1.0), (-2.5, -2.5), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (np.bool_(True), 1.0),
    (np.array(2.0), 2.0), (torch.tensor(0.25), 0.25), (torch.tensor(1), 1.0), (torch.tensor(True), 1.0)])
def test_what_counts_as_a_number(value, number):
    """People return what their library gave them. It must not end in an error of json or of torch after the base was
    trained."""
    scores = checked({"accuracy": np.int32(1), "reward": value}).reward("", PROBLEM)
    assert scores == {"accuracy": 1.0, "reward": number} and {type(score) for score in scores.values()} == {float}


@pytest.mark.parametrize("given, words", [
    (None, "None, not a dict"), (1.0, "1.0, not a dict"), ([1], "not a dict"), ({}, "{}, not a dict with \"accuracy\""),
    ({"reward": 1}, "not a dict with \"accuracy\""),
    ({"accuracy": None}, "'accuracy' is None, not a finite number"), ({"accuracy": "1"}, "'accuracy' is '1'"),
    ({"accuracy": 1, "reward": float("nan")}, "'reward' is nan"), ({"accuracy": 1, "x": float("inf")}, "'x' is inf"),
    ({"accuracy": 1, "x": [1.0]}, "'x' is [1.0]"), ({"accuracy": 1, "x": torch.ones(1)}, "'x' is tensor([1.])"),
    ({"accuracy": 1, "x": np.ones(2)}, "'x' is array([1., 1.])"), ({"accuracy": 1, "x": 1j}, "'x' is 1j"),
    ({"accuracy": 1, "x": 10**400}, "'x' is 1000000000"),
    ({"accuracy": 0.5}, "'accuracy' is 0.5, not 0 or 1"), ({"accuracy": 2}, "'accuracy' is 2.0, not 0 or 1"),
])
def test_a_bad_score_is_named(given, words):
    """The line must name the key, the value and the completion, or nobody finds the case in a reward of fifty lines."""
    with pytest.raises(UsageError) as error:
        checked(given).reward("<think>so", PROBLEM)
    assert words in str(error.value) and "for the completion '<think>so'" in str(error.value)


def test_the_keys_are_the_same_each_time():
    """A key that is there only sometimes has no mean over a rollout. "reward" may be missing: then accuracy and format
    are weighted."""
    task = checked(lambda completion: {"accuracy": 0} | {letter: 1 for letter in completion})
    assert task.reward("ab", PROBLEM) == {"accuracy": 0, "a": 1, "b": 1}
    with pytest.raises(UsageError, match="the reward has no 'b' for the completion 'a'"):
        task.reward("a", PROBLEM)
    with pytest.raises(UsageError, match="the reward also has 'c' for the completion 'abc'"):
        task.reward("abc", PROBLEM)
    assert task.reward("ba", PROBLEM) == {"accuracy": 0, "a": 1, "b": 1}
    task = checked(lambda completion: {"accuracy": 0} | ({"reward": 1} if completion else {}))
    assert len(task.reward("", PROBLEM)) == 1 and len(task.reward("x", PROBLEM)) == 2


def test_a_bad_reward_is_refused_before_anything_is_trained(tmp_path, monkeypatch, refused):
    """The base must not be trained for minutes, or hours, before the reward is called for the first time."""
    def only_when_correct(completion, problem):
        correct = completion.endswith(f"<answer>{problem.answer}</answer>")
        return {"accuracy": 1, "bonus": 1} if correct else {"accuracy": 0}

    monkeypatch.setattr(Arithmetic, "reward", staticmethod(only_when_correct))
    line = refused(*QUICK, f"--out={tmp_path / 'out'}")
    assert "the reward also has 'bonus' for the completion '<think>1+1=2</think><answer>" in line
    assert not (tmp_path / "out").exists()


def test_a_bad_score_in_a_run_keeps_what_is_there(quick, tmp_path, monkeypatch, refused):
    """What no made-up completion shows may come up late. Then the run must end with one line, and resume.pt is kept."""
    copy(quick, tmp_path, "base.pt", "student_base.pt")
    calls = []

    def late(completion, problem):
        calls.append(completion)
        return {"accuracy": 0 if len(calls) < 400 else None}

    monkeypatch.setattr(Arithmetic, "reward", staticmethod(late))
    assert "'accuracy' is None, not a finite number" in refused(*QUICK, "--stage=zero", f"--out={tmp_path}")
    assert (tmp_path / "resume.pt").exists() and (tmp_path / "base.pt").exists()


def test_many_truncated_answers_are_shown():
    """If most answers are cut off at the budget, the reward stays at 0, and nothing else on the terminal says why."""
    assert "truncated 0.75" in step_line("zero 1/2", {"reward": 0.0, "truncated": 0.75}, 1.0)
    assert "truncated" not in step_line("zero 1/2", {"reward": 0.0, "truncated": 0.1}, 1.0)
    assert "truncated" not in step_line("base 1/2", {"loss": 1.0}, 1.0)


@pytest.mark.parametrize("name", ["length", "loss", "kl", "step", "pass@1", 1, None])
def test_a_score_is_not_called_like_another_metric(name):
    """A score "length" would be averaged with the length in tokens, and the log would show neither."""
    with pytest.raises(UsageError, match="the reward has the key "):
        checked({"accuracy": 1, name: 2}).reward("", PROBLEM)


def test_the_names_of_all_metrics_are_reserved(quick):
    """A metric is added to the log, and a score of the same name is not refused."""
    scores = {"reward", "accuracy", "format", "reflection"}
    logged = {name for line in (quick / "log.jsonl").read_text().splitlines() for name in json.loads(line)}
    columns = {name for kinds in results(quick)["models"].values() for name in kinds["test"]}
    assert (logged | columns) - scores <= RESERVED


# Files of problems


def problems_of(tmp_path, rows):
    """The training problems of a file with these rows, and its notes."""
    rows = [*({"split": "train"} | row for row in rows),
            *({"prompt": f"{n}?", "answer": n, "split": "test"} for n in range(2))]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = OwnProblems(Arithmetic(), str(path), 400, 400)
    return task.problems["train"], task.notes


def test_gsm8k_as_it_is_published(tmp_path):
    """The field is "question", and "answer" holds the steps, with calculator marks, and the answer after ####."""
    row = {"question": "Ann has 4 boxes of 12 eggs. She eats 3 eggs. How many are left?",
           "answer": "She had 4*12=<<4*12=48>>48 eggs.\nNow she has 48-3=<<48-3=45>>45 eggs.\n#### 45"}
    (problem,), notes = problems_of(tmp_path, [row])
    assert problem.question == row["question"] and problem.answer == "45" and len(notes) == 1
    assert problem.working == "She had 4*12=48 eggs.\nNow she has 48-3=45 eggs."
    assert problem.check("45") and problem.check("$45") and not problem.check(row["answer"])
    (problem,), _ = problems_of(tmp_path, [{"question": "Big?", "answer": "so\n#### 1,450"}])
    assert problem.check("1450") and problem.working == "so"


def test_math_as_it_is_published(tmp_path):
    """The field is "problem", and the answer is in the last box of "solution"."""
    rows = [{"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra",
             "solution": "We have \\boxed{1} and 1, so $1+1 = \\boxed{2}$."},
            {"problem": "Half of 1?", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
            {"problem": "Where?", "solution": "On $\\boxed{[1,2)}$."}]
    (two, half, interval), notes = problems_of(tmp_path, rows)
    assert two.answer == "2" and two.working == rows[0]["solution"] and half.check("0.5") and half.check("1/2")
    assert interval.check("[1,2)") and not interval.check("(1,2)")
    assert notes[1].endswith("1 answers hold a unit, several numbers or LaTeX, and are matched letter by letter only, "
                             "the first in line 3")


def test_the_usual_keys_rule(tmp_path):
    """A file that has "prompt" beside "question", or "answer" beside a box, must not change its meaning."""
    rows = [{"prompt": "a", "question": "b", "answer": "1", "solution": "so \\boxed{2}"}, {"problem": "c", "answer": 7}]
    (first, second), _ = problems_of(tmp_path, rows)
    assert (first.question, first.answer, first.working) == ("a", "1", "so \\boxed{2}")
    assert (second.question, second.answer, second.working) == ("c", "7", "")


def test_evaluate_reads_a_file_as_training_does(quick, tmp_path, capfd, refused):
    """Of a repeated prompt the first counts in both. An empty answer must not make an empty <answer> correct."""
    path = tmp_path / "p.jsonl"
    lines = [{"prompt": "1+1", "answer": 2}, {"prompt": "1 + 1", "answer": 2}, {"prompt": "1+1", "answer": 3},
             {"prompt": "2+2", "answer": ""}, {"prompt": "3+3", "answer": "6 eggs"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([f"--evaluate={path}", f"--out={quick}"]) == 0
    notes = capfd.readouterr().out.splitlines()[:3]
    assert notes[0] == f"{path}: 3 problems" and "2 problems left out, the first in line 3: " in notes[1]
    assert "1 answers hold a unit" in notes[2] and notes[2].endswith("line 5")
    lines[0]["solution"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert 'line 1: "solution" is null, not text' in refused(f"--evaluate={path}", f"--out={quick}")


# Starting from a checkpoint


def test_a_finished_zero_goes_on_in_another_folder(quick, tmp_path, refused):
    """More steps for a finished stage are refused, because its checkpoint would not say what shaped it. The line says
    how to go on, and that way must work: the new base is the old zero, and its settings name it."""
    line = refused(*QUICK, "--rl_steps=7", f"--out={quick}")
    assert f"--base={quick / 'zero.pt'} --out=NEW" in line and "rl_steps=5, not 7" in line
    args = [*(flag for flag in QUICK if not flag.startswith("--base_tokens")), f"--base={quick / 'zero.pt'}"]
    assert main([*args, "--rl_steps=2", "--stage=base", f"--out={tmp_path}"]) == 0
    assert weights_equal(tmp_path / "base.pt", quick / "zero.pt")
    assert main([*args, "--rl_steps=2", "--stage=zero", f"--out={tmp_path}"]) == 0
    assert not weights_equal(tmp_path / "zero.pt", quick / "zero.pt")
    stored = results(tmp_path)
    assert stored["config"]["base"].startswith(f"{quick / 'zero.pt'} (crc32 ") and stored["config"]["base_tokens"] == 0
    assert list(stored["models"]) == NAMES[:2]
    assert "base.pt was made with base" in refused(*args[:-1], "--base_tokens=40000", f"--out={tmp_path}")


def test_a_base_that_does_not_fit_is_refused(quick, tmp_path, refused):
    """A checkpoint of another length or tokenizer, or a file that is none, is refused before any work."""
    out = f"--out={tmp_path / 'out'}"
    line = refused(*QUICK, f"--base={quick / 'zero.pt'}", "--block_size=136", out)
    assert "has block_size 128, and this run 136" in line
    (tmp_path / "x.pt").write_text("x")
    assert "not a complete nanoR1 checkpoint" in refused(*QUICK, f"--base={tmp_path / 'x.pt'}", out)
    assert "is missing" in refused(*QUICK, f"--base={tmp_path / 'y.pt'}", out)
    assert not (tmp_path / "out").exists()


def test_checked_tasks_are_equal_if_their_tasks_are():
    """The corpora of both bases are made once for equal tasks."""
    assert Checked(Arithmetic()) == Checked(Arithmetic()) != Checked(Arithmetic(max_ops=2))
    assert len({Checked(Arithmetic()), Checked(Arithmetic())}) == 1
    assert Checked(Arithmetic()).make_problem(random.Random(1)) == Arithmetic().make_problem(random.Random(1))
