"""Several ranks: together they make the update of one process, and they end together."""
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import distill
import grpo
import train
from data.arithmetic import Arithmetic, parse
from engine import evaluation
from engine.corpus import Corpus
from engine.files import lock
from engine.loop import Step
from engine.optimizer import Optimizer
from engine.parallel import init, rank, sums_over_ranks, world_size
from engine.progress import Progress
from engine.terminal import UsageError
from grpo import Metrics, Rollout, group_advantages
from model import GPT, GPTConfig
from tests.conftest import NAMES, QUICK, ROOT, copy, main, results, rows
from train import Config

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
TASK = Arithmetic()
P, G = 6, 3  # prompts, and completions of each


# Two real processes (this one and a child) against a single process


def make_gpt(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(TASK.encoding.n_vocab, 64, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # so that policy, reference and teacher differ
    return model


class Recording(Optimizer):
    """The real optimizer. It also keeps the gradient of each update as its parts see it: that of all ranks, clipped."""

    def __init__(self, model, adam_lr, muon_lr=0.0, clip=1.0):
        super().__init__(model, adam_lr, muon_lr)
        self.clip, self.gradients = clip, []
        self.record()

    def record(self):
        self.parts[0].register_step_pre_hook(
            lambda *_: self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters])))

    def step(self, lr_scale=1.0, share=1.0, has_gradient=True):
        return super().step(lr_scale, share, has_gradient, self.clip)


class Descent(Recording):
    """Plain gradient descent without clipping, so that the weights show the gradients."""

    def __init__(self, model, *rates):
        super().__init__(model, 0.1, clip=1e9)
        self.parts = [torch.optim.SGD(self.parameters, lr=0.1)]
        self.record()


def adamw(model, *rates):
    return Recording(model, 1e-2)


def muon(model, *rates):
    return Recording(model, 1e-2, muon_lr=0.02)


def result(metrics: Metrics, model: GPT, optimizer: Recording) -> tuple:
    """The result of a case: the row in the log, the gradients of the updates, and the weights after them."""
    step = Step(1, True, None, None, 1.0)
    step.log(metrics)
    progress = Progress(SimpleNamespace(stage="zero"), 1, {})
    progress.begin_step()
    row = progress.measure(step)
    del row["tokens_per_s"]
    return row | of_all_ranks(tokens=metrics.sums["tokens"]), optimizer.gradients, model.state_dict()


def of_all_ranks(**numbers: float) -> dict[str, float]:
    """The sums of these numbers over all ranks. They show that the ranks divide the work and do not repeat it."""
    return {name: sums_over_ranks({name: (number, 1)})[name][0] for name, number in numbers.items()}


