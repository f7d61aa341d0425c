"""A run, and the loop that all stages share.

    for step in run.steps(n_steps, model=policy, optimizer=optimizer):
        ...                      # the stage's own lines
        step.log(metrics)

`run.steps` is a generator. Around the stage's own lines it resumes, seeds, logs, prints and saves (progress.py). A
stage has one loop over it.

A run can be interrupted or killed at any moment. The same command resumes it from the last checkpoint. Everything that
a step draws at random is seeded by (seed, stage, step, rank), so no generator's state is saved. Where nothing is
compiled, the resumed run reaches the same result, bit for bit.
"""
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from engine.corpus import Corpus
from engine.evaluation import heldout_accuracy
from engine.files import build_model, load_checkpoint, write_file
from engine.machine import return_memory
from engine.parallel import check_launcher, rank, world_size
from engine.pretrained.weights import make_model, starting_model
from engine.progress import Progress
from engine.samples import keep_samples
from engine.settings import refuse_changes, shaped_by
from engine.speed.fast import frozen, graphed, make_fast
from grpo import Metrics, Rollout
from model import GPT, GPTConfig


class Stage(NamedTuple):
    """An entry of a program's table of stages, which has them by name."""
    train: Callable          # called with the run and the models of the stages that it starts from
    starts: tuple[str, ...]  # the names of these stages
    settings: tuple          # the groups and names of the settings that shape it, besides those of these stages


class Watch(NamedTuple):
    """What a stage's model is asked while it is trained, for samples.jsonl and --eval_every."""
    make_problem: Callable        # make_problem(rng) -> a problem
    reward_fn: Callable           # see grpo.sample_rollout
    teacher: GPT | None = None    # it answers the same problems once


