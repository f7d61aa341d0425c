"""The stages, their evaluation and the report: what a run learns, logs and prints."""
import os
import re
import statistics
import subprocess
import sys

import pytest
import torch

import train
from data import arithmetic
from data.arithmetic import Arithmetic
from data.countdown import Countdown
from data.tokenizer import get_tokenizer
from model import generate
from rewards import accuracy_reward, extract_answer, format_reward, reflects
from run import Config, build_model, check, load_checkpoint, parse_args
from tests.conftest import NAMES, QUICK, ROOT, copy, results, rows, weights_equal
from train import evaluate, load_corpus, main, majority, make_task, reward_function


@pytest.fixture(scope="module", autouse=True)
def tiny_under_way(request, tmp_path_factory):
    """Begins the README's smoke run beside the first tests of this file, if others want it."""
    if not any("tiny" in item.fixturenames for item in request.session.items):
        return (yield)
    out = tmp_path_factory.mktemp("tiny")
    process = subprocess.Popen([sys.executable, "train.py", "--preset=tiny", "--threads=1", f"--out={out}"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "COLUMNS": "200"})  # a wide terminal
    yield out, process
    process.kill()


@pytest.fixture(scope="module")
def tiny(tiny_under_way):
    """The smoke run, finished: where it wrote, and what it printed."""
    out, process = tiny_under_way
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return out, stdout


# The stages


def test_finished_run_may_gain_the_control(quick, tmp_path):
    """student_rl starts from student_base and has the student's number of updates, each on as many completions; nothing
    else is made again."""
    copy(quick, tmp_path, *(f"{name}.pt" for name in NAMES), "log.jsonl", "results.json")
    assert main([*QUICK, "--student_rl=True", f"--out={tmp_path}"]) == 0
    config = results(tmp_path)["config"]
    control = [row for row in rows(tmp_path) if row["stage"] == "student_rl"]
    updates = config["distill_steps"] * config["distill_epochs"] * config["distill_minibatches"]
    assert len(control) == updates / config["rl_minibatches"]
    completions = config["distill_prompts"] / config["distill_minibatches"] * config["rl_minibatches"]
    assert all((row["format"] * completions).is_integer() for row in control)  # a share of a rollout's completions
    assert "student_rl" in results(tmp_path)["models"]
    before = [row for row in rows(tmp_path) if row["stage"] != "student_rl"]
    assert before == rows(quick)
    for name in NAMES:
        assert (tmp_path / f"{name}.pt").read_bytes() == (quick / f"{name}.pt").read_bytes()


def test_who_is_asked_longer_problems(quick, tmp_path, monkeypatch):
    """Zero trains on problems as long as the hard ones, whose lengths it must not have met; the student does not; or its
    control trains on other problems than the student."""
    asked = {"zero": [], "student": [], "student_rl": []}

    def recorded(step, stage):
        def wrapper(model, other, optimizer, problems, *args):
            asked[stage(model)] += [len(re.findall("[-+*]", problem.question)) for problem in problems]
            return step(model, other, optimizer, problems, *args)
        return wrapper

    of_size = {model["params"]: name for name, model in results(quick)["models"].items() if name in ("zero", "student")}
    monkeypatch.setattr(train, "grpo_step", recorded(train.grpo_step, lambda model: {
        "zero": "zero", "student": "student_rl"}[of_size[model.n_params()]]))
    monkeypatch.setattr(train, "distill_step", recorded(train.distill_step, lambda model: "student"))
    for flags, most in (([], 6), (["--distill_longer=False"], 4)):
        out = tmp_path / str(most)
        copy(quick, out, "base.pt", "student_base.pt")
        few = ["--student_rl=True", "--rl_steps=2", "--distill_steps=1", "--distill_epochs=1", "--eval_problems=2", *flags]
        assert main([*QUICK, *few, f"--out={out}"]) == 0
        assert {stage: (min(n_ops), max(n_ops)) for stage, n_ops in asked.items()} == {
            "zero": (1, 4), "student": (1, most), "student_rl": (1, most)}
        asked = {stage: [] for stage in asked}


