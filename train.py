"""nanoR1: random weights -> base -> zero -> student, in one command.

    base          a GPT with random weights learns next-token prediction on a corpus (data/, or your own text)
    zero          the base learns by GRPO, from rule-based rewards alone, without supervised fine-tuning
    student_base  a smaller GPT learns next-token prediction on the same corpus
    student       student_base learns the probabilities of zero, its teacher (distillation)

    python train.py                            all stages, then the report; to resume, repeat the command
    python train.py --stage=base|zero|student  one stage, from those before it; student includes student_base
    python train.py --preset=tiny              all stages in under a minute, to see that they run
    python train.py --ask="8*7-19"             what each model answers
    python train.py --evaluate=FILE            evaluate each model on a file of problems
    python train.py --init=DIR                 start from a pretrained model: see docs/real_model.md
    python train.py --seed=1 --out=out/seed1   --key=value sets any field of Config
    torchrun --standalone --nproc_per_node=2 train.py    in several processes: see engine/parallel.py

It writes into --out (out/, or out/PRESET): NAME.pt for each finished stage, resume.pt for the unfinished one,
log.jsonl (one row a step), samples.jsonl (how the answers to four problems change), results.json, report.md.
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
    base_muon_lr: float = 0.02   # learning rate of Muon, for both bases; 0: AdamW for all weights
    base_adam_lr: float = 3e-3   # learning rate of AdamW, for both bases


@dataclass
class Base:
    n_layer: int = 4              # layers of base and zero
    n_head: int = 3               # attention heads of base and zero
    n_embd: int = 96              # width of base and zero
    base_tokens: int = 6_500_000  # tokens that the base is trained on, each once
    base_batch: int = 32          # rows of block_size tokens in an update
    base: str = ""                # a checkpoint to start from, such as out/zero.pt, instead of random weights


@dataclass
class StudentBase:
    student_n_layer: int = 3    # layers of the student
    student_n_head: int = 2     # attention heads of the student
    student_n_embd: int = 44    # width of the student
    student_init: str = ""      # with --init: a folder with the student's base
    student_base_tokens: int = 6_000_000  # tokens that the student's base is trained on
    student_base_batch: int = 32          # rows of block_size tokens in an update


@dataclass
class Config(Machine, Files, Task, Text, Questions, Pretraining, Base, GRPOConfig, StudentBase,
             DistillConfig, Evaluation):
    """All settings. Those that this file does not declare are in grpo.py, distill.py and engine/settings.py."""


# This file holds the stages. A stage is a function with a loop, `for step in run.steps(...)`. The lines inside the loop
# are the algorithm. What a stage uses of engine/:
#
#     run.new_model(..)   a GPT with random weights; with --init or --base, that model
#     run.corpus(..)      the corpus: batch(step) -> token ids (B, T+1), and heldout, rows that are never trained on
#     run.fast(model)     the same model with a faster generate (sampling=True) and faster passes (training=True)
#     run.frozen(model)   a copy that is not trained
#     run.steps(..)       an iterator of steps, each with its number, random generators and learning rate. It logs each
#                         step, saves resume.pt every 20 seconds and NAME.pt at the end, and resumes a stage
#     Optimizer(..)       AdamW; with a muon_lr, Muon for the matrices of the blocks and AdamW for all other weights.
#                         (Muon makes each update of a matrix orthogonal. With it, pretraining needs fewer tokens.)


def train_base(run: Run) -> None:
    cfg = run.cfg
    model = run.new_model(cfg.n_layer, cfg.n_head, cfg.n_embd)
    pretrain(run, model, cfg.base_tokens, cfg.base_batch)


def train_student_base(run: Run) -> None:
    cfg = run.cfg
    model = run.new_model(cfg.student_n_layer, cfg.student_n_head, cfg.student_n_embd, student=True)
    pretrain(run, model, cfg.student_base_tokens, cfg.student_base_batch)


def pretrain(run: Run, model: GPT, n_tokens: int, n_rows: int) -> None:
    """Next-token prediction on n_tokens tokens of the corpus, n_rows rows of block_size tokens in each update."""
    cfg = run.cfg
    n_steps = n_tokens // (n_rows * cfg.block_size)  # --init and --base set n_tokens to 0
    corpus = run.corpus(n_steps, n_rows)
    model = run.fast(model, training=n_steps > 0)
    optimizer = Optimizer(model, cfg.base_adam_lr, cfg.base_muon_lr)
    rows_at_a_time = max(1, cfg.micro_batch // cfg.block_size)  # micro_batch is in tokens
    for step in run.steps(n_steps, model=model, optimizer=optimizer):
        metrics = Metrics()
        rows = corpus.batch(step.number)  # (B, T+1)
        n_targets = rows[:, 1:].numel()
        for idx in rows.split(rows_at_a_time):  # their gradients add up
            loss = next_token_loss(model, idx)
            (loss.sum() / n_targets).backward()
            metrics.add("loss", loss.detach().sum(), len(loss))
        grad_norm = optimizer.step(step.lr_scale, share=len(rows))
        metrics.add("grad_norm", grad_norm, 1)
        metrics.add("tokens", n_targets, 1)
        if step.number % 100 == 0 or step.last:
            for idx in corpus.heldout.split(rows_at_a_time):
                with torch.no_grad():
                    loss = next_token_loss(model, idx)
                metrics.add("heldout_loss", loss.sum(), len(loss))
        step.log(metrics)


def next_token_loss(model: GPT, idx: Tensor) -> Tensor:
    """-log p of each token of idx (B, T+1) but the first -> (B * T,)."""
    logits = model(idx[:, :-1]).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")


def train_zero(run: Run, base: GPT) -> None:
    """Reinforcement learning from the base, by rewards alone."""
    run_grpo(run, run.cfg, base, run.cfg.rl_steps, run.task.make_problem, reward_function(run))


def run_grpo(run: Run, cfg: Config, policy: GPT, n_steps: int, make_problem, reward_fn) -> None:
    """Each step samples completions, scores them, compares those of a group, and updates the policy: see grpo.py.
    cfg is run.cfg, or a copy with changes in r1.py. make_problem(rng) returns a random problem."""
    reference = run.frozen(policy) if cfg.kl_coef else None
    policy = run.fast(policy, training=True, sampling=True)
    # AdamW alone, because RL gradients are noisy. It divides the mean gradient by the gradients' mean size (over about
    # 1,000 updates with beta2=0.999). So it takes small steps where noise is large. Muon's do not shrink.
    optimizer = Optimizer(policy, cfg.rl_lr, beta2=0.999)
    state = {"model": policy, "optimizer": optimizer}  # what resume.pt saves
    if cfg.ref_every:
        state["reference"] = reference  # it is no longer the base
    watch = Watch(make_problem, reward_fn)  # samples.jsonl: the answers to the same four problems over the steps
    # hold=0: after a short warm-up the learning rate falls at once, because RL learns most at the start. (In the other
    # stages it is constant until 40 % of the steps.)
    for step in run.steps(n_steps, hold=0.0, watch=watch, **state):
        problems = step.problems(cfg.rl_prompts, make_problem)
        metrics, rollout = grpo_step(policy, reference, optimizer, problems, reward_fn, run.task, cfg,
                                     step.generator, step.lr_scale)
        if cfg.ref_every and step.number % cfg.ref_every == 0:
            reference.load_state_dict(policy.state_dict())
        step.log(metrics, rollout)


def reward_function(run: Run):
    """The reward_fn of grpo.sample_rollout. It returns the task's scores and the "reward" that RL maximises: the
    weighted sum of accuracy and format. If the task returns a "reward" of its own, that one is used instead."""
    cfg = run.cfg

    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = run.task.reward(completion, problem)  # of the built-in tasks: rewards.rule_rewards
        reward = cfg.accuracy_weight * scores["accuracy"] + cfg.format_weight * scores.get("format", 0.0)
        return {"reward": reward, **scores}
    return reward_fn


def train_student(run: Run, zero: GPT, student_base: GPT) -> None:
    """Distillation of zero into the student's base, on problems of up to 6 operations (RL: up to 4). A student that is
    trained on short problems alone forgets the long ones (experiments/findings.md, 6)."""
    def make_problem(rng):
        return run.task.make_problem(rng, longer=True)

    cfg = run.cfg
    run_distillation(run, cfg, zero, student_base, cfg.distill_steps, make_problem, reward_function(run))


def run_distillation(run: Run, cfg: Config, teacher: GPT, student: GPT, n_steps: int, make_problem,
                     reward_fn) -> None:
    """In each step the teacher writes completions, and the student learns the teacher's probabilities: see distill.py.
    cfg and make_problem are as in run_grpo."""
    teacher = run.fast(teacher, training=cfg.divergence != "sft", sampling=not cfg.on_policy)
    student = run.fast(student, training=True, sampling=cfg.on_policy)
    optimizer = Optimizer(student, cfg.distill_adam_lr, cfg.distill_muon_lr)
    watch = Watch(make_problem, reward_fn, teacher)
    for step in run.steps(n_steps, watch=watch, model=student, optimizer=optimizer):
        problems = step.problems(cfg.distill_prompts, make_problem)
        metrics = distill_step(student, teacher, optimizer, problems, reward_fn, run.task, cfg,
                               step.generator, step.lr_scale)
        step.log(metrics)


# Stage(function, input stages, settings). The function gets the models of the input stages. If one of the settings
# changes, a run refuses the checkpoint of the stage, and of all stages that start from it.
STAGES = {
    "base": Stage(train_base, (), (Task, Text, Pretraining, Base)),
    "zero": Stage(train_zero, ("base",), (Questions, GRPOConfig)),
    "student_base": Stage(train_student_base, (), (Task, Text, Pretraining, StudentBase)),
    "student": Stage(train_student, ("zero", "student_base"), (Questions, DistillConfig)),
}

if __name__ == "__main__":
    main(STAGES, Config, __doc__)