def make_rollout(samples: int) -> Rollout:
    """A rollout whose two halves differ in their numbers of tokens, their numbers of correct answers, and their
    rewards."""
    problems = [parse(f"{i + 1}+{10 ** (i % 3)}") for i in range(P * G // samples)]
    rollout = grpo.sample_rollout(make_gpt(seed=1), problems, lambda text, problem: {}, TASK, samples=samples,
                                  max_new_tokens=20, generator=torch.Generator().manual_seed(2))
    for i in range(P * G):
        length = 20 if i < 3 else 2 + 7 * i % 11
        for column in (rollout.completions, rollout.sampler_logp):
            column[i] = column[i][:length]
        reward = 0.0 if i // samples == 1 else float(i * i % 5)
        rollout.scores[i] = {"reward": reward, "accuracy": float(i % 4 == 0), "format": 1.0}
        rollout.truncated[i] = length == 20
    return rollout


def this_ranks_part() -> slice:
    """The rows of this rank's half of the prompts."""
    n = P * G // world_size()
    return slice(rank() * n, (rank() + 1) * n)


def this_ranks(rollout: Rollout) -> Rollout:
    return Rollout(*(getattr(rollout, field.name)[this_ranks_part()] for field in dataclasses.fields(Rollout)))


def grpo_case(kl_coef: float, normalize: str, live: int = P * G, rest: float = 0.0, make_optimizer=Descent) -> tuple:
    """grpo_update on a given rollout. The rows after the first `live` ones have the advantage `rest`, and so has every
    other row whose advantage is 0."""
    model, rollout = make_gpt(seed=1), make_rollout(samples=G)
    adv = group_advantages(rollout.column("reward").view(P, G)).flatten()
    adv = adv.where(torch.arange(P * G) < live, 0.0)
    adv = adv.where(adv != 0, rest)
    cfg = Config(kl_coef=kl_coef, normalize=normalize, rl_samples=G, rl_minibatches=1, rl_max_new_tokens=20,
                 micro_batch=70)
    optimizer = make_optimizer(model)
    metrics = grpo.grpo_update(model, make_gpt(seed=3), optimizer, this_ranks(rollout), adv[this_ranks_part()], cfg,
                               torch.Generator().manual_seed(rank()))
    return result(metrics, model, optimizer)


def distill_case(right: int = P * G, make_optimizer=Descent, **settings) -> tuple:
    """distill_step on given samples. None after the first `right` ones is accepted."""
    student, rollout = make_gpt(seed=1), make_rollout(samples=1)
    for score in rollout.scores[right:]:
        score["accuracy"] = 0.0
    cfg = Config(distill_minibatches=1, distill_epochs=2, rl_max_new_tokens=20, micro_batch=70, **settings)
    optimizer = make_optimizer(student)
    with mock.patch.object(distill, "sample_rollout", lambda *args, **kwargs: this_ranks(rollout)):
        metrics = distill.distill_step(student, make_gpt(seed=3), optimizer, [], None, TASK, cfg,
                                       torch.Generator().manual_seed(rank()))
    return result(metrics, student, optimizer)


def pretraining_case(n_rows: int, make_optimizer=Descent) -> tuple:
    """Three updates of train.pretrain. If n_rows is odd, the ranks have different numbers of rows."""
    model, optimizers, total = make_gpt(seed=1), [], Metrics()
    cfg = Config(device="cpu", block_size=40, micro_batch=80)

    def steps(n_steps, model, optimizer):
        for number in range(1, n_steps + 1):
            step = Step(number, number == n_steps, random.Random(0), None, 1.0)
            yield step
            for name, value in step.metrics.sums.items():
                total.add(name, value, step.metrics.counts[name])

    def recorded(*args):
        optimizers.append(make_optimizer(*args))
        return optimizers[0]

    run = SimpleNamespace(cfg=cfg, steps=steps, fast=lambda model, training: model,
                          corpus=lambda n_steps, n_rows: Corpus(TASK, cfg, n_steps, n_rows))
    with mock.patch.object(train, "Optimizer", recorded):
        train.pretrain(run, model, n_tokens=3 * n_rows * 40, n_rows=n_rows)
    return result(total, model, optimizers[0])


def no_gradient_case() -> tuple:
    """Three updates of AdamW and Muon. In the second one, no rank has a gradient."""
    model = make_gpt(seed=1)
    optimizer, metrics = muon(model), Metrics()

    def state() -> list:
        kept = [value for part in optimizer.parts for values in part.state.values() for value in values.values()]
        return [value.clone() for value in (*model.parameters(), *kept)]

    for number in (1, 2, 3):
        before = state()
        if number != 2:
            idx = torch.arange(64).view(2, 32) + 5 * number
            train.next_token_loss(model, idx[rank()::world_size()]).mean().backward()
        norm = optimizer.step(share=2 // world_size(), has_gradient=number != 2)
        metrics.add(f"norm {number}", norm, 1)
        if number == 2:
            assert all(map(torch.equal, before, state())) and norm == 0, "momentum has faded or moved the weights"
    assert {values["step"].item() for values in optimizer.parts[0].state.values()} == {2.0}
    return result(metrics, model, optimizer)


def evaluation_case() -> tuple:
    """evaluate() on completions that depend only on their problem."""
    def sample(model, problems, reward_fn, task, samples, max_new_tokens, generator):
        texts = []
        for problem in problems:
            rng = random.Random(problem.question)
            texts += [f"<think>wait{'.' * rng.randint(0, 1)}</think><answer>{rng.randint(1, 4)}</answer>"
                      + "?" * rng.randint(0, 1) for _ in range(samples)]
        scores = [reward_fn(text, problems[i // samples]) for i, text in enumerate(texts)]
        return SimpleNamespace(texts=texts, completions=texts, scores=scores)

    with mock.patch.object(evaluation, "sample_rollout", sample):
        found = evaluation.evaluate(None, [parse(f"{i}-1") for i in (2, 3, 5, 6, 9)], TASK, max_new_tokens=9,
                                    generator=None)
    return found, [], {}


def quick_evaluation_case(n_problems: int) -> tuple:
    """heldout_accuracy() of a policy whose answer is correct if the length of the question is a multiple of 3."""
    asked = []

    def sample(model, problems, reward_fn, task, samples, max_new_tokens, generator):
        asked.extend(problems)
        right = [float(len(problem.question) % 3 == 0) for problem in problems for _ in range(samples)]
        return SimpleNamespace(column=lambda name: torch.tensor(right))

    with mock.patch.object(evaluation, "sample_rollout", sample):
        found = evaluation.heldout_accuracy(None, TASK, Config(eval_problems=n_problems), None)
    return {"heldout_accuracy": found} | of_all_ranks(asked=len(asked)), [], {}


CASES = {
    "grpo, token": lambda: grpo_case(0.0, "token"),
    "grpo, token, KL": lambda: grpo_case(0.1, "token"),
    "grpo, sequence": lambda: grpo_case(0.0, "sequence"),
    "grpo, constant, KL": lambda: grpo_case(0.1, "constant"),
    "grpo, no live row on rank 1": lambda: grpo_case(0.0, "token", live=P * G // 2),
    "grpo, no live row on rank 1, KL": lambda: grpo_case(0.1, "sequence", live=P * G // 2),
    "grpo, no signal on rank 1, KL on all": lambda: grpo_case(0.1, "sequence", live=P * G // 2, rest=1e-30),
    "grpo, no live row": lambda: grpo_case(0.0, "token", live=0),
    "grpo, no live row, AdamW": lambda: grpo_case(0.1, "token", live=0, make_optimizer=adamw),
    "grpo, AdamW": lambda: grpo_case(100.0, "token", make_optimizer=adamw),
    "grpo, no live row on rank 1, AdamW": lambda: grpo_case(100.0, "sequence", live=P * G // 2, make_optimizer=adamw),
    "distill": lambda: distill_case(),
    "distill, sft": lambda: distill_case(divergence="sft"),
    "distill, nothing accepted on rank 1": lambda: distill_case(right=P * G // 2, divergence="reverse"),
    "distill, nothing accepted": lambda: distill_case(right=0),
    "distill, on policy": lambda: distill_case(right=0, on_policy=True, divergence="jsd"),
    "distill, Muon": lambda: distill_case(make_optimizer=muon),
    "distill, nothing accepted on rank 1, Muon": lambda: distill_case(right=P * G // 2, make_optimizer=muon),
    "distill, nothing accepted, Muon": lambda: distill_case(right=0, make_optimizer=muon),
    "pretraining": lambda: pretraining_case(4),
    "pretraining, odd batch": lambda: pretraining_case(5),
    "pretraining, odd batch, Muon": lambda: pretraining_case(5, make_optimizer=muon),
    "nothing in the second of three updates": no_gradient_case,
    "evaluation": evaluation_case,
    "quick evaluation": lambda: quick_evaluation_case(31),
    "quick evaluation of one problem": lambda: quick_evaluation_case(1),
}

NOTHING_TO_LEARN = ("grpo, no live row", "grpo, no live row, AdamW", "distill, nothing accepted",
                    "distill, nothing accepted, Muon")


def metrics_by_rank() -> dict:
    """Sums and counts. Some of them exist on one rank only."""
    mine = {"both": (6.0 + rank(), 2), "none": (0.0, 0), f"rank {rank()} alone": (torch.tensor(3.0), torch.tensor(4))}
    return sums_over_ranks(mine)


def run_cases_as(rank: int, path: str) -> dict:
    """Join the other rank through a file, run all cases, and leave the group."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    try:
        return {name: case() for name, case in CASES.items()} | {"metrics": metrics_by_rank()}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The results of each of two ranks, by case."""
    where = tmp_path_factory.mktemp("ranks")
    child = subprocess.Popen([sys.executable, "-m", "tests.test_parallel", str(where)], cwd=ROOT, text=True,
                             stderr=subprocess.PIPE)
    try:
        found = run_cases_as(0, where / "store")
        assert child.wait(timeout=60) == 0, child.stderr.read()
    finally:
        child.kill()
        child.communicate()
    return found, torch.load(where / "rank1.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_update_of_one_process(of_two, case):
    """Gradients and losses must be averaged with the ranks' shares as weights, a denominator must count the rows of all
    ranks, and the clipped norm must be that of all ranks. A rank without a live row must not wait forever or leave the
    others waiting, and the ranks' weights must stay equal."""
    (metrics, gradients, weights), (metrics_1, gradients_1, weights_1) = (found[case] for found in of_two)
    assert metrics == metrics_1 and all(torch.equal(weights[key], weights_1[key]) for key in weights)
    assert len(gradients) == len(gradients_1) and all(map(torch.equal, gradients, gradients_1))
    assert world_size() == 1
    expected_metrics, expected_gradients, expected = CASES[case]()
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        assert metrics[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), key
    assert len(gradients) == len(expected_gradients)
    for i, (gradient, of_one) in enumerate(zip(gradients, expected_gradients)):
        tolerance = 1e-4 if i else 1e-5  # after the first update the weights differ by rounding
        assert (gradient - of_one).norm() <= tolerance * of_one.norm(), i
    before, real = make_gpt(seed=1).state_dict(), "AdamW" in case or "Muon" in case
    for key in weights:
        # AdamW divides by the gradient's size, so even a gradient as small as the rounding moves a weight
        assert torch.allclose(weights[key], expected[key], rtol=1e-4, atol=1e-4 if real else 1e-6), key
        assert torch.equal(before[key], expected[key]) != (case not in NOTHING_TO_LEARN), key


@pytest.mark.parametrize("case", ("grpo, AdamW", "grpo, no live row on rank 1, AdamW", "pretraining, odd batch, Muon"))
def test_the_norm_of_all_ranks_is_clipped(of_two, case):
    """If each rank clipped its own gradient, the clipped norm would not be that of the whole gradient. The gradient
    must be clipped at all."""
    metrics, gradients, _ = of_two[0][case]
    assert metrics["grad_norm"] > 5 and all(gradient.norm() == pytest.approx(1, rel=1e-4) for gradient in gradients)


def test_metrics_are_added_up_by_name(of_two):
    """A metric that one rank lacks must not shift all others, or make a rank wait forever. A single process must get
    its own sums."""
    expected = {"both": (13.0, 4), "none": (0, 0), "rank 0 alone": (3, 4), "rank 1 alone": (3, 4)}
    assert of_two[0]["metrics"] == of_two[1]["metrics"] == expected
    assert metrics_by_rank() == {"both": (6, 2), "none": (0, 0), "rank 0 alone": (3, 4)}


def test_a_mean_over_nothing_is_none():
    """A metric must be the mean over all values, not a mean of means. Without any value it must be None."""
    metrics = Metrics()
    metrics.add("a", torch.tensor(6.0), 2), metrics.add("a", 0, 1), metrics.add("none", 0, 0)
    row, *_ = result(metrics, make_gpt(seed=1), SimpleNamespace(gradients=[]))
    assert row == {"a": 2.0, "none": None, "tokens": 0.0}


def test_each_rank_needs_a_row(monkeypatch):
    """A rank without a row of a batch has no loss, so its mean would be NaN."""
    monkeypatch.setattr("engine.corpus.world_size", lambda: 2)
    with pytest.raises(AssertionError, match="each rank needs at least one row"):
        Corpus(TASK, Config(device="cpu"), n_steps=1, n_rows=1)


# Whole runs


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A run of two ranks through all stages, on a terminal that knows ASCII only -> its folder, and what it printed."""
    out = tmp_path_factory.mktemp("by_two")
    done = subprocess.run([*TORCHRUN, *QUICK, "--save_every=9", "--distill_steps=2", f"--out={out}"], cwd=ROOT,
                          capture_output=True, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr.decode()
    return out, done.stdout.decode("ascii")


def test_two_ranks_pass_through_every_stage(quick, by_two):
    """No log row, printed line or evaluated answer may appear twice, pretraining must read the rows that one process
    reads, and the work of the second rank must not be lost."""
    out, printed = by_two
    assert list(results(out)["models"]) == NAMES
    steps = {name: [row["step"] for row in rows(out) if row["stage"] == name] for name in NAMES}
    assert steps["base"] == list(range(1, 40000 // (4 * 128) + 1)) and steps["zero"] == [1, 2, 3, 4, 5]
    assert steps["student_base"] == list(range(1, 40000 // (16 * 128) + 1)) and steps["student"] == [1, 2]
    for name in NAMES:
        assert printed.count(f"\n{name} on test: ") == 1 and printed.count(f"\n{name}: stage ") == 1
    assert "2 x 1 threads" in printed and "zero" in printed
    for name in ("base", "student_base"):
        of_one, of_two = ([row for row in rows(path) if row["stage"] == name] for path in (quick, out))
        for one, two in zip(of_one, of_two):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3), (name, one["step"])
        assert two["heldout_loss"] == pytest.approx(one["heldout_loss"], rel=1e-3)
    for row in rows(out):
        if row["stage"] == "zero":  # 128 completions, each with a score
            assert (row["format"] * 128).is_integer() and 1 <= row["length"] <= 40
            assert row["no_signal"] == 1 or row["grad_norm"] > 0
        if row["stage"] == "student":
            assert row["accepted"] == 1 and (row["length"] * 64).is_integer()
    for found in results(out)["models"].values():
        assert all((found[kind]["format"] * 48).is_integer() and found[kind]["n_problems"] == 3
                   for kind in ("test", "hard"))
    assert not list(out.glob("*.tmp")) and not (out / "resume.pt").exists()


def test_ranks_end_without_torchrun_and_one_process_goes_on(by_two, tmp_path, capfd):
    """After SIGKILL, torchrun cannot end its ranks. They must not continue to train and hold the lock. One process must
    be able to resume a run that two ranks began."""
    copy(by_two[0], tmp_path, "base.pt")
    settings = [*QUICK, "--rl_prompts=2", "--rl_samples=2", "--rl_max_new_tokens=8", "--rl_steps=200", "--stage=zero"]
    process = subprocess.Popen([*TORCHRUN, *settings, f"--out={tmp_path}"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    log, printed = tmp_path / "log.jsonl", []
    while not log.exists() or not any(row["stage"] == "zero" and row["step"] >= 3 for row in rows(tmp_path)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)  # returns when all ranks, which hold the pipe, have ended
    assert "torchrun has ended" in printed
    deadline = time.monotonic() + 120
    while True:
        try:
            with lock(tmp_path):
                break
        except UsageError:
            assert time.monotonic() < deadline, "a rank lives on, and holds the lock"
            time.sleep(0.1)
    begun = [row["step"] for row in rows(tmp_path) if row["stage"] == "zero"]
    assert begun == list(range(1, len(begun) + 1)) and len(begun) < 200 and not (tmp_path / "zero.pt").exists()

    capfd.readouterr()
    assert main([*settings, "--save_every=9", f"--out={tmp_path}"]) == 0
    assert "zero: resuming after step " in capfd.readouterr().out
    assert [row["step"] for row in rows(tmp_path) if row["stage"] == "zero"] == list(range(1, 201))
    assert list(results(tmp_path)["models"]) == ["base", "zero"]


@pytest.mark.parametrize("device, gpus, refused", (("auto", 1, True), ("cuda", 1, True), ("cpu", 1, False),
                                                   ("auto", 2, False), ("auto", 0, False)))
def test_two_ranks_do_not_share_a_gpu(monkeypatch, device, gpus, refused):
    """If two ranks shared a GPU, nccl would end both after a minute, with forty lines."""
    met = []
    for name, value in (("is_torchelastic_launched", lambda: True), ("init_process_group", met.append)):
        monkeypatch.setattr(dist, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(UsageError, match="2 processes need 2 GPUs, and torch sees 1"):
            init(device)
    else:
        init(device)
    assert bool(met) != refused


if __name__ == "__main__":  # rank 1
    torch.set_num_threads(1)
    found = run_cases_as(1, f"{sys.argv[1]}/store")
    torch.save(found, f"{sys.argv[1]}/rank1.pt")
    sys.stdout.flush()
    os._exit(0)  # see engine.parallel.end