def test_a_stage_that_is_made_again_is_evaluated_again(quick, tmp_path):
    """results.json keeps the figures of a model that is gone."""
    copy(quick, tmp_path, *(f"{name}.pt" for name in NAMES if name != "zero"), "log.jsonl", "results.json")
    text = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text(re.sub(r'"params": \d+', '"params": 7', text))
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 0
    found = {name: model["params"] for name, model in results(tmp_path)["models"].items()}
    assert {name for name in found if found[name] != 7} == {"zero"} and found.keys() == set(NAMES)
    assert weights_equal(quick / "zero.pt", tmp_path / "zero.pt")
    steps = [row["step"] for row in rows(tmp_path) if row["stage"] == "zero"]
    assert steps == [1, 2, 3, 4, 5]


def test_a_reward_of_ones_own(quick, tmp_path, monkeypatch):
    """A task whose reward returns no more than the README asks for ends in a KeyError over "format", or is weighed as if
    it were the built-in one."""
    def even_length(completion, problem):
        right = float(len(completion) % 2 == 0)
        return {"reward": 5 * right - 1, "accuracy": right}

    monkeypatch.setattr(Arithmetic, "reward", staticmethod(even_length))
    copy(quick, tmp_path, "base.pt", "student_base.pt")
    args = [*QUICK, "--on_policy=False", "--rl_steps=2", "--distill_steps=2", "--distill_epochs=1"]
    assert main([*args, f"--out={tmp_path}"]) == 0
    for row in rows(tmp_path):
        assert row["reward"] == pytest.approx(5 * row["accuracy"] - 1) and 0 < row["accuracy"] < 1
        assert "format" not in row and row["stage"] in ("zero", "student")
        assert row.get("accepted", row["accuracy"]) == row["accuracy"], "the student learns from what is right"
    assert list(results(tmp_path)["models"]) == NAMES
    assert results(tmp_path)["models"]["student"]["test"]["pass@1"] > 0
    assert not weights_equal(quick / "base.pt", tmp_path / "zero.pt")


def test_reward_is_weighed_as_set():
    """A weight that is applied to the other reward, or a reward that is logged instead of what is maximised."""
    problem, task = arithmetic.parse("8*7-19"), Arithmetic()
    right = "<think>8*7=56, 56-19=37</think><answer>37</answer>"
    wrong = right.replace(">37", ">38")
    for text, accuracy, well_formed in ((right, 1, 1), (right + ".", 1, 0), (wrong, 0, 1), ("37", 0, 0)):
        scores = reward_function(Config(accuracy_weight=10, format_weight=3), task)(text, problem)
        assert (scores["accuracy"], scores["format"]) == (accuracy, well_formed)
        assert scores["reward"] == 10 * accuracy + 3 * well_formed


@pytest.mark.parametrize("task", (Arithmetic(), Countdown()))
def test_a_longer_corpus_begins_with_the_shorter_one(task):
    """base_tokens shapes the student's base after all: both bases read one corpus, and a checkpoint of the student's base
    is taken over by a run with another base_tokens."""
    short, starts = load_corpus(task, 40, 0, 129)
    long, more = load_corpus(task, 90, 0, 129)
    assert len(starts) == 40 and len(more) == 90 and torch.equal(more[:40], starts)
    end = int(starts[-1]) + 129
    assert torch.equal(short[:end], long[:end])


def test_the_gpu_preset_takes_its_steps(tmp_path):
    """A preset that nobody can try on a laptop: prompts that do not fit its rows, a shape that its heads do not divide.
    A few steps of each stage, on small batches for its full models."""
    few = ["--base_batch=1", "--base_tokens=512", "--student_base_batch=1", "--student_base_tokens=256",
           "--rl_steps=2", "--rl_prompts=2", "--rl_samples=2", "--distill_steps=1", "--distill_prompts=2",
           "--distill_minibatches=1", "--on_policy=True", "--eval_problems=2", "--rl_max_new_tokens=7"]
    cfg, _ = parse_args(["--preset=gpu"])
    check(cfg), make_task(cfg)
    args = ["--preset=gpu", "--device=cpu", "--dtype=float32", "--compile=off", "--threads=1", "--micro_batch=1024"]
    assert main([*args, *few, f"--out={tmp_path}"]) == 0
    params = {name: model["params"] for name, model in results(tmp_path)["models"].items()}
    assert 10e6 < params["zero"] < 30e6 and params["student"] * 5 < params["zero"]
    assert [row["stage"] for row in rows(tmp_path)] == ["base", "base", "zero", "zero", "student_base", "student"]