@dataclass
class Step:
    """One step of a stage on this rank, with random numbers of its own."""
    number: int                  # 1 to the number of steps
    last: bool                   # is it the last one?
    rng: random.Random
    generator: torch.Generator
    lr_scale: float              # factor of the learning rates
    asked: list | None = None    # the problems of this step
    metrics: Metrics | None = None
    rollout: Rollout | None = None

    def problems(self, n: int, make_problem: Callable) -> list:
        """This rank's share of n problems, which make_problem(rng) makes."""
        assert n % world_size() == 0, f"{n} problems cannot be divided evenly among {world_size()} ranks"
        self.asked = [make_problem(self.rng) for _ in range(n // world_size())]
        return self.asked

    def log(self, metrics: Metrics, rollout: Rollout | None = None) -> None:
        """What this step's row in log.jsonl says, added up over the ranks; tokens_per_s takes the place of its metric
        "tokens". The first answer of a rollout is shown on the terminal now and then. A step ends with one such call."""
        assert self.metrics is None, "a step must be logged once, with step.log(...) as its last line"
        self.metrics, self.rollout = metrics, rollout


def lr_schedule(step: int, steps: int, hold: float = 0.4) -> float:
    """Factor of the learning rate at step 1..steps: it rises over the first twentieth, stays at 1 up to a share `hold`
    of the steps, and falls to 3 %.

    >>> [round(lr_schedule(step, 100), 2) for step in (1, 5, 40, 70, 100)]
    [0.2, 1.0, 1.0, 0.53, 0.05]
    """
    warmup = min(1.0, step / max(1, steps // 20))
    decay = min(1.0, (steps + 1 - step) / (steps * (1 - hold)))
    return warmup * (0.03 + 0.97 * decay)


class Run:
    """A run under way: its settings and its task, where it writes, and what results.json holds."""

    def __init__(self, cfg, task, out: Path, results: dict, stages: dict[str, Stage]):
        self.cfg, self.task, self.out, self.results, self.stages = cfg, task, out, results, stages
        self.stage = ""   # the stage under way
        self.began = 0.0  # when it began, by time.perf_counter()
        self.writing: Corpus | None = None  # the corpus that was asked for last

    # What a stage asks for

    def new_model(self, n_layer: int, n_head: int, n_embd: int, student: bool = False) -> GPT:
        """A model with random weights; with --init the pretrained model, or the student's."""
        cfg, dtype = self.cfg, getattr(torch, self.cfg.dtype)
        torch.manual_seed(cfg.seed)
        if cfg.init:
            return starting_model(cfg, self.task.encoding.n_tokens, student, dtype).to(cfg.device)
        shape = GPTConfig(self.task.encoding.n_vocab, cfg.block_size, n_layer, n_head, n_embd)
        return make_model(shape, dtype).to(cfg.device)

    def corpus(self, n_steps: int, n_rows: int) -> Corpus:
        """n_steps batches of n_rows rows of the corpus, which is written in the background."""
        self.writing = Corpus(self.task, self.cfg, n_steps, n_rows)
        return self.writing

    def fast(self, model: GPT, training: bool = False, sampling: bool = False) -> GPT:
        """The model, with quick methods in place of its own. They return the same but for rounding."""
        return make_fast(model, self.cfg, training, sampling)

    def frozen(self, model: GPT) -> GPT:
        """A copy that is never trained."""
        return frozen(model, self.cfg)

    def seeded(self, number: int, name: str = "") -> tuple[random.Random, torch.Generator]:
        """The generators of a step on this rank: a pure function of (seed, stage, step, rank). Rank 0 draws what one
        process draws."""
        of_rank = f"/{rank()}" if rank() else ""
        rng = random.Random(f"{self.cfg.seed}/{name or self.stage}/{number}{of_rank}")
        return rng, torch.Generator(self.cfg.device).manual_seed(rng.getrandbits(63))

    def steps(self, n: int, *, hold: float = 0.4, watch: Watch | None = None, **parts) -> Iterator[Step]:
        """The steps 1 to n of a stage, or those after resume.pt. After the last one, NAME.pt is written.

        parts are the objects with a state_dict that the steps change: resume.pt keeps their states. parts["model"] is
        what the stage makes. If the stage leaves the loop early, or a step raises an error, nothing is written. Raises
        UsageError if a metric is no longer finite.
        """
        if "optimizer" in parts:
            graphed(parts["optimizer"], self.cfg)
        if self.writing:
            self.writing.wait()
        progress = Progress(self, n, parts)
        progress.resume()
        if watch and not progress.step:
            keep_samples(self, 0, n, parts["model"], watch)
        with progress.open_log():
            for number in range(progress.step + 1, n + 1):
                check_launcher()
                step = Step(number, number == n, *self.seeded(number), lr_schedule(number, n, hold))
                progress.begin_step()
                yield step  # here the stage's own lines run
                assert step.metrics is not None, f"{self.stage}: a step must end with step.log(...)"
                row = progress.measure(step)
                if watch:
                    row |= self.look(step, n, parts["model"], watch)
                return_memory(self.cfg)
                progress.end_step(step, row)
        progress.end()

    def look(self, step: Step, n: int, model: GPT, watch: Watch) -> dict[str, float]:
        """What the model answers while it is trained, into samples.jsonl; its accuracy on held-out problems."""
        keep_samples(self, step.number, n, model, watch)
        every = self.cfg.eval_every if watch.teacher is None else 0  # in RL alone
        if not every or (step.number % every and not step.last):
            return {}
        return_memory(self.cfg)  # of the update: keys and values need it in other pieces
        return {"heldout_accuracy": heldout_accuracy(model, self.task, self.cfg, step.generator)}

    # What a finished stage left

    def path(self, name: str) -> Path:
        return self.out / f"{name}.pt"

    def checkpoint(self, name: str) -> dict:
        """A stage's checkpoint. Raises UsageError if it is missing, or was made with other settings."""
        content = load_checkpoint(self.path(name), name)
        refuse_changes(self.cfg, content["config"], self.path(name), shaped_by(self.stages, name))
        self.results["seconds"][name] = round(content["seconds"], 1)
        return content

    def load_model(self, name: str) -> GPT:
        """A stage's model, on the run's device and in its compute dtype."""
        model = build_model(self.checkpoint(name)).to(self.cfg.device)
        model.dtype = getattr(torch, self.cfg.dtype)
        return model

    def save_results(self) -> None:
        write_file(self.out / "results.json", json.dumps(self.results, indent=1).encode())
