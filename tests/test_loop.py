"""The loop that all stages share: what a step is, what is saved when, and how an interrupted run resumes."""
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import engine.loop
import engine.progress
import train
from engine.arguments import Program
from engine.command import run_command
from engine.corpus import Corpus
from engine.files import load_checkpoint
from engine.loop import Run, Stage, Step, Watch, lr_schedule
from engine.optimizer import Optimizer
from engine.settings import Task
from engine.tasks import make_task
from engine.terminal import UsageError
from grpo import Metrics
from model import GPT, GPTConfig
from tests.conftest import NAMES, QUICK, ROOT, copy, main, results, rows, weights_equal
from train import Config, next_token_loss

STEPS = 4


class Mean:
    """A running mean, which a stage may keep beside its model."""

    def __init__(self):
        self.value = 0.0

    def add(self, value):
        self.value += 0.5 * (value - self.value)
        return self.value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def train_small(run, each_step=lambda step: None):
    """A small stage. Its result depends on everything that the stage saves: the optimizer's moments, a running mean of
    the loss, an average of the weights, and the random numbers of a step. each_step(step) is called in the middle of
    each step."""
    model = run.new_model(1, 1, 8)
    optimizer, mean, average = Optimizer(model, 1e-2), Mean(), AveragedModel(model)
    for step in run.steps(STEPS, model=model, optimizer=optimizer, mean=mean, average=average):
        idx = torch.randint(50, (2, 9), generator=step.generator)
        loss = next_token_loss(model, idx).mean()
        (loss * mean.add(loss.item())).backward()
        each_step(step)
        for p, other in zip(model.parameters(), average.module.parameters()):
            p.grad += p.detach() - other + step.rng.random()
        metrics = Metrics()
        metrics.add("grad_norm", optimizer.step(step.lr_scale), 1)
        average.update_parameters(model)
        metrics.add("loss", loss.detach(), 1), metrics.add("tokens", idx.numel(), 1)
        step.log(metrics)


def program(function=train_small):
    """A program with this one stage, as a fork would write it."""
    return Program({"small": Stage(function, starts=(), settings=(Task,))}, Config, "a program", make_task, "small.py")


SMALL = ["--device=cpu", "--dtype=float32", "--compile=off", "--threads=1", "--save_every=0", "--eval_problems=2",
         "--rl_max_new_tokens=4"]


def start(out, function=train_small, *args):
    """python small.py, in this process -> exit code."""
    return run_command(program(function), [*SMALL, *args, f"--out={out}"])


def make_run(out, **settings):
    """A run without a program, for a stage that is named small."""
    cfg = Config(device="cpu", dtype="float32", compile="off", threads=1, save_every=0.0)
    cfg = dataclasses.replace(cfg, **settings)
    task = SimpleNamespace(encoding=SimpleNamespace(n_vocab=64))
    run = Run(cfg, task, out, {"config": {}, "seconds": {}, "models": {}}, program().stages)
    run.stage, run.began = "small", time.perf_counter()
    return run


def tiny_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(11, 8, n_layer=1, n_head=1, n_embd=8))


def metrics_of(**values):
    metrics = Metrics()
    for name, value in values.items():
        metrics.add(name, value, 1)
    return metrics


def content(out):
    """The files in a folder, without the lock."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("lock")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished, uninterrupted run of the small program."""
    out = tmp_path_factory.mktemp("small")
    assert start(out) == 0
    return out


