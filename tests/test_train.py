"""The stages of train.py: their starting models, their problems, what they learn, and what they log."""
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from data import arithmetic
from data.arithmetic import Arithmetic
from engine.corpus import MADE, Corpus, rows_of
from engine.loop import Step
from tests.conftest import NAMES, QUICK, ROOT, Descent, copy, main, results, rows, weights_equal
from train import Config, pretrain, reward_function


@pytest.fixture(scope="module", autouse=True)
def tiny_under_way(request, tmp_path_factory):
    """Start the README's smoke run beside the first tests of this file, if a test needs it."""
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
    """The finished smoke run -> its folder, and what it printed."""
    out, process = tiny_under_way
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return out, stdout


# The stages


def test_who_is_asked_longer_problems(quick, tmp_path, monkeypatch):
    """zero must not train on problems as long as the hard ones, which test it on lengths that it has not met. The
    student must train on them."""
    asked = {"zero": [], "student": []}

    def recorded(step, stage):
        def wrapper(model, other, optimizer, problems, *args):
            asked[stage] += [len(re.findall("[-+*]", problem.question)) for problem in problems]
            return step(model, other, optimizer, problems, *args)
        return wrapper

    monkeypatch.setattr(train, "grpo_step", recorded(train.grpo_step, "zero"))
    monkeypatch.setattr(train, "distill_step", recorded(train.distill_step, "student"))
    copy(quick, tmp_path, "base.pt", "student_base.pt")
    few = ["--rl_steps=2", "--distill_steps=1", "--distill_epochs=1", "--eval_problems=2"]
    assert main([*QUICK, *few, f"--out={tmp_path}"]) == 0
    assert {stage: (min(n_ops), max(n_ops)) for stage, n_ops in asked.items()} == {"zero": (1, 4), "student": (1, 6)}
    assert {stage: len(n_ops) for stage, n_ops in asked.items()} == {"zero": 2 * 16, "student": 64}


def test_a_stage_that_is_made_again_is_evaluated_again(quick, tmp_path):
    """results.json must not keep the figures of a model that has been replaced."""
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
    """A task's reward may return no more than docs/own.md asks for. This must not end in a KeyError over "format", and
    the reward must not be weighted like the built-in one."""
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
    """A weight must not be applied to the other reward, and the logged reward must be the one that is maximised."""
    run = SimpleNamespace(cfg=Config(accuracy_weight=10, format_weight=3), task=Arithmetic())
    problem = arithmetic.parse("8*7-19")
    right = "<think>8*7=56, 56-19=37</think><answer>37</answer>"
    wrong = right.replace(">37", ">38")
    for text, accuracy, well_formed in ((right, 1, 1), (right + ".", 1, 0), (wrong, 0, 1), ("37", 0, 0)):
        scores = reward_function(run)(text, problem)
        assert (scores["accuracy"], scores["format"]) == (accuracy, well_formed)
        assert scores["reward"] == 10 * accuracy + 3 * well_formed


