"""Several ranks: together they make the update of one process, and they live and end together."""
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
from grpo import Rollout, group_advantages
from model import GPT, GPTConfig, Optimizer
from parallel import Means, init, per_rank, rank, world_size
from run import Config, UsageError, lock
from tests.conftest import NAMES, QUICK, ROOT, copy, results, rows

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
TASK = Arithmetic()
P, G = 6, 3  # prompts, and completions of each


# Two real processes, this one and a child, and the same work in one


def make_gpt(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(TASK.encoding.n_vocab, 64, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # so that policy, reference and teacher differ
    return model


class Descent(Optimizer):
    """Plain gradient descent without clipping, after which the weights tell the gradients."""
    def __init__(self, model):
        super().__init__(model, 0.1)
        self.parts = [torch.optim.SGD(self.parameters, lr=0.1)]

    def step(self, scale=1.0):
        return super().step(scale, clip=1e9)


def make_rollout(samples: int) -> Rollout:
    """A rollout whose two halves have different numbers of tokens, of right answers and of rewards."""
    problems = [parse(f"{i + 1}+{10 ** (i % 3)}") for i in range(P * G // samples)]
    rollout = grpo.sample_rollout(make_gpt(seed=1), problems, lambda text, problem: {}, TASK, samples=samples,
                                  max_new_tokens=20, generator=torch.Generator().manual_seed(2))
    for i in range(P * G):
        length = 20 if i < 3 else 2 + 7 * i % 11
        rollout.completions[i], rollout.sampler_logp[i] = rollout.completions[i][:length], rollout.sampler_logp[i][:length]
        rollout.scores[i] = {"reward": float(i * i % 5) * (i // samples != 1), "accuracy": float(i % 4 == 0), "format": 1.0}
        rollout.truncated[i] = length == 20
    return rollout


def this_ranks(rollout: Rollout) -> Rollout:
    """The rows of this rank's half of the prompts."""
    n = per_rank(P * G)
    mine = slice(rank() * n, (rank() + 1) * n)
    return Rollout(*(getattr(rollout, field.name)[mine] for field in dataclasses.fields(Rollout)))


def grpo_case(kl_coef: float, normalize: str, live: int = P * G, skip: bool = True) -> tuple:
    """grpo_update on a given rollout, of which the first `live` rows have an advantage -> (metrics, weights)."""
    model, rollout = make_gpt(seed=1), make_rollout(samples=G)
    adv = group_advantages(rollout.column("reward").view(P, G)).flatten() * (torch.arange(P * G) < live)
    n, cfg = per_rank(P * G), Config(kl_coef=kl_coef, skip_no_signal=skip, normalize=normalize, rl_samples=G,
                                     rl_minibatches=1, rl_max_new_tokens=20, micro_batch=70)
    metrics = grpo.grpo_update(model, make_gpt(seed=3), Descent(model), this_ranks(rollout),
                               adv[rank() * n:(rank() + 1) * n], cfg, torch.Generator().manual_seed(rank()))
    return metrics, model.state_dict()


def distill_case(right: int = P * G, **settings) -> tuple:
    """distill_step on given samples, of which none after the first `right` is accepted -> (metrics, weights)."""
    student, rollout = make_gpt(seed=1), make_rollout(samples=1)
    for score in rollout.scores[right:]:
        score["accuracy"] = 0.0
    cfg = Config(distill_minibatches=1, distill_epochs=2, rl_max_new_tokens=20, micro_batch=70, **settings)
    with mock.patch.object(distill, "sample_rollout", lambda *args, **kwargs: this_ranks(rollout)):
        metrics = distill.distill_step(student, make_gpt(seed=3), Descent(student), [], None, TASK, cfg,
                                       torch.Generator().manual_seed(rank()))
    return metrics, student.state_dict()


def evaluation_case() -> tuple:
    """evaluate() on completions that depend on nothing but their problem -> (what it found, no weights)."""
    def sample(model, problems, reward_fn, task, *, samples, **options):
        texts = []
        for problem in problems:
            rng = random.Random(problem.question)
            texts += [f"<think>wait{'.' * rng.randint(0, 1)}</think><answer>{rng.randint(1, 4)}</answer>"
                      + "?" * rng.randint(0, 1) for _ in range(samples)]
        scores = [reward_fn(text, problems[i // samples]) for i, text in enumerate(texts)]
        return SimpleNamespace(texts=texts, completions=texts, scores=scores)

    with mock.patch.object(train, "sample_rollout", sample):
        found = train.evaluate(None, [parse(f"{i}-1") for i in (2, 3, 5, 6, 9)], TASK, max_new_tokens=9, generator=None)
    return found, {}


CASES = {
    "grpo, token": lambda: grpo_case(0.0, "token"),
    "grpo, token, KL": lambda: grpo_case(0.1, "token"),
    "grpo, sequence": lambda: grpo_case(0.0, "sequence"),
    "grpo, constant, KL": lambda: grpo_case(0.1, "constant"),
    "grpo, no live row on rank 1": lambda: grpo_case(0.0, "token", live=P * G // 2),
    "grpo, no live row on rank 1, KL": lambda: grpo_case(0.1, "sequence", live=P * G // 2),
    "grpo, no signal on rank 1, KL on all": lambda: grpo_case(0.1, "sequence", live=P * G // 2, skip=False),
    "grpo, no live row": lambda: grpo_case(0.0, "token", live=0),
    "distill": lambda: distill_case(),
    "distill, sft": lambda: distill_case(divergence="sft"),
    "distill, nothing accepted on rank 1": lambda: distill_case(right=P * G // 2, divergence="reverse"),
    "distill, nothing accepted": lambda: distill_case(right=0),
    "distill, on policy": lambda: distill_case(right=0, on_policy=True, divergence="jsd"),
    "evaluation": evaluation_case,
}


def run_cases_as(rank: int, path: str) -> dict:
    """Meet the other rank in a file, run all cases and leave."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        return {name: case() for name, case in CASES.items()}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two ranks found in each case."""
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
    """Gradients or losses are averaged instead of added up, a denominator counts one rank's rows only, a rank without a
    live row waits for ever or leaves the others alone, or ranks drift apart."""
    (metrics, weights), (metrics_1, weights_1) = (found[case] for found in of_two)
    assert metrics == metrics_1 and all(torch.equal(weights[key], weights_1[key]) for key in weights)
    assert world_size() == 1
    expected_metrics, expected = CASES[case]()
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        assert metrics[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), key
    before, learns = make_gpt(seed=1).state_dict(), not case.endswith(("no live row", "nothing accepted", "evaluation"))
    for key in weights:
        assert torch.allclose(weights[key], expected[key], rtol=1e-4, atol=1e-6), key
        assert torch.equal(before[key], expected[key]) != learns, key


def test_means():
    """A mean of means, a mean over ranks that counts an empty one, or a division by no values."""
    means = Means()
    means.add("a", torch.tensor(6.0), torch.tensor(2)), means.add("a", 0, 1), means.add("none", 0, 0)
    assert means.compute() == {"a": 2.0, "none": None}


def test_problems_are_divided_evenly(monkeypatch):
    """Ranks that get fewer problems than asked for, and say nothing."""
    monkeypatch.setattr("parallel.world_size", lambda: 2)
    assert per_rank(6) == 3
    with pytest.raises(AssertionError, match="7 problems cannot be divided evenly among 2 ranks"):
        per_rank(7)


# Whole runs


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A run of two ranks through all stages, on a terminal that knows ASCII only -> where it wrote, and what it
    printed."""
    out = tmp_path_factory.mktemp("by_two")
    done = subprocess.run([*TORCHRUN, *QUICK, "--save_every=9", "--distill_steps=2", f"--out={out}"], cwd=ROOT,
                          capture_output=True, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr.decode()
    return out, done.stdout.decode("ascii")


def test_two_ranks_pass_through_every_stage(quick, by_two):
    """Both ranks write the log, print or evaluate, pretraining reads other rows than one process does, or the second
    rank's steps are lost."""
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
    """After SIGKILL torchrun cannot end its ranks, and they train on and hold the lock; or a run that two ranks began
    cannot go on in one."""
    copy(by_two[0], tmp_path, "base.pt")
    settings = [*QUICK, "--rl_prompts=2", "--rl_samples=2", "--rl_max_new_tokens=8", "--rl_steps=200", "--stage=zero"]
    process = subprocess.Popen([*TORCHRUN, *settings, f"--out={tmp_path}"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    log, printed = tmp_path / "log.jsonl", []
    while not log.exists() or not any(row["stage"] == "zero" and row["step"] >= 3 for row in rows(tmp_path)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)  # it ends when all who hold the pipe have, which are the ranks
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
    assert train.main([*settings, "--save_every=9", f"--out={tmp_path}"]) == 0
    assert "zero: going on after step " in capfd.readouterr().out
    assert [row["step"] for row in rows(tmp_path) if row["stage"] == "zero"] == list(range(1, 201))
    assert list(results(tmp_path)["models"]) == ["base", "zero"]


if __name__ == "__main__":  # rank 1
    torch.set_num_threads(1)
    found = run_cases_as(1, f"{sys.argv[1]}/store")
    torch.save(found, f"{sys.argv[1]}/rank1.pt")
    sys.stdout.flush()
    os._exit(0)  # see parallel.end


@pytest.mark.parametrize("device, gpus, refused", (("auto", 1, True), ("cuda", 1, True), ("cpu", 1, False),
                                                   ("auto", 2, False), ("auto", 0, False)))
def test_two_ranks_do_not_share_a_gpu(monkeypatch, device, gpus, refused):
    """nccl ends both ranks with forty lines, after a minute."""
    met = []
    for name, value in (("is_torchelastic_launched", lambda: True), ("init_process_group", met.append)):
        monkeypatch.setattr(dist, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ValueError, match="2 processes need 2 GPUs, and torch sees 1"):
            init(device)
    else:
        init(device)
    assert bool(met) != refused