def test_countdown_passes_through_every_stage(tmp_path, capsys):
    """A task that only the default's stages fit; a model asked with the other task's parser."""
    few = ["--base_tokens=9000", "--student_base_tokens=9000", "--rl_steps=2", "--distill_steps=2", "--eval_problems=2"]
    assert main([*QUICK, *few, "--task=countdown", f"--out={tmp_path}"]) == 0
    assert list(results(tmp_path)["models"]) == NAMES
    capsys.readouterr()
    assert main(["--ask=3 4 7 = 25", f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith("3 4 7 = 25 = 3*7+4\nbase")
    assert main(["--ask=8*7", f"--out={tmp_path}"]) == 2 and "no countdown" in capsys.readouterr().err


def test_ask_shows_models_side_by_side(quick, capsys):
    """--ask that leaves out a model, answers for the wrong one, or takes what is no problem for one."""
    assert main(["--ask=8*7-19", f"--out={quick}"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "8*7-19 = 37" and [line.split()[0] for line in others] == NAMES
    encoding = get_tokenizer()
    for name, line in zip(NAMES, others):
        prompt = encoding.encode_ordinary("User: 8*7-19\nAssistant: ")
        ids, = generate(build_model(load_checkpoint(quick / f"{name}.pt")), [prompt], 40, temperature=0,
                        eos_id=encoding.eot_token)
        text = encoding.decode([i for i in ids if i != encoding.eot_token])
        assert line.split()[1] == "wrong" and " ".join(text.split()) in line


@pytest.mark.parametrize("text", ("hello", "__import__('os')", "", "99**99", "8*7-19; 1"))
def test_ask_refuses_what_is_no_problem(quick, refused, text):
    """What the user types is executed, or ends in a traceback."""
    assert "no expression" in refused(f"--ask={text}", f"--out={quick}")


def test_importing_has_no_side_effect(tmp_path):
    """A module that prints, warns or writes when a fork imports it."""
    modules = "train, run, parallel, distill, grpo, rewards, model, data.arithmetic, data.countdown, data.own"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir())


# The smoke run


def test_tiny_learns(tiny):
    """A recipe in which some stage no longer learns would still run to its end."""
    out, _ = tiny
    log = rows(out)
    base = [row["loss"] for row in log if row["stage"] == "base"]
    assert sum(base[-5:]) / 5 < 0.5 * base[0]
    models = results(out)["models"]
    assert models["zero"]["test"]["format"] > models["base"]["test"]["format"] + 0.15
    assert models["student"]["test"]["format"] > models["student_base"]["test"]["format"] + 0.05


def test_report_and_results(tiny):
    """A figure that the report shows must be the one in results.json, and every promised key must be there."""
    out, stdout = tiny
    found = results(out)
    assert set(found) == {"config", "seconds", "models"}
    assert set(found["models"]) == set(NAMES) and set(NAMES) <= set(found["seconds"])
    assert found["config"].keys() == vars(Config()).keys()
    for model in found["models"].values():
        for kind in ("test", "hard"):
            assert set(model[kind]) == {"pass@1", "pass@1_se", "maj@16", "pass@16", "format", "length", "reflection",
                                        "n_problems"}
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text in stdout
    for name, model in found["models"].items():
        for kind in ("test", "hard"):
            row, = (line for line in text.splitlines() if [x.strip() for x in line.split("|")][:2] == [name, kind])
            m = model[kind]
            assert [cell.strip() for cell in row.split("|")] == [
                name, kind, f"{m['pass@1']:.1%} ± {m['pass@1_se']:.1%}", f"{m['maj@16']:.1%}", f"{m['pass@16']:.1%}",
                f"{m['format']:.1%}", f"{m['length']:.1f}", f"{m['reflection']:.1%}"]
            assert f"{name} {model['params']:,}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80  # or it wraps in a narrow terminal
    assert "accuracy over 12 RL steps" in text and "seed 0" in text
    assert found["models"]["student"]["params"] * 2 < found["models"]["zero"]["params"]


def test_log_has_a_row_for_every_step(tiny):
    """A step without a row, a metric that the terminal shows and the log has not."""
    out, stdout = tiny
    steps = {name: [row["step"] for row in rows(out) if row["stage"] == name] for name in NAMES}
    for found in steps.values():
        assert found == list(range(1, len(found) + 1))
    zero = next(row for row in rows(out) if row["stage"] == "zero")
    assert {"loss", "grad_norm", "reward", "accuracy", "format", "length", "length_wrong", "kl", "ratio", "clip_low",
            "clip_high", "entropy", "no_signal", "reflection", "truncated", "tokens_per_s"} <= set(zero)
    shown = dict(re.findall(r"  ([a-z_]+) ([0-9.e+-]+)", re.search("zero 1/12.*", stdout).group()))
    for key in ("loss", "reward", "accuracy", "format", "length", "entropy", "no_signal"):
        assert float(shown[key]) == pytest.approx(zero[key], rel=5e-3), key  # three digits


def test_reference_is_refreshed(tiny, tmp_path):
    """--ref_every that never refreshes, or at the wrong steps: the KL to a reference as young as the policy is 0."""
    copy(tiny[0], tmp_path, "base.pt")
    args = ["--preset=tiny", "--threads=1", "--stage=zero", "--rl_steps=5", "--rl_minibatches=1", "--kl_coef=0.001",
            "--eval_problems=2", "--ref_every=2"]
    assert main([*args, f"--out={tmp_path}"]) == 0
    kl = [row["kl"] for row in rows(tmp_path) if row["stage"] == "zero"]
    assert [value == 0 for value in kl] == [True, False, True, False, True]


# Evaluation


@pytest.mark.parametrize("answers, expected", [
    (["7", "3", "3"], "3"), (["7", "3", "3", "7"], "7"), ([None, None, None, "3"], "3"), ([None, None], None),
    ([], None)])
def test_majority(answers, expected):
    """Answers that could not be read win the vote; a tie does not go to the first of the answers."""
    assert majority(answers) == expected


class Lenient(arithmetic.Problem):
    """A model as small as the tiny preset's is never right; as to whether the answer is even, it is now and then."""
    def check(self, answer):
        return answer[-1:] in ("02468" if self.answer in "02468" else "13579")


def test_evaluation_counts_what_was_sampled(tiny):
    """A standard error over samples instead of problems, a vote over the wrong rows, a length without the stop token:
    every figure again, by hand, from the same samples."""
    out, _ = tiny
    model, encoding = build_model(load_checkpoint(out / "zero.pt")), get_tokenizer()

    def sample(problems, generator):
        rows = generate(model, [encoding.encode_ordinary(p.prompt) for p in problems], 40, eos_id=encoding.eot_token,
                        generator=generator, samples=16)
        return [(encoding.decode([t for t in row if t != encoding.eot_token]), len(row)) for row in rows]

    problems = [Lenient(f"{a}-{b}", str(b)) for a in range(1, 6) for b in range(1, 9)]  # more than one batch of 32
    found = evaluate(model, problems, Arithmetic(), max_new_tokens=40, generator=torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    texts, lengths = zip(*(sample(problems[:32], generator) + sample(problems[32:], generator)))
    groups = [texts[i:i + 16] for i in range(0, len(texts), 16)]
    right = [[accuracy_reward(text, problem) for text in group] for group, problem in zip(groups, problems)]
    means = [sum(row) / 16 for row in right]
    votes = 0
    for group, problem in zip(groups, problems):
        answers = [a for a in map(extract_answer, group) if a is not None]
        votes += bool(answers) and problem.check(max(answers, key=answers.count))
    assert len(texts) == 640 and 0 < statistics.mean(means) < 1 and 0 < votes < 40
    assert found == pytest.approx({
        "pass@1": statistics.mean(means), "pass@1_se": statistics.stdev(means) / 40**0.5, "maj@16": votes / 40,
        "pass@16": sum(map(any, right)) / 40, "format": statistics.mean(map(format_reward, texts)),
        "length": statistics.mean(lengths), "reflection": statistics.mean(map(reflects, texts)), "n_problems": 40})
