"""Measurements of the findings that train.py does not make. This program makes one of them and prints JSON:

    python experiments/measures.py MEASURE OUT THREADS [MODEL=CONTROL ...]

MEASURE is a function of this file, and OUT is the folder of a finished run. MODEL=CONTROL, such as
zero=all_completions, measures the model of a control in place of the model of train.py. All samples are drawn at
temperature 1. The run's seed and the name of the measure seed the generators.
"""
import dataclasses
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data import countdown  # noqa: E402
from data.arithmetic import OPERATIONS  # noqa: E402
from engine.ask import stored_config  # noqa: E402
from engine.files import build_model, load_checkpoint  # noqa: E402
from engine.loop import Run  # noqa: E402
from engine.machine import tune_libraries  # noqa: E402
from engine.speed.sampler import Sampler  # noqa: E402
from engine.tasks import make_task  # noqa: E402
from grpo import micro_batches, sample_rollout  # noqa: E402
from model import GPT, token_logprobs  # noqa: E402
from train import STAGES, Config  # noqa: E402

CHUNK = 1024  # completions sampled at a time
TURNS = ("wrong to right", "right to wrong", "wrong to wrong", "right to right")  # what a "wait" may do to an attempt


class Measured(Run):
    """A finished run, and samples of its models."""

    def __init__(self, out: Path, measure: str, controls: dict[str, str]):
        results = json.loads((out / "results.json").read_text())
        cfg = stored_config(Config, results["config"])
        super().__init__(cfg, make_task(cfg), out, results, STAGES)
        self.measure, self.controls = measure, controls

    def model(self, name: str) -> GPT:
        """A model of train.py, or the control that takes its place."""
        stage = self.controls.get(name, name)
        model = build_model(load_checkpoint(self.path(stage), stage)).to(self.cfg.device)
        model.generate = Sampler(model)
        return model

    def draws(self, what: str = "") -> tuple[random.Random, torch.Generator]:
        """The generators of this measure."""
        return self.seeded(0, f"{self.measure} {what}")

    def sample(self, model: GPT, problems: list, samples: int, what: str = "") -> list[list[tuple[str, bool]]]:
        """Draw `samples` completions of each problem -> for each problem, the pairs (text, whether it is correct).
        Another `what` draws other completions."""
        generator, groups = self.draws(f"samples {what}")[1], []
        step = max(1, CHUNK // samples)
        for at in range(0, len(problems), step):
            rollout = sample_rollout(model, problems[at:at + step], self.task.reward, self.task, samples,
                                     self.cfg.rl_max_new_tokens, generator)
            rows = [(text, score["accuracy"] == 1) for text, score in zip(rollout.texts, rollout.scores)]
            groups += [rows[i:i + samples] for i in range(0, len(rows), samples)]
        return groups

    def accuracy(self, model: GPT, problems: list, samples: int = 16) -> float:
        """pass@1: the share of correct completions."""
        return share(right for group in self.sample(model, problems, samples) for _, right in group)


def share(values) -> float | None:
    """The share of true values, or None if there are no values."""
    values = list(values)
    return round(sum(values) / len(values), 5) if values else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples is correct, estimated without bias from n samples of which c are
    correct: 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mixed(n: int, c: int, G: int) -> float:
    """The probability that G answers are neither all correct nor all wrong, estimated without bias from n answers of
    which c are correct. It is P(at least one is correct) + P(at least one is wrong) - 1.

    >>> round(mixed(4, 2, 2), 3)  # four of the six pairs
    0.667
    """
    return pass_at_k(n, c, G) + pass_at_k(n, n - c, G) - 1


def operations(run: Measured) -> dict:
    """pass@1 of base and zero for each number of operations, on 256 problems of the test side. Fewer than 256 problems
    have one operation, so some of these repeat. Textbook pages of the corpus state their results as facts."""
    rng, found = run.draws()[0], {"base": {}, "zero": {}}
    for n in range(1, run.cfg.max_ops + 3):
        problems = [run.task.make_problem(rng, n_ops=(n, n), test=True) for _ in range(256)]
        for name in found:
            found[name][str(n)] = run.accuracy(run.model(name), problems)
    return found


def many_samples(run: Measured) -> dict:
    """pass@k of base and zero for k = 1, 2, 4 .. 256, from 256 samples of each of 128 problems of a kind."""
    found, n = {}, 256
    for kind in run.task.held_out:
        problems = run.task.heldout_problems(128, kind, run.cfg.seed)
        for name in ("base", "zero"):
            right = [sum(right for _, right in group) for group in run.sample(run.model(name), problems, n)]
            found[f"{name} {kind}"] = {str(2 ** i): round(sum(pass_at_k(n, c, 2 ** i) for c in right) / len(right), 5)
                                       for i in range(9)}
    return found


def distributions(run: Measured) -> dict:
    """pass@1 of zero and student on unseen problems with as many operations as in RL (test), with more operations
    (hard), and with larger numbers."""
    larger = dataclasses.replace(run.task, max_number=99)
    problems = {"larger numbers": larger.heldout_problems(256, "test", run.cfg.seed)}
    problems |= {kind: run.task.heldout_problems(256, kind, run.cfg.seed) for kind in run.task.held_out}
    return {name: {kind: run.accuracy(run.model(name), problems[kind]) for kind in problems}
            for name in ("zero", "student")}


def signal(run: Measured) -> dict:
    """The share of groups of G answers that contain both correct and wrong answers, for the base's answers to 256
    training problems.

    "counted" is this share in two groups of each problem. 1 - p^G - (1-p)^G predicts the share from p, the probability
    of a correct answer. "predicted" is the mean of the formula over problems; for each problem it is estimated without
    bias from 64 other samples. "at the mean p" is the formula at the mean p of all problems.
    """
    G, rng, n = run.cfg.rl_samples, run.draws()[0], 64
    problems = [run.task.make_problem(rng) for _ in range(256)]
    groups = [[right for _, right in group] for group in run.sample(run.model("base"), problems, n)]
    right = [sum(group) for group in groups]
    p = sum(right) / (n * len(right))
    others = [[right for _, right in group] for group in run.sample(run.model("base"), problems, 2 * G, "counted")]
    return {"mean p": round(p, 5), "counted": share(0 < sum(part) < G for group in others
                                                    for part in (group[:G], group[G:])),
            "predicted": round(sum(mixed(n, c, G) for c in right) / len(right), 5),
            "at the mean p": round(1 - p ** G - (1 - p) ** G, 5)}


def reflections(run: Measured) -> dict:
    """The effect of each "wait" in base's and zero's answers to test problems of countdown: how often it turns a wrong
    attempt into a correct one, and so on."""
    problems, found = run.task.heldout_problems(256, "test", run.cfg.seed), {}
    for name in ("base", "zero"):
        asked = zip(problems, run.sample(run.model(name), problems, 16))
        counts = Counter(turn for problem, group in asked for text, _ in group for turn in turns_of(problem, text))
        found[name] = {turn: counts[turn] for turn in TURNS}
    return found


def turns_of(problem: countdown.Problem, text: str) -> list[str]:
    """The effect of each "wait" in the thought of an answer. An attempt is right if it reaches the target. An answer
    whose first attempt has no step does not count.

    >>> turns_of(countdown.parse("3 4 7 = 25"), "<think>3*7=21, 21+4=25, 25?, wait, 3+4=7, wait, 3*7=25</think>")
    ['right to wrong', 'wrong to wrong']
    """
    thought = re.split("</think>|<answer>", text.partition("<think>")[2])[0]
    attempts = thought.split(", wait, ")
    if "=" not in attempts[0]:
        return []
    right = ["right" if hits(problem, attempt) else "wrong" for attempt in attempts]
    return [f"{before} to {after}" for before, after in zip(right, right[1:])]


def hits(problem: countdown.Problem, attempt: str) -> bool:
    """Does an attempt reach the target, with true steps only?"""
    steps = [step for step in attempt.split(", ") if "=" in step]
    return bool(steps) and all(map(true_step, steps)) and steps[-1].endswith(f"={problem.target}")


def true_step(text: str) -> bool:
    """Is this text an equation that holds, such as 3*4=12?"""
    found = re.fullmatch(r"(-?[0-9]+)([-+*])([0-9]+)=(-?[0-9]+)", text)
    return bool(found) and OPERATIONS[found[2]](int(found[1]), int(found[3])) == int(found[4])


def divergence(run: Measured) -> dict:
    """The KL divergence of zero from the base in nats per token, estimated as in grpo.py (k3), over all completions of
    256 groups of training problems, with and without a signal."""
    rng, generator = run.draws()
    zero, base = run.model("zero"), run.model("base")
    problems = [run.task.make_problem(rng) for _ in range(256)]
    rollout = sample_rollout(zero, problems, run.task.reward, run.task, run.cfg.rl_samples, run.cfg.rl_max_new_tokens,
                             generator)
    total, tokens = 0.0, sum(map(len, rollout.completions))
    for batch in micro_batches(rollout, list(range(len(rollout.texts))), run.cfg.micro_batch, generator.device):
        with torch.no_grad():
            log_r = token_logprobs(base, batch.idx, batch.mask) - token_logprobs(zero, batch.idx, batch.mask)  # (M,)
        total += (log_r.exp() - log_r - 1).sum().item()
    return {"kl": round(total / tokens, 5)}


MEASURES = {f.__name__: f for f in (operations, many_samples, distributions, signal, reflections, divergence)}

if __name__ == "__main__":
    tune_libraries()
    torch.set_num_threads(int(sys.argv[3]))
    controls = dict(argument.split("=") for argument in sys.argv[4:])
    print(json.dumps(MEASURES[sys.argv[1]](Measured(Path(sys.argv[2]), sys.argv[1], controls))))