def assert_equal_runs(out, other):
    """Two runs have equal weights, results and log rows, except for the seconds."""
    assert weights_equal(out / "small.pt", other / "small.pt")
    assert results(out)["models"] == results(other)["models"]
    same = [[{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")} for row in rows(path)]
            for path in (out, other)]
    assert same[0] == same[1] and not (out / "resume.pt").exists() and not (other / "resume.pt").exists()


# A step


def test_steps_are_numbered_and_the_last_one_knows(tmp_path):
    """Steps must count from 1, and only the last one must be marked as the last. Otherwise a stage would have a
    held-out loss at every step, or at none."""
    seen = []
    for step in make_run(tmp_path).steps(3, hold=0.25, model=tiny_model()):
        seen.append((step.number, step.last, step.lr_scale))
        step.log(metrics_of(loss=1.0))
    assert seen == [(number, number == 3, lr_schedule(number, 3, 0.25)) for number in (1, 2, 3)]
    assert load_checkpoint(tmp_path / "small.pt", "small")["step"] == 3


def test_a_step_is_logged_exactly_once(tmp_path):
    """A stage may forget step.log, skip it with `continue`, or call it twice. The log would then have a gap, as if the
    run had been killed, or lose one of two rows."""
    def none(step):
        pass

    def twice(step):
        step.log(metrics_of(loss=1.0))
        step.log(metrics_of(loss=1.0))

    def skip_the_second(step):
        if step.number == 2:
            return
        step.log(metrics_of(loss=1.0))

    for body, n_rows in (none, 0), (twice, 0), (skip_the_second, 1):
        with pytest.raises(AssertionError, match="step.log"):
            for step in make_run(tmp_path).steps(3, model=tiny_model()):
                body(step)
        assert len(rows(tmp_path)) == n_rows and not (tmp_path / "small.pt").exists()


def test_the_last_step_must_be_logged_too(tmp_path):
    """With `continue` in the last step, the model would be saved as if the stage were finished."""
    with pytest.raises(AssertionError, match="step.log"):
        for step in make_run(tmp_path).steps(2, model=tiny_model()):
            if step.last:
                continue
            step.log(metrics_of(loss=1.0))
    assert not (tmp_path / "small.pt").exists() and load_checkpoint(tmp_path / "resume.pt")["step"] == 1


def test_every_step_and_rank_draws_its_own(monkeypatch):
    """If two steps, stages or ranks drew the same samples, half of the work would be wasted, and nothing else would
    show it."""
    def draws(rank, name="zero", step=1, seed=0):
        monkeypatch.setattr(engine.loop, "rank", lambda: rank)
        run = Run(Config(seed=seed, device="cpu"), None, None, {}, {})
        run.stage = name
        rng, generator = run.seeded(step)
        return rng.random(), torch.rand(3, generator=generator).tolist()

    found = [draws(0), draws(1), draws(2), draws(0, step=2), draws(0, name="student"), draws(0, seed=1),
             draws(1, step=2)]
    assert len({numbers for numbers, _ in found}) == len({str(numbers) for _, numbers in found}) == len(found)
    assert draws(0) == found[0] and draws(1) == found[1]
    for seeds, (number, _) in ("0/zero/1", found[0]), ("0/zero/1/1", found[1]):  # or no figure could be reproduced
        rng = random.Random(seeds)
        rng.getrandbits(63)
        assert rng.random() == number


def test_a_step_has_the_generators_of_its_number(tmp_path):
    """If all steps drew from one generator, a resumed run would draw other numbers than an uninterrupted one."""
    run, seen = make_run(tmp_path), []
    for step in run.steps(3, model=tiny_model()):
        seen.append((step.rng.random(), torch.rand(1, generator=step.generator).item()))
        step.log(metrics_of(loss=1.0))
    expected = [run.seeded(number) for number in (1, 2, 3)]
    assert seen == [(rng.random(), torch.rand(1, generator=generator).item()) for rng, generator in expected]


def test_samples_have_random_numbers_of_their_own(tmp_path):
    """The kept samples must not draw from a step's generator, or always use the problems of the first step."""
    run = make_run(tmp_path)
    drawn = [run.seeded(0, name)[0].getrandbits(64) for name in ("", "samples small", "samples zero")]
    drawn += [run.seeded(1)[0].getrandbits(64)]
    assert len(set(drawn)) == 4


def test_problems_are_divided_evenly(monkeypatch):
    """Ranks must not silently get fewer problems than asked for."""
    def asked(n):
        step = Step(1, False, random.Random(0), torch.Generator(), 1.0)
        found = step.problems(n, lambda rng: rng.random())
        assert found == step.asked
        return found

    assert len(asked(7)) == 7
    monkeypatch.setattr(engine.loop, "world_size", lambda: 2)
    rng = random.Random(0)
    assert asked(6) == [rng.random() for _ in range(3)]
    with pytest.raises(AssertionError, match="7 problems cannot be divided evenly among 2 ranks"):
        asked(7)


def test_learning_rate_schedule():
    """A schedule that begins or ends at 0 wastes a step. The schedule must also reach the rate that was set."""
    for steps in (1, 7, 100):
        for hold in (0.0, 0.4):
            found = [lr_schedule(step, steps, hold) for step in range(1, steps + 1)]
            assert all(0 < scale <= 1 for scale in found) and max(found) > 0.9 and found[-1] == min(found[steps // 2:])


def test_a_row_holds_means_over_what_was_counted(tmp_path):
    """A mean must be over values, not over steps. A metric without values must be None, not 0, and tokens must not be
    logged as a mean."""
    for step in make_run(tmp_path).steps(1, model=tiny_model()):
        metrics = Metrics()
        metrics.add("loss", torch.tensor(6.0), 2), metrics.add("loss", 0, 1)
        metrics.add("kl", 0.0, 0), metrics.add("tokens", 100, 1), metrics.add("tokens", 50, 1)
        step.log(metrics)
    row, = rows(tmp_path)
    assert row["loss"] == 2.0 and row["kl"] is None and "tokens" not in row
    assert row["tokens_per_s"] > 0 and set(row) == {"stage", "step", "seconds", "loss", "kl", "tokens_per_s"}


# Loops that end early


def test_a_loop_that_is_left_writes_nothing(tmp_path, capfd):
    """After `break`, a half-trained model must not count as finished, and the run must not silently begin the next
    stage."""
    saved = {}

    def leave(run):
        def each_step(step):
            if step.number == 3:
                saved.update(content(run.out))
                raise StopIteration
        try:
            train_small(run, each_step)
        except StopIteration:
            pass

    def leave_by_break(run):
        for step in run.steps(STEPS, model=tiny_model()):
            if step.number == 3:
                saved.update(content(run.out))
                break
            step.log(metrics_of(loss=1.0))

    for name, function in ("caught", leave), ("break", leave_by_break):
        out = tmp_path / name
        saved.clear()
        assert start(out, function) == 2
        line = capfd.readouterr().err
        assert line.count("\n") == 1 and line.startswith("small.py: small ended before the last step"), line
        assert str(out / "small.pt") in line
        assert content(out) == saved and not (out / "small.pt").exists()
        assert load_checkpoint(out / "resume.pt")["step"] == 2 == len(rows(out))


def test_a_stage_that_trains_nothing(tmp_path, capfd):
    """A stage that returns without a loop over run.steps must not end in a traceback from its evaluation."""
    assert start(tmp_path, lambda run: None) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "small ended" in line


def test_an_exception_writes_nothing(tmp_path, small):
    """A step that fails half-way must not be saved, and must not damage the files that were saved before it."""
    saved = {}

    def fail(step):
        if step.number == 3:
            saved.update(content(tmp_path))
            raise ZeroDivisionError("in the middle of step 3")

    with pytest.raises(ZeroDivisionError):
        start(tmp_path, lambda run: train_small(run, fail))
    assert content(tmp_path) == saved and load_checkpoint(tmp_path / "resume.pt")["step"] == 2
    assert start(tmp_path) == 0
    assert_equal_runs(tmp_path, small)


def test_a_closed_generator_writes_nothing(tmp_path):
    """Python raises GeneratorExit in a generator whose loop has ended early. The generator must not treat this as the
    end of a step."""
    steps = make_run(tmp_path).steps(3, model=tiny_model())
    next(steps).log(metrics_of(loss=1.0))
    next(steps).log(metrics_of(loss=1.0))
    before = content(tmp_path)
    steps.close()
    assert content(tmp_path) == before and len(rows(tmp_path)) == 1
    with pytest.raises(StopIteration):
        next(steps)
    assert content(tmp_path) == before


def test_no_steps_save_the_model(tmp_path):
    """--init without pretraining must save the model unchanged, and must not write a corpus that nobody reads."""
    class NoCorpus:
        def make_corpus(self, *args):
            raise AssertionError("a corpus for nothing")

    run, model = make_run(tmp_path), tiny_model()
    run.task = NoCorpus()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train.pretrain(run, model, 0, 4)
    saved = load_checkpoint(tmp_path / "small.pt", "small")
    assert saved["step"] == 0 and all(torch.equal(saved["model"][key], value) for key, value in before.items())
    assert rows(tmp_path) == [] and set(content(tmp_path)) == {"small.pt", "log.jsonl"}
    with pytest.raises(AssertionError, match="for nothing"):
        Corpus(run.task, run.cfg, 1, 4).batch(1)


# Interrupted runs


INTERRUPTED = "\nsmall.py: interrupted; repeat the command to resume from the last checkpoint\n"


def test_ctrl_c_in_a_step(tmp_path, small, capfd):
    """Ctrl-C must not end in a traceback or save half a step. Everything that a stage keeps (a running mean, an average
    of the weights) must be restored, so that a resumed run ends like an uninterrupted one."""
    for number in 1, 3:
        out = tmp_path / f"{number}"

        def interrupt(step):
            if step.number == number:
                raise KeyboardInterrupt

        assert start(out, lambda run: train_small(run, interrupt)) == 130
        assert capfd.readouterr().err == INTERRUPTED
        if number > 1:
            assert load_checkpoint(out / "resume.pt")["step"] == number - 1 == len(rows(out))
        assert start(out) == 0
        assert_equal_runs(out, small)


@pytest.mark.parametrize("part", [GPT, Optimizer, Mean, AveragedModel])
def test_every_part_matters(tmp_path, monkeypatch, part):
    """If the weights did not depend on a part, the test above would pass even if that part were not saved."""
    def interrupt(step):
        if step.number == 3:
            raise KeyboardInterrupt

    for name in "whole", "one lost":
        (tmp_path / name).mkdir()
        with pytest.raises(KeyboardInterrupt):
            train_small(make_run(tmp_path / name), interrupt)
    train_small(make_run(tmp_path / "whole"))
    monkeypatch.setattr(part, "load_state_dict", lambda self, state: None)
    train_small(make_run(tmp_path / "one lost"))
    assert not weights_equal(tmp_path / "whole" / "small.pt", tmp_path / "one lost" / "small.pt")


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


def moments_of(function, moments, last):
    """Wrap a function so that each call counts as two moments, one before the call and one after it. Killed is raised
    at moment number `last`."""
    def call(*args, **kwargs):
        for before in (True, False):
            moments.append(function)
            if len(moments) == last:
                raise Killed
            if before:
                result = function(*args, **kwargs)
        return result
    return call


def killed_at(last, out, monkeypatch):
    """Train the small stage, and kill it at moment number `last` of its writing -> was that moment reached?"""
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        moments = []
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, moments_of(getattr(os, name), moments, last))
        train_small(make_run(out))
        return False
    return True


def test_a_run_may_be_killed_while_it_writes(tmp_path, monkeypatch):
    """Between any two writes, the files do not fit together. A resumed run must not repeat or skip a step, lose a row,
    tear a checkpoint, or use files that a finished stage has left."""
    (tmp_path / "0").mkdir()
    train_small(make_run(tmp_path / "0"))
    for last in range(1, 1000):
        out = tmp_path / f"{last}"
        out.mkdir()
        if not killed_at(last, out, monkeypatch):
            break
        if not (out / "small.pt").exists():
            train_small(make_run(out))
            assert not (out / "resume.pt").exists()
        assert weights_equal(out / "small.pt", tmp_path / "0" / "small.pt")
        assert [(row["step"], row["loss"]) for row in rows(out)] == [
            (row["step"], row["loss"]) for row in rows(tmp_path / "0")]
    # STEPS + 2 writes (resume.pt at each step, log.jsonl, small.pt), each an fsync and a rename; then the removal of
    # resume.pt
    assert last > 2 * (2 * (STEPS + 2) + 1)


def test_what_another_stage_left_is_not_gone_on_from(tmp_path, small):
    """A run that is killed just after a stage has finished leaves that stage's resume.pt. The next stage must not
    resume from this file, in the middle and with the wrong weights."""
    left = load_checkpoint(small / "small.pt") | {"stage": "other", "step": 2, "parts": {}}
    torch.save(left, tmp_path / "resume.pt")
    assert start(tmp_path) == 0
    assert_equal_runs(tmp_path, small)


@pytest.mark.parametrize("name", ["resume", "small"])
def test_ctrl_c_while_saving(tmp_path, small, monkeypatch, capfd, name):
    """Ctrl-C while a checkpoint is being written must not leave half a file in place of the previous checkpoint."""
    save, before = torch.save, {}

    def interrupted(content_, file):
        if file.name.endswith(f"{name}.pt.tmp") and content_["step"] == (3 if name == "resume" else STEPS):
            file.write(b"half")
            before.update(content(tmp_path))
            raise KeyboardInterrupt
        save(content_, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        assert start(tmp_path) == 130
    assert capfd.readouterr().err == INTERRUPTED
    whole = {path: data for path, data in content(tmp_path).items() if not path.endswith(".tmp")}
    assert whole == {path: data for path, data in before.items() if not path.endswith(".tmp")}
    assert load_checkpoint(tmp_path / "resume.pt")["step"] == (2 if name == "resume" else STEPS)
    assert not (tmp_path / "small.pt").exists()
    assert start(tmp_path) == 0
    assert_equal_runs(tmp_path, small)
    assert not list(tmp_path.glob("*.tmp"))


def test_killed_run_goes_on(quick, tmp_path, capfd):
    """SIGKILL or Ctrl-C at a random moment of every stage must not lose the optimizer's state, double rows of the log,
    or tear a file, and every random generator must be seeded. The run must end like an uninterrupted one."""
    assert not weights_equal(quick / "base.pt", quick / "zero.pt"), "RL must have had something to learn"
    lengths = {name: sum(row["stage"] == name for row in rows(quick)) for name in NAMES}
    log, printed = tmp_path / "log.jsonl", ""
    for stage, steps in lengths.items():
        # Tests that a shell starts in the background ignore Ctrl-C, and the run would inherit this.
        process = subprocess.Popen([sys.executable, "train.py", *QUICK, f"--out={tmp_path}"], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        reached = f'{{"stage": "{stage}", "step": {random.randint(2, steps // 2)},'  # by then, step 1 is saved
        while not (log.exists() and reached in log.read_text()):
            assert process.poll() is None, f"the run ended before it could be killed: {process.stderr.read()}"
            time.sleep(0.002)
        time.sleep(random.random() * 0.005)
        process.send_signal(signal.SIGINT if stage == "student_base" else signal.SIGKILL)
        stdout, stderr = process.communicate()
        printed += stdout
        if stage == "student_base":
            assert process.returncode == 130, stderr
            assert stderr == "\ntrain.py: interrupted; repeat the command to resume from the last checkpoint\n"
    capfd.readouterr()
    assert main([*QUICK, f"--out={tmp_path}"]) == 0
    printed += capfd.readouterr().out
    went_on = dict(re.findall("^([a-z_]+): resuming after step ([0-9]+)", printed, re.MULTILINE))
    assert list(went_on) == NAMES and all(int(step) > 0 for step in went_on.values())
    for name in NAMES:
        assert weights_equal(quick / f"{name}.pt", tmp_path / f"{name}.pt"), name
    assert results(quick)["models"] == results(tmp_path)["models"]
    assert [(r["stage"], r["step"]) for r in rows(quick)] == [(r["stage"], r["step"]) for r in rows(tmp_path)]


# Values that are not finite


def test_not_a_number_stops_the_run(tmp_path, refused):
    """A run must not continue for hours on NaN. Here a learning rate that is far too high causes the NaN."""
    line = r"at step (\d+); the last good checkpoint is \S+resume.pt, step (\d+)"
    step, saved = re.search(line, refused(*QUICK, "--base_adam_lr=1e30", f"--out={tmp_path}")).groups()
    assert int(saved) == int(step) - 1 == torch.load(tmp_path / "resume.pt", weights_only=True)["step"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch, value):
    """A broken model must not replace the last good checkpoint or the best model, and its answers and its row must not
    be kept."""
    kept = []
    monkeypatch.setattr(engine.loop, "keep_samples", lambda run, step, *args: kept.append(step))
    monkeypatch.setattr(engine.loop, "heldout_accuracy", lambda *args: 1.0)
    run = make_run(tmp_path, eval_every=1)
    line = "small: loss is (nan|inf) at step {}; the last good checkpoint is {}"
    with pytest.raises(UsageError, match=line.format(1, "the stage before's")):
        for step in run.steps(3, watch=Watch(None, None), model=tiny_model()):
            step.log(metrics_of(loss=value))
    assert kept == [0] and set(content(tmp_path)) == {"log.jsonl"} and rows(tmp_path) == []
    with pytest.raises(UsageError, match=line.format(3, ".*resume.pt, step 2")):
        for step in run.steps(3, watch=Watch(None, None), model=tiny_model()):
            step.log(metrics_of(loss=value if step.last else 1.0, nothing=2.0))
    assert kept == [0, 0, 1, 2] and len(rows(tmp_path)) == 2 and not (tmp_path / "small.pt").exists()
    assert [load_checkpoint(tmp_path / f"{name}.pt")["step"] for name in ("small_best", "resume")] == [1, 2]
    with pytest.raises(UsageError, match=line.format(3, ".*resume.pt, step 2")):  # resumed from step 2
        for step in run.steps(3, model=tiny_model()):
            step.log(metrics_of(loss=value))


# When checkpoints are saved


def test_saving_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    """Saving the checkpoint of a large model takes seconds. Saving it every save_every seconds would take most of the
    run."""
    now, saved = [0.0], []

    def save(path, content):
        now[0] += 2.0
        saved.append(path.name)

    monkeypatch.setattr(engine.progress, "save_checkpoint", save)
    monkeypatch.setattr(engine.progress.time, "perf_counter", lambda: now[0])
    for step in make_run(tmp_path, save_every=3.0).steps(200, model=tiny_model()):
        now[0] += 1.0
        step.log(metrics_of(loss=0.0, tokens=1))
    assert saved == ["resume.pt"] * 6 + ["small.pt"]  # after 3 steps, and then every 38 steps


def best_of(out, accuracies, monkeypatch, stop_after=None):
    """A stage of 5 steps. Its quick evaluations, after steps 2, 4 and 5, return these accuracies -> [(step, accuracy)]
    from the log."""
    answers = iter(accuracies)
    monkeypatch.setattr(engine.loop, "keep_samples", lambda *args: None)
    monkeypatch.setattr(engine.loop, "heldout_accuracy", lambda *args: next(answers))
    model = tiny_model()
    for step in make_run(out, eval_every=2).steps(5, watch=Watch(None, None), model=model):
        with torch.no_grad():
            model.norm.weight.fill_(step.number)
        if step.number == stop_after:
            break
        step.log(metrics_of(loss=1.0))
    return [(row["step"], row["heldout_accuracy"]) for row in rows(out) if "heldout_accuracy" in row]


def test_the_best_model_is_kept(tmp_path, monkeypatch):
    """RL may get worse again, so the best model must be kept beside the last one. A resumed run must not take its first
    evaluation for the best, and a stage that starts again must not keep the best model of an earlier attempt."""
    path = tmp_path / "small_best.pt"
    assert best_of(tmp_path, [0.5, 0.25, 0.25], monkeypatch) == [(2, 0.5), (4, 0.25), (5, 0.25)]
    best, last = (load_checkpoint(tmp_path / f"{name}.pt", "small") for name in ("small_best", "small"))
    assert best["step"] == 2 and last["step"] == 5 and best["model"]["norm.weight"][0] == 2
    (tmp_path / "small.pt").unlink()
    assert best_of(tmp_path, [0.0], monkeypatch, stop_after=3) == [(2, 0.0)]
    assert not path.exists(), "the best model of an earlier attempt, and an accuracy of 0 is nobody's best"
    # a run that is resumed after step 2 reads the accuracy of that step from the log
    (tmp_path / "resume.pt").unlink()
    assert best_of(tmp_path, [0.5], monkeypatch, stop_after=3) == [(2, 0.5)]
    assert best_of(tmp_path, [0.25], monkeypatch, stop_after=5) == [(2, 0.5), (4, 0.25)]
    assert load_checkpoint(path)["step"] == 2
    assert best_of(tmp_path, [0.75], monkeypatch) == [(2, 0.5), (4, 0.25), (5, 0.75)]
    assert load_checkpoint(path)["step"] == 5 and load_checkpoint(path)["model"]["norm.weight"][0] == 5


def test_looking_changes_nothing(quick, tmp_path):
    """If --eval_every or the kept samples drew from the random numbers of a step, they would change the result of a
    run."""
    copy(quick, tmp_path, "base.pt")
    assert main([*QUICK, "--eval_every=2", "--stage=zero", f"--out={tmp_path}"]) == 0
    assert [row["step"] for row in rows(tmp_path) if "heldout_accuracy" in row] == [2, 4, 5]
    assert weights_equal(quick / "zero.pt", tmp_path / "zero.pt")


def test_only_rl_is_evaluated_on_the_way(tmp_path, monkeypatch):
    """--eval_every counts steps of RL, so a student must not be evaluated too. With a pretrained model this would take
    minutes, and a student_best.pt that nobody asked for would take space on the disk."""
    monkeypatch.setattr(engine.loop, "keep_samples", lambda *args: None)
    monkeypatch.setattr(engine.loop, "heldout_accuracy", lambda *args: 0.5)
    for step in make_run(tmp_path, eval_every=1).steps(2, watch=Watch(None, None, tiny_model()), model=tiny_model()):
        step.log(metrics_of(loss=1.0))
    assert not any("heldout_accuracy" in row for row in rows(tmp_path)) and not (tmp_path / "small_best.pt").exists()


def test_the_heldout_loss_is_read_at_the_last_step(quick):
    """A base of fewer than 100 steps must have a held-out loss too. Computing this loss at every step would take most
    of the time."""
    for name in ("base", "student_base"):
        logged = [row for row in rows(quick) if row["stage"] == name]
        assert [row["step"] for row in logged if "heldout_loss" in row] == [logged[-1]["step"]]
        assert 0 < logged[-1]["heldout_loss"] < logged[0]["loss"]


def test_what_is_shown(tmp_path, capsys):
    """A line for each of thousands of steps would make the terminal unreadable. The last step must have a line."""
    for step in make_run(tmp_path).steps(45, model=tiny_model()):
        step.log(metrics_of(loss=1.0))
    shown = re.findall(r"^small (\d+)/45  loss 1  \d+ s to go$", capsys.readouterr().out, re.MULTILINE)
    assert shown == ["1", "20", "40", "45"]
    rollout = SimpleNamespace(texts=["an  answer\nof two lines"], scores=[{"reward": 2.0}])
    run = make_run(tmp_path)
    for step in run.steps(21, model=tiny_model()):
        step.problems(1, lambda rng: SimpleNamespace(question="1+1"))
        step.log(metrics_of(reward=0.5), rollout)
    printed = capsys.readouterr().out
    assert printed.count("    1+1  ->  an answer of two lines   reward 2.0\n") == 4  # steps 1, 5, 10 and 20
    assert len(re.findall(r"^small \d+/21  reward 0.5 ", printed, re.MULTILINE)) == 21
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["reward"] == 0.5
    for step in make_run(tmp_path).steps(1, model=tiny_model()):
        step.log(metrics_of(reward=0.5), rollout)  # these problems do not come from step.problems
    assert "->" not in capsys.readouterr().out


def test_the_time_that_is_left(tmp_path, capsys, monkeypatch):
    """In a resumed run, the seconds to go would be too few if the steps before counted as done in no time. The stage's
    seconds must not start at 0 again."""
    now = [100.0]
    monkeypatch.setattr(engine.progress.time, "perf_counter", lambda: now[0])
    for last in (2, 4):
        run = make_run(tmp_path)
        for step in run.steps(4, model=tiny_model()):
            now[0] += 10.0
            if step.number > last:
                break
            step.log(metrics_of(reward=1.0, tokens=5))
    shown = re.findall(r"^small (\d)/4  reward 1  (\d+) s to go$", capsys.readouterr().out, re.MULTILINE)
    assert shown == [("1", "30"), ("2", "20"), ("3", "10"), ("4", "0")]
    assert [(row["seconds"], row["tokens_per_s"]) for row in rows(tmp_path)] == [(n, 0.5) for n in (10, 20, 30, 40)]
    assert load_checkpoint(tmp_path / "small.pt")["seconds"] == 40
