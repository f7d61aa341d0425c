"""What several test files share. Everything runs offline, on one CPU thread, in float32. The docstring of a test says
which bug the test guards against."""
import json
from pathlib import Path

import pytest
import torch

import train
from engine.arguments import Program, parse_args
from engine.command import run_command
from engine.machine import tune_libraries
from engine.tasks import make_task
from model import GPT, GPTConfig

tune_libraries()
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
NAMES = ["base", "zero", "student_base", "student"]

# The flags of a run that goes through every stage in a few seconds and saves at every step. It has one thread, like
# this process, so each of the two can resume what the other began. With batches of 4 rows there are enough updates for
# a base that sometimes writes the tags. Without tags there would be no reward, and RL would not change the base.
QUICK = ["--preset=tiny", "--device=cpu", "--threads=1", "--save_every=0", "--base_tokens=40000", "--base_batch=4",
         "--student_base_tokens=40000", "--rl_steps=5", "--rl_minibatches=2", "--distill_steps=9", "--distill_epochs=2",
         "--distill_prompts=64", "--rl_max_new_tokens=40", "--eval_problems=3"]


PROGRAM = Program(train.STAGES, train.Config, train.__doc__, make_task, "train.py")


def main(argv):
    """python train.py ARGV, in this process -> exit code."""
    return run_command(PROGRAM, argv)


def parse(argv):
    """The command line of train.py -> (Config, options)."""
    return parse_args(PROGRAM, argv)


def results(out):
    return json.loads((out / "results.json").read_text())


def rows(out):
    """The complete rows of log.jsonl. A run in progress may still be writing the last one."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def copy(out, to, *names):
    """Copy some files of a finished run, from which a test continues."""
    to.mkdir(exist_ok=True)
    for name in names:
        (to / name).write_bytes((out / name).read_bytes())


def weights_equal(path, other):
    """Are two checkpoints' weights equal, bit for bit?"""
    a, b = (torch.load(p, weights_only=True)["model"] for p in (path, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Descent:
    """Plain gradient descent by a given distance. It keeps the gradient of each update. Adam would enlarge rounding
    errors."""

    def __init__(self, model, distance):
        self.parameters, self.distance, self.gradients = list(model.parameters()), distance, []

    @torch.no_grad()
    def step(self, lr_scale=1.0, share=1.0, has_gradient=True):
        if not has_gradient:
            return torch.zeros(())
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters]))
        norm = self.gradients[-1].norm()
        for p in self.parameters:
            p -= self.distance * lr_scale * p.grad / norm
            p.grad = None
        return norm


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A finished quick run. No test changes it."""
    out = tmp_path_factory.mktemp("quick")
    assert main([*QUICK, f"--out={out}"]) == 0
    return out


@pytest.fixture
def refused(capfd):
    """refused(*args): the run ends with exit code 2 and one line on stderr, which is returned."""
    def check(*args):
        capfd.readouterr()
        assert main(list(args)) == 2
        line = capfd.readouterr().err
        assert line.count("\n") == 1 and line.startswith("train.py: "), line
        return line
    return check


@pytest.fixture
def make_gpt():
    """Make a small GPT. Its weights are larger than those of a new model, so that its output depends on its input."""
    def make(vocab_size: int = 11, seed: int = 0, block_size: int = 48, spread: float = 8.0) -> GPT:
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size, block_size, n_layer=2, n_head=2, n_embd=32))
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p.mul_(spread)
        return model
    return make


@pytest.fixture
def assert_frequencies():
    """Pearson's chi-square test of counts against probabilities. Its rate of false alarms is 3 in 100,000."""
    def check(counts: list[int], probs: list[float]) -> None:
        n, z = sum(counts), 4.0
        cells, rest = [], [0, 0.0]
        for count, p in zip(counts, probs):
            if n * p >= 5:
                cells.append((count, n * p))
            else:  # rare outcomes are counted together
                rest = [rest[0] + count, rest[1] + n * p]
        cells += [(rest[0], max(rest[1], 1.0))] if rest[1] > 0 or rest[0] else []
        statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
        k = len(cells) - 1
        critical = k * (1 - 2 / (9 * k) + z * (2 / (9 * k)) ** 0.5) ** 3  # Wilson and Hilferty, 1931
        assert statistic < critical, f"chi-square {statistic:.1f} with {k} degrees of freedom, at most {critical:.1f}"
    return check
