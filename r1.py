"""DeepSeek-R1's whole pipeline (arXiv 2501.12948v2, section 3), from random weights, on a task in two languages.

    base          next-token prediction on the corpus of data/bilingual.py
    zero          GRPO on the base: accuracy + format. It reasons, but mixes languages
    dev1          cold start: the base, fine-tuned on a few of zero's answers that are correct and in one language
    dev2          GRPO on dev1: accuracy + format + language
    dev3          rejection sampling: the base, fine-tuned on dev2's good answers and on everyday questions
    r1            GRPO on dev3: arithmetic and everyday questions, each kind with rewards of its own
    student       distillation: a smaller GPT learns r1's probabilities, on r1's good answers
    student_sft   the same GPT, fine-tuned on r1's good answers, as in the paper

    python r1.py                       everything, then the report, in out/r1; it takes the flags of train.py
    python r1.py --stage=dev1          one stage, on earlier checkpoints
    python r1.py --ask="8 times 7 minus 19+5"

An answer is good if it is correct, well formed and wholly in the question's language. An answer to an everyday question
is good if it is correct. Each stage is an entry of a table, as in train.py, so it resumes and logs in the same way.

Where we differ from the paper, and why
1. The paper's cold start has thousands of zero's answers, which people and a model corrected. Ours takes zero's good
   answers (two fifths of all) as they are.
2. dev3 learns everyday questions from the base's own correct answers. The paper takes them from another pipeline.
3. In dev3, dev2 answers longer problems than RL had: fine-tuning on short problems alone would make the model forget
   the long ones (docs/r1.md).
4. r1's reward for everyday questions is a rule. The paper's is a preference model, in the last 400 of 1,700 steps.
5. Each step draws new samples and learns from them. The paper draws all samples of a stage first.
"""
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import train
from data.bilingual import Everyday
from distill import DistillConfig, distill_step
from engine.command import main
from engine.loop import Run, Stage, Watch
from engine.optimizer import Optimizer
from engine.settings import Questions
from grpo import GRPOConfig
from model import GPT
from train import reward_function, run_distillation, run_grpo


@dataclass
class FineTuning:
    sft_muon_lr: float = 2e-3       # learning rate of Muon in fine-tuning; 0: AdamW alone
    sft_adam_lr: float = 1e-3       # learning rate of AdamW in fine-tuning


@dataclass
class ColdStart(FineTuning):
    cold_steps: int = 4             # steps of the cold start
    cold_prompts: int = 192         # problems in a step, one completion of zero each
    cold_epochs: int = 3            # epochs over a step's completions


@dataclass
class Rejection(FineTuning):
    sft_steps: int = 16             # steps of dev3: rejection sampling and fine-tuning
    sft_epochs: int = 2             # epochs over a step's completions


@dataclass
class Dev2:
    dev2_steps: int = 100           # rollouts in dev2
    language_weight: float = 1.0    # weight of the language reward
    cold_start: bool = True         # dev2 starts from dev1; False: from the base


@dataclass
class FinalRL:
    r1_steps: int = 60              # rollouts in r1
    everyday_share: float = 0.25    # share of everyday questions in r1 and in its students


@dataclass
class Config(train.Config, ColdStart, Dev2, Rejection, FinalRL):
    task: Literal["bilingual"] = "bilingual"  # r1.py has a task of its own
    # These stages were tuned with more rollouts and fewer updates on each than train.py has.
    rl_steps: int = 200             # steps of RL in zero, each with a new rollout
    rl_minibatches: int = 2         # minibatches of a rollout, each for one update
    distill_steps: int = 50         # steps of distillation, each with new completions


# Rewards


def language_reward_function(run: Run) -> Callable:
    """accuracy + format + language. An everyday question keeps the reward of the task (data/bilingual.py)."""
    plain = reward_function(run)

    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = plain(completion, problem)
        if not isinstance(problem, Everyday):
            scores["reward"] += run.cfg.language_weight * scores["language"]
        return scores
    return reward_fn


def good(run: Run) -> Callable:
    """Scores for rejection sampling: accuracy and format are both 1 if an answer is good (see above), else 0."""
    plain = reward_function(run)

    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = plain(completion, problem)
        accepted = float(scores["accuracy"] and (isinstance(problem, Everyday) or scores["consistent"]))
        return scores | {"accuracy": accepted, "format": accepted}
    return reward_fn


def longer_problems(run: Run) -> Callable:
    """make_problem(rng) for arithmetic, with problems as long as those of the corpus."""
    def make_problem(rng: random.Random):
        return run.task.make_problem(rng, longer=True)
    return make_problem


