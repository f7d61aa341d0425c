"""Several processes: the same update as one process makes of the same samples, and one run that survives them."""
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distill
import grpo
import parallel
from data import arithmetic
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, Optimizer
from tests.conftest import QUICK as SETTINGS
from train import main

ROOT = Path(__file__).parent.parent
QUICK = [*SETTINGS, "--distill_steps=2"]


def make_gpt(seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(get_tokenizer().n_vocab, 64, n_layer=1, n_head=1, n_embd=16))


class Descent(Optimizer):
    """Plain gradient descent, after which the weights tell the gradients."""
    def __init__(self, model):
        super().__init__(model, 1.0)
        self.parts = [torch.optim.SGD(self.parameters, lr=1.0)]


def reward(completion, problem):
    """Something that an untrained model gets in different measure; but for some problems all answers get the same, so
    that without a KL penalty they are left out."""
    return {"reward": float(len(completion) % 3) * (len(problem.question) > 4), "accuracy": float(len(completion) % 2),
            "format": 1.0}


def updates() -> list:
    """Two GRPO steps, one distillation step -> for each its metrics, its rollout and the weights after it."""
    found, problems = [], [arithmetic.make_problem(random.Random(i)) for i in range(5)]
    for kind in ("penalty", "no penalty", "distill"):
        model, generator = make_gpt(seed=1), torch.Generator().manual_seed(2)
        optimizer, options = Descent(model), {"max_new_tokens": 20, "minibatches": 2, "generator": generator}
        if kind != "distill":
            metrics, _ = grpo.grpo_step(
                model, make_gpt(seed=3), optimizer, problems, reward, get_tokenizer(), samples=3, clip_low=0.2,
                clip_high=0.2, kl_coef=0.1 * (kind == "penalty"), normalize="token", scale="std", **options)
        else:
            metrics = distill.distill_step(model, make_gpt(seed=3), optimizer, problems, reward, get_tokenizer(),
                                           divergence="forward", on_policy=False, **options)
        metrics = {k: v for k, v in metrics.items() if k != "tokens_per_s" and v is not None}
        found.append((metrics, model.state_dict()))
    return found


def test_two_processes_make_the_update_of_one(monkeypatch):
    """Gradients averaged instead of added up, a denominator of one process's rows only, two processes that sample the
    same, or that do not agree on who takes which row. One process makes the updates of two on the samples of two."""
    rollouts = []

    def remembered(*args, **kwargs):
        rollouts.append(grpo_sample(*args, **kwargs))
        return rollouts[-1]

    def repeated(*args, generator, **kwargs):
        torch.randint(2**62, (2,), generator=generator)  # the draw that two processes make for their own generators
        return rollouts.pop(0)

    grpo_sample = grpo.sample_rollout
    for module in (grpo, distill):
        monkeypatch.setattr(module, "sample_rollout", remembered)
    others = parallel.start(2, [sys.executable, "-m", "tests.test_parallel"])
    try:
        of_two = updates()
    finally:
        parallel.leave()
        assert [process.wait(timeout=60) for process in others] == [0]
    assert parallel.world_size() == 1 and len(rollouts) == 3
    completions = rollouts[0].completions
    assert len(completions) == 15 and len(set(map(tuple, completions))) > 10

    for module in (grpo, distill):
        monkeypatch.setattr(module, "sample_rollout", repeated)
    before = make_gpt(seed=1).state_dict()
    for (metrics, weights), (expected_metrics, expected) in zip(of_two, updates()):
        assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)
        for name in expected:
            assert torch.allclose(weights[name], expected[name], rtol=1e-4, atol=1e-6), name
        assert (expected["embedding.weight"] - before["embedding.weight"]).abs().max() > 1e-3


def test_run_of_two_processes_goes_on_with_one(tmp_path):
    """A second process that writes the log too, that lives on when the first is killed, or a run that only as many
    processes can go on with."""
    def rows():
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "train.py", *QUICK, "--processes=2", "--stage=base", f"--out={tmp_path}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows()] == list(range(1, 40000 // (16 * 128) + 1))
    assert done.stdout.count("base on test") == 1

    process = subprocess.Popen([sys.executable, "train.py", *QUICK, "--processes=2", f"--out={tmp_path}"], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    while rows()[-1]["stage"] != "zero" or rows()[-1]["step"] < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)  # ends when all who hold the pipe have: the second process too

    assert main([*QUICK, "--processes=1", f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["config"]["processes"] == 1
    steps = [row["step"] for row in rows() if row["stage"] == "zero"]
    assert steps == [1, 2, 3, 4, 5]


def test_launched_otherwise_than_told(tmp_path, monkeypatch, capsys):
    """--processes that torchrun's number silently overrules."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--processes=3", f"--out={tmp_path / 'out'}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "launched as 1, which decides" in line
    assert not (tmp_path / "out").exists() and parallel.world_size() == 1


if __name__ == "__main__":  # the second process
    parallel.join(0)
    torch.set_num_threads(1)
    updates()
    parallel.leave()
    parallel.end(0)
