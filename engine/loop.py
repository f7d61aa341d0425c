"""A run, and the loop that all stages share.

    for step in run.steps(n_steps, model=policy, optimizer=optimizer):
        ...                      # the stage's own lines
        step.log(metrics)

`run.steps` is a generator. Around the stage's own lines it resumes, seeds, logs, prints and saves (progress.py). Each
stage has exactly one such loop.

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

from data.own import path_of
from engine.corpus import Corpus
from engine.evaluation import heldout_accuracy
from engine.files import build_model, load_checkpoint, write_file
from engine.machine import return_memory
from engine.parallel import check_launcher, rank, world_size
from engine.pretrained.weights import starting_model
from engine.progress import Progress
from engine.samples import keep_samples
from engine.settings import refuse_changes, shaped_by
from engine.speed.fast import frozen, graphed, make_fast
from grpo import Metrics, Rollout
from model import GPT, GPTConfig


class Stage(NamedTuple):
    """An entry of a program's table of stages, which maps names to stages."""
    train: Callable          # train(run, *models of the stages that it starts from)
    starts: tuple[str, ...]  # the names of these stages
    settings: tuple          # groups and names of the settings that shape it, without those of `starts`


class Watch(NamedTuple):
    """What keep_samples and the quick evaluation ask a stage's model during training."""
    make_problem: Callable        # make_problem(rng) -> a problem
    reward_fn: Callable           # see grpo.sample_rollout
    teacher: GPT | None = None    # answers the same problems once, at the start


@dataclass
class Step:
    """One step of a stage on this rank, with random numbers of its own."""
    number: int                  # from 1 to the number of steps
    last: bool                   # is it the last step?
    rng: random.Random
    generator: torch.Generator
    lr_scale: float              # factor on the learning rates
    asked: list | None = None    # the problems of this step
    metrics: Metrics | None = None
    rollout: Rollout | None = None

    def problems(self, n: int, make_problem: Callable) -> list:
        """This rank's shard of n problems, made by make_problem(rng)."""
        assert n % world_size() == 0, f"{n} problems cannot be divided evenly among {world_size()} ranks"
        self.asked = [make_problem(self.rng) for _ in range(n // world_size())]
        return self.asked

    def log(self, metrics: Metrics, rollout: Rollout | None = None) -> None:
        """End the step. Its metrics, averaged over the ranks, become a row of log.jsonl; "tokens" becomes tokens_per_s.
        At some steps the first answer of the rollout is printed. Each step calls this once, as its last line."""
        assert self.metrics is None, "a step must be logged once, with step.log(...) as its last line"
        self.metrics, self.rollout = metrics, rollout


def lr_schedule(step: int, steps: int, hold: float = 0.4) -> float:
    """Factor on the learning rate at a step, from 1 to `steps`. It rises to 1 over the first twentieth of the steps,
    stays there up to the fraction `hold` of the steps, and falls linearly towards 0.03.

    >>> [round(lr_schedule(step, 100), 2) for step in (1, 5, 40, 70, 100)]
    [0.2, 1.0, 1.0, 0.53, 0.05]
    """
    warmup = min(1.0, step / max(1, steps // 20))
    decay = min(1.0, (steps + 1 - step) / (steps * (1 - hold)))
    return warmup * (0.03 + 0.97 * decay)


class Run:
    """A run: its settings, its task, the folder that it writes into, and the content of results.json."""

    def __init__(self, cfg, task, out: Path, results: dict, stages: dict[str, Stage]):
        self.cfg, self.task, self.out, self.results, self.stages = cfg, task, out, results, stages
        self.stage = ""   # the stage that is being trained
        self.began = 0.0  # when that stage began, by time.perf_counter()
        self.writing: Corpus | None = None  # the corpus of that stage

    # What a stage uses

    def new_model(self, n_layer: int, n_head: int, n_embd: int, student: bool = False) -> GPT:
        """A model with random weights. With --base it is that checkpoint, with --init the pretrained model, or the
        student's (starting_model)."""
        cfg, dtype = self.cfg, getattr(torch, self.cfg.dtype)
        torch.manual_seed(cfg.seed)
        if cfg.base and not student:
            return self.build(load_checkpoint(Path(path_of(cfg.base))))
        if cfg.init:
            return starting_model(cfg, self.task.encoding.n_tokens, student, dtype).to(cfg.device)
        shape = GPTConfig(self.task.encoding.n_vocab, cfg.block_size, n_layer, n_head, n_embd)
        return GPT(shape, dtype).to(cfg.device)

    def corpus(self, n_steps: int, n_rows: int) -> Corpus:
        """n_steps batches of n_rows rows of the corpus, which is written in the background from now on."""
        self.writing = Corpus(self.task, self.cfg, n_steps, n_rows)
        return self.writing

    def fast(self, model: GPT, training: bool = False, sampling: bool = False) -> GPT:
        """The model, with faster methods in place of its own. Their results differ by rounding only."""
        return make_fast(model, self.cfg, training, sampling)

    def frozen(self, model: GPT) -> GPT:
        """A copy of the model that is never trained."""
        return frozen(model, self.cfg)

    def seeded(self, number: int, name: str = "") -> tuple[random.Random, torch.Generator]:
        """The random generators of a step on this rank, which depend on (seed, stage, step, rank) only. Rank 0 draws
        the same numbers as a run of one process."""
        of_rank = f"/{rank()}" if rank() else ""
        rng = random.Random(f"{self.cfg.seed}/{name or self.stage}/{number}{of_rank}")
        return rng, torch.Generator(self.cfg.device).manual_seed(rng.getrandbits(63))

    def steps(self, n: int, *, hold: float = 0.4, watch: Watch | None = None, **parts) -> Iterator[Step]:
        """Yield the steps 1 to n of a stage, or those after resume.pt. After the last step, NAME.pt is written.

        `parts` are the objects that the steps change. Each has a state_dict, which resume.pt stores. parts["model"] is
        the model that the stage trains. `hold` is that of lr_schedule. If the stage leaves the loop early, or a step
        raises an error, neither that step nor NAME.pt is saved. Raises UsageError if a metric is not finite.
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
        """Add answers to samples.jsonl if they are due. If a quick evaluation is due, return its metric."""
        keep_samples(self, step.number, n, model, watch)
        every = self.cfg.eval_every if watch.teacher is None else 0  # only in RL, which has no teacher
        if not every or (step.number % every and not step.last):
            return {}
        return_memory(self.cfg)  # of the update: the cache of keys and values needs it in pieces of other sizes
        return {"heldout_accuracy": heldout_accuracy(model, self.task, self.cfg, step.generator)}

    # Results of finished stages

    def path(self, name: str) -> Path:
        """NAME.pt in the folder of the run."""
        return self.out / f"{name}.pt"

    def checkpoint(self, name: str) -> dict:
        """The content of a stage's checkpoint. Raises UsageError if it is missing, or was made with other settings."""
        content = load_checkpoint(self.path(name), name)
        refuse_changes(self.cfg, content["config"], self.path(name), shaped_by(self.stages, name))
        self.results["seconds"][name] = round(content["seconds"], 1)
        return content

    def load_model(self, name: str) -> GPT:
        """A stage's model, on the run's device and in its compute dtype."""
        return self.build(self.checkpoint(name))

    def build(self, content: dict) -> GPT:
        model = build_model(content).to(self.cfg.device)
        model.dtype = getattr(torch, self.cfg.dtype)
        return model

    def save_results(self) -> None:
        write_file(self.out / "results.json", json.dumps(self.results, indent=1).encode())
