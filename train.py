"""nanoR1: random weights -> base -> zero -> student, in one command.

    base          next-token prediction on the corpus of the task (data/), or on your own text
    zero          GRPO on the base, from rule-based rewards alone: no supervised fine-tuning
    student_base  a base of its own for a smaller GPT, on the same corpus
    student       the RL teacher, zero, distilled into the student's base

    python train.py                            everything, then the report; to resume it, repeat the command
    python train.py --stage=base|zero|student  one part, on earlier checkpoints; student makes its student_base first
    python train.py --preset=tiny              the same in under a minute: does it run at all?
    python train.py --ask="8*7-19"             what each model answers
    python train.py --evaluate=FILE            what each model reaches on a file of problems
    python train.py --init=DIR                 the base is a pretrained model: see docs/real_model.md
    python train.py --seed=1 --out=out/seed1   --key=value sets any field of Config
    torchrun --standalone --nproc_per_node=2 train.py    in several processes: see engine/parallel.py

It writes into --out (out/, or out/PRESET): NAME.pt for each finished stage, resume.pt for the stage under way,
log.jsonl (one row a step), samples.jsonl (how the answers to four problems change), results.json, report.md.

This file holds the stages. A stage is a loop over `run.steps`, which yields its steps. Everything else is in engine/:
files, checkpoints, the command line, speed.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import DistillConfig, distill_step
from engine.command import main
from engine.loop import Run, Stage, Watch
from engine.optimizer import Optimizer
from engine.settings import Evaluation, Files, Machine, Questions, Task, Text
from grpo import GRPOConfig, Metrics, grpo_step
from model import GPT


@dataclass
class Pretraining:
    block_size: int = 128        # longest sequence, in tokens
    base_muon_lr: float = 0.02   # learning rate of Muon, for both bases; 0: AdamW alone
    base_adam_lr: float = 3e-3   # learning rate of AdamW, for both bases


@dataclass
class Base:
    n_layer: int = 4              # layers of the teacher
    n_head: int = 3               # attention heads of the teacher
    n_embd: int = 96              # width of the teacher
    base_tokens: int = 6_500_000  # tokens that the base is trained on, each once
    base_batch: int = 32          # rows of block_size tokens in an update


@dataclass
class StudentBase:
    student_n_layer: int = 3    # layers of the student
    student_n_head: int = 2     # attention heads of the student
    student_n_embd: int = 44    # width of the student
    student_init: str = ""      # the student's base; by default every second layer of --init
    student_base_tokens: int = 6_000_000  # tokens that the student's base is trained on
    student_base_batch: int = 32          # rows of block_size tokens in an update


@dataclass
class Config(Machine, Files, Task, Text, Questions, Pretraining, Base, GRPOConfig, StudentBase,
             DistillConfig, Evaluation):
    """Every setting of a run. Those of GRPO stand in grpo.py, those of distillation in distill.py."""


def train_base(run: Run) -> None:
    cfg = run.cfg
    model = run.new_model(cfg.n_layer, cfg.n_head, cfg.n_embd)
    pretrain(run, model, cfg.base_tokens, cfg.base_batch)


def train_student_base(run: Run) -> None:
    cfg = run.cfg
    model = run.new_model(cfg.student_n_layer, cfg.student_n_head, cfg.student_n_embd, student=True)
    pretrain(run, model, cfg.student_base_tokens, cfg.student_base_batch)


def pretrain(run: Run, model: GPT, n_tokens: int, n_rows: int) -> None:
    """Next-token prediction on the corpus, in updates of n_rows rows. A pretrained model (--init) skips this unless its
    number of tokens is set."""
    cfg = run.cfg
    n_steps = n_tokens // (n_rows * cfg.block_size)
    corpus = run.corpus(n_steps, n_rows)  # written in the background while the model is compiled
    model = run.fast(model, training=n_steps > 0)
    optimizer = Optimizer(model, cfg.base_adam_lr, cfg.base_muon_lr)
    rows_at_a_time = max(1, cfg.micro_batch // cfg.block_size)
    for step in run.steps(n_steps, model=model, optimizer=optimizer):
        metrics = Metrics()
        rows = corpus.batch(step.number)  # (B, T+1)
        n_targets = rows[:, 1:].numel()
        for idx in rows.split(rows_at_a_time):
            loss = next_token_loss(model, idx)
            (loss.sum() / n_targets).backward()
            metrics.add("loss", loss.detach().sum(), len(loss))
        metrics.add("grad_norm", optimizer.step(step.lr_scale, share=len(rows)), 1)
        metrics.add("tokens", n_targets, 1)
        if step.number % 100 == 0 or step.last:
            for idx in corpus.heldout.split(rows_at_a_time):
                with torch.no_grad():
                    loss = next_token_loss(model, idx)
                metrics.add("heldout_loss", loss.sum(), len(loss))
        step.log(metrics)


def next_token_loss(model: GPT, idx: Tensor) -> Tensor:
    """-log p of each token of idx (B, T+1) but the first: (B * T,)."""
    logits = model(idx[:, :-1]).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")


def train_zero(run: Run, base: GPT) -> None:
    """Reinforcement learning on the base, from rewards alone."""
    run_grpo(run, run.cfg, base, run.cfg.rl_steps, run.task.make_problem, reward_function(run))


def run_grpo(run: Run, cfg: Config, policy: GPT, n_steps: int, make_problem, reward_fn) -> None:
    """GRPO: in each step, sample, score, compare, update."""
    reference = run.frozen(policy) if cfg.kl_coef else None
    policy = run.fast(policy, training=True, sampling=True)
    # AdamW alone: its steps get smaller where the gradient is noisy, as in RL. Muon's steps always have one size.
    optimizer = Optimizer(policy, cfg.rl_lr, beta2=0.999)
    parts = {"model": policy, "optimizer": optimizer}
    if cfg.ref_every:
        parts["reference"] = reference  # it changes, so resume.pt keeps it
    watch = Watch(make_problem, reward_fn)
    for step in run.steps(n_steps, hold=0.0, watch=watch, **parts):
        problems = step.problems(cfg.rl_prompts, make_problem)
        metrics, rollout = grpo_step(policy, reference, optimizer, problems, reward_fn, run.task, cfg,
                                     step.generator, step.lr_scale)
        if cfg.ref_every and step.number % cfg.ref_every == 0:
            reference.load_state_dict(policy.state_dict())
        step.log(metrics, rollout)


def reward_function(run: Run):
    """What GRPO maximises ("reward"), and what is logged beside it. A task may return a "reward" of its own."""
    cfg = run.cfg

    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = run.task.reward(completion, problem)
        reward = cfg.accuracy_weight * scores["accuracy"] + cfg.format_weight * scores.get("format", 0.0)
        return {"reward": reward, **scores}
    return reward_fn


def train_student(run: Run, zero: GPT, student_base: GPT) -> None:
    """Distillation of zero. It also gets longer problems than RL did. A student that never sees answers to these
    forgets what its base could do with them."""
    def make_problem(rng):
        return run.task.make_problem(rng, longer=True)

    cfg = run.cfg
    run_distillation(run, cfg, zero, student_base, cfg.distill_steps, make_problem, reward_function(run))


def run_distillation(run: Run, cfg: Config, teacher: GPT, student: GPT, n_steps: int, make_problem,
                     reward_fn) -> None:
    """Distillation: the teacher answers, and the student learns its probabilities."""
    teacher = run.fast(teacher, training=cfg.divergence != "sft", sampling=not cfg.on_policy)
    student = run.fast(student, training=True, sampling=cfg.on_policy)
    optimizer = Optimizer(student, cfg.distill_adam_lr, cfg.distill_muon_lr)
    watch = Watch(make_problem, reward_fn, teacher)
    for step in run.steps(n_steps, watch=watch, model=student, optimizer=optimizer):
        problems = step.problems(cfg.distill_prompts, make_problem)
        metrics = distill_step(student, teacher, optimizer, problems, reward_fn, run.task, cfg,
                               step.generator, step.lr_scale)
        step.log(metrics)


# Each stage: its function, the stages whose models it starts from, and the settings that shape it.
STAGES = {
    "base": Stage(train_base, (), (Task, Text, Pretraining, Base)),
    "zero": Stage(train_zero, ("base",), (Questions, GRPOConfig)),
    "student_base": Stage(train_student_base, (), (Task, Text, Pretraining, StudentBase)),
    "student": Stage(train_student, ("zero", "student_base"), (Questions, DistillConfig)),
}

if __name__ == "__main__":
    main(STAGES, Config, __doc__)