def test_countdown_passes_through_every_stage(tmp_path, capsys):
    """The stages must fit another task than the default one, and --ask must use the parser of the model's own task."""
    few = ["--base_tokens=9000", "--student_base_tokens=9000", "--rl_steps=2", "--distill_steps=2", "--eval_problems=2"]
    assert main([*QUICK, *few, "--task=countdown", f"--out={tmp_path}"]) == 0
    assert list(results(tmp_path)["models"]) == NAMES
    capsys.readouterr()
    assert main(["--ask=3 4 7 = 25", f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith("3 4 7 = 25 = 3*7+4\nbase")
    assert main(["--ask=8*7", f"--out={tmp_path}"]) == 2 and "no countdown" in capsys.readouterr().err


def test_importing_has_no_side_effect(tmp_path):
    """A module must not print, warn or write when a fork imports it."""
    paths = [path for folder in ("*", "data/*", "engine/**/*") for path in sorted(ROOT.glob(f"{folder}.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    assert {"train", "r1", "data.corpus", "engine.loop", "engine.speed.graphs", "engine.pretrained"} <= set(names)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir())


# What pretraining reads


def test_each_row_of_the_corpus_is_read_once():
    """A row must not be read twice or never, the rows must not come in the order in which they were written, and
    held-out rows must not be trained on."""
    cfg, task = Config(device="cpu", block_size=40), Arithmetic()
    corpus = Corpus(task, cfg, n_steps=7, n_rows=3)
    batches = [corpus.batch(number) for number in range(1, 8)]
    assert all(batch.shape == (3, 41) and batch.dtype == torch.long for batch in batches)
    tokens, starts = rows_of(task, 21, 41, 0)
    expected = tokens[starts[:, None] + torch.arange(41)]
    read = torch.cat(batches).tolist()
    assert sorted(read) == sorted(expected.tolist()) and read != expected.tolist()
    heldout = corpus.heldout.tolist()
    assert len(heldout) == 6 and not any(row in read for row in heldout)


def test_a_base_reads_the_same_however_long_the_other_is(monkeypatch):
    """The student's base must not read other rows if the teacher's base is trained on more tokens. The corpus of both
    must not be written twice."""
    cfg, task, made = Config(device="cpu", block_size=40), Arithmetic(), []
    monkeypatch.setattr(Arithmetic, "make_corpus", lambda self, *args, make=Arithmetic.make_corpus:
                        made.append(args) or make(self, *args))

    def batches(n_steps):
        corpus = Corpus(task, cfg, n_steps, n_rows=4)
        return [corpus.batch(number).tolist() for number in range(1, n_steps + 1)]

    MADE.clear()
    alone = batches(5)
    MADE.clear()
    made.clear()
    batches(9)
    assert batches(5) == alone and len(made) == 1
    MADE.clear()


def test_pretraining_is_the_mean_over_all_tokens(make_gpt, monkeypatch):
    """Micro-batches of different sizes must not have the same weight. Held-out text must not be trained on, or measured
    before the update."""
    task, logged, optimizers = Arithmetic(), [], []
    cfg = Config(device="cpu", block_size=40, micro_batch=100)  # 2, 2 and 1 of 5 rows at a time

    def steps(n, **parts):
        for number in range(1, n + 1):
            step = Step(number, number == n, random.Random(number), None, lr_scale=1 / number)
            yield step
            logged.append(step.metrics.means())

    def make_optimizer(model, adam_lr, muon_lr):
        assert (adam_lr, muon_lr) == (cfg.base_adam_lr, cfg.base_muon_lr)
        optimizers.append(Descent(model, distance=0.1))
        return optimizers[0]

    monkeypatch.setattr(train, "Optimizer", make_optimizer)
    model, expected = (make_gpt(task.encoding.n_vocab, spread=1.0) for _ in range(2))
    sizes, hidden = [], model.hidden
    model.hidden = lambda idx: sizes.append(len(idx)) or hidden(idx)
    run = SimpleNamespace(cfg=cfg, fast=lambda model, training: model, steps=steps,
                          corpus=lambda n_steps, n_rows: Corpus(task, cfg, n_steps, n_rows))
    pretrain(run, model, n_tokens=3 * 5 * 40 + 199, n_rows=5)
    corpus, optimizer = Corpus(task, cfg, 3, 5), Descent(expected, distance=0.1)

    def mean_loss(idx):
        return F.cross_entropy(expected(idx[:, :-1]).transpose(1, 2), idx[:, 1:])

    assert len(logged) == len(optimizers[0].gradients) == 3 and sizes == [2, 2, 1] * 3 + [2] * 5
    for number, (found, gradient) in enumerate(zip(logged, optimizers[0].gradients), 1):
        loss = mean_loss(corpus.batch(number))
        loss.backward()
        norm = optimizer.step(1 / number).item()
        assert torch.allclose(gradient, optimizer.gradients[-1], rtol=1e-4, atol=1e-6)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5) and found["tokens"] == 5 * 40
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert ("heldout_loss" in found) == (number == 3)
    assert found["heldout_loss"] == pytest.approx(mean_loss(corpus.heldout).item(), rel=1e-5)


# The smoke run


def test_tiny_learns(tiny):
    """If some stage did not learn, the recipe would still run to its end."""
    out, _ = tiny
    log = rows(out)
    base = [row["loss"] for row in log if row["stage"] == "base"]
    assert sum(base[-5:]) / 5 < 0.5 * base[0]
    models = results(out)["models"]
    assert models["zero"]["test"]["format"] > models["base"]["test"]["format"] + 0.15
    assert models["student"]["test"]["format"] > models["student_base"]["test"]["format"] + 0.05


def test_log_has_a_row_for_every_step(tiny):
    """Every step must have a row, and the log must have every metric that the terminal shows."""
    out, stdout = tiny
    steps = {name: [row["step"] for row in rows(out) if row["stage"] == name] for name in NAMES}
    for found in steps.values():
        assert found == list(range(1, len(found) + 1))
    zero = next(row for row in rows(out) if row["stage"] == "zero")
    assert {"loss", "grad_norm", "reward", "accuracy", "format", "length", "length_wrong", "kl", "ratio",
            "clip_fraction_low", "clip_fraction_high", "entropy", "no_signal", "reflection",
            "truncated", "tokens_per_s"} <= set(zero)
    shown = dict(re.findall(r"  ([a-z_]+) ([0-9.e+-]+)", re.search("zero 1/12.*", stdout).group()))
    for key in ("loss", "reward", "accuracy", "format", "length", "entropy", "no_signal"):
        assert float(shown[key]) == pytest.approx(zero[key], rel=5e-3), key  # three digits


def test_reference_is_refreshed(tiny, tmp_path):
    """--ref_every must refresh the reference, and at the correct steps. The KL to a reference that equals the policy is
    0."""
    copy(tiny[0], tmp_path, "base.pt")
    args = ["--preset=tiny", "--threads=1", "--stage=zero", "--rl_steps=5", "--rl_minibatches=1", "--kl_coef=0.001",
            "--eval_problems=2", "--ref_every=2"]
    assert main([*args, f"--out={tmp_path}"]) == 0
    kl = [row["kl"] for row in rows(tmp_path) if row["stage"] == "zero"]
    assert [value == 0 for value in kl] == [True, False, True, False, True]