def mixed_problems(run: Run, longer: bool) -> Callable:
    """make_problem(rng) for arithmetic and everyday questions."""
    def make_problem(rng: random.Random):
        if rng.random() < run.cfg.everyday_share:
            return run.task.make_everyday(rng)
        return run.task.make_problem(rng, longer)
    return make_problem


# The stages, in the paper's order


def train_dev1(run: Run, base: GPT, zero: GPT) -> None:
    """The cold start: fine-tune the base on a few hundred good answers of zero."""
    cfg = replace(run.cfg, distill_prompts=run.cfg.cold_prompts, distill_minibatches=4,
                  distill_epochs=run.cfg.cold_epochs)
    fine_tune(run, cfg, base, [(zero, run.task.make_problem)], cfg.cold_steps)


def train_dev2(run: Run, base: GPT, dev1: GPT) -> None:
    """RL on arithmetic, with the language reward."""
    cfg = run.cfg
    start = dev1 if cfg.cold_start else base
    run_grpo(run, cfg, start, cfg.dev2_steps, run.task.make_problem, language_reward_function(run))


def train_dev3(run: Run, base: GPT, dev2: GPT) -> None:
    """Rejection sampling, then fine-tuning of the base. Of every four steps, three learn from dev2's answers to
    arithmetic, and one from the base's own answers to everyday questions."""
    cfg = replace(run.cfg, distill_epochs=run.cfg.sft_epochs)
    turns = [(dev2, longer_problems(run))] * 3 + [(copy.deepcopy(base), run.task.make_everyday)]
    fine_tune(run, cfg, base, turns, cfg.sft_steps)


def fine_tune(run: Run, cfg: Config, model: GPT, turns: list[tuple[GPT, Callable]], n_steps: int) -> None:
    """Supervised fine-tuning on good answers, without a loss on prompts. A turn is a teacher, and the make_problem(rng)
    of the problems that it answers. Each step takes the next turn."""
    cfg = replace(cfg, divergence="sft", on_policy=False)
    for teacher in dict.fromkeys(teacher for teacher, _ in turns):
        run.fast(teacher, sampling=True)
    model = run.fast(model, training=True)
    optimizer = Optimizer(model, cfg.sft_adam_lr, cfg.sft_muon_lr)
    first_teacher, first_problems = turns[0]
    watch = Watch(first_problems, good(run), first_teacher)
    for step in run.steps(n_steps, watch=watch, model=model, optimizer=optimizer):
        teacher, make_problem = turns[step.number % len(turns)]
        problems = step.problems(cfg.distill_prompts, make_problem)
        metrics = distill_step(model, teacher, optimizer, problems, good(run), run.task, cfg, step.generator,
                               step.lr_scale)
        step.log(metrics)


def train_r1(run: Run, dev3: GPT) -> None:
    """RL on arithmetic and everyday questions ("RL for all scenarios")."""
    problems = mixed_problems(run, longer=False)
    run_grpo(run, run.cfg, dev3, run.cfg.r1_steps, problems, language_reward_function(run))


def train_student(run: Run, r1: GPT, student_base: GPT) -> None:
    """Distil r1 into the student's base with its probabilities (our way)."""
    problems = mixed_problems(run, longer=True)
    run_distillation(run, run.cfg, r1, student_base, run.cfg.distill_steps, problems, good(run))


def train_student_sft(run: Run, r1: GPT, student_base: GPT) -> None:
    """Distil r1 into the student's base with its answers alone (the paper's way)."""
    cfg = replace(run.cfg, divergence="sft", on_policy=False)
    problems = mixed_problems(run, longer=True)
    run_distillation(run, cfg, r1, student_base, cfg.distill_steps, problems, good(run))


TEACHING = (Questions, DistillConfig, FinalRL)
STAGES = {
    "base":         train.STAGES["base"],
    "zero":         train.STAGES["zero"],
    "dev1":         Stage(train_dev1, starts=("base", "zero"), settings=(ColdStart,)),
    "dev2":         Stage(train_dev2, starts=("base", "dev1"), settings=(Questions, GRPOConfig, Dev2)),
    "dev3":         Stage(train_dev3, starts=("base", "dev2"), settings=(Rejection, "distill_prompts",
                                                                     "distill_minibatches")),
    "r1":           Stage(train_r1, starts=("dev3",), settings=(Questions, GRPOConfig, FinalRL)),
    "student_base": train.STAGES["student_base"],
    "student":      Stage(train_student, starts=("r1", "student_base"), settings=TEACHING),
    "student_sft":  Stage(train_student_sft, starts=("r1", "student_base"), settings=TEACHING),
}

if __name__ == "__main__":
    main(STAGES, Config, __doc__)
