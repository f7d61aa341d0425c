"""DeepSeek-R1's whole pipeline (arXiv 2501.12948v2, section 3), from random weights, in a world of two languages.

    base          next-token prediction on the corpus of data/bilingual.py
    zero          GRPO on the base: accuracy + format. It reasons, but mixes languages
    dev1          cold start: the base, fine-tuned on a few of zero's answers that are right and in one language
    dev2          GRPO on dev1: accuracy + format + language
    dev3          rejection sampling: the base, fine-tuned on dev2's good answers and on everyday questions
    r1            GRPO on dev3: arithmetic and everyday questions, each kind with rewards of its own
    student       a smaller GPT that learns r1's probabilities, on r1's good answers
    student_sft   the same by fine-tuning on these answers, as in the paper

    python r1.py                       everything, then the reports, in out/r1; it takes the flags of train.py
    python r1.py --stage=dev1          one stage, on earlier checkpoints
    python r1.py --ask="8 times 7 minus 19+5"

An answer is good if it is right, well formed and wholly in the question's language; an everyday answer, if it is right.
Each stage is an entry of the same table as those of train.py, so it resumes, logs and is evaluated as they are.

Where we differ from the paper, and why
1. Its cold start has thousands of zero's answers that people and a model corrected. Ours are zero's good ones as they
   are: two fifths of its answers.
2. dev3's everyday answers are the base's own, if right. The paper takes them from another pipeline.
3. Of dev2 longer problems are asked than RL has: fine-tuning on short ones alone would unlearn the long ones
   (docs/r1.md).
4. r1's reward for everyday questions is a rule. The paper's is a preference model, in the last 400 of 1,700 steps.
5. Samples are drawn step by step, and learnt from before the next are drawn. The paper draws them all at first.
"""
import copy
import dataclasses
import random
import sys
from collections.abc import Callable

from data.bilingual import Everyday
from model import GPT
from parallel import end
from run import (BASE, DEPENDS, DEV1, DEV2, DEV3, R1, STUDENT, STUDENT_BASE, STUDENT_RL, STUDENT_SFT, ZERO, Config, Run)
from train import STAGES, distil, main, reinforce, reward_function, train_base, train_zero


# Rewards


def language_reward_function(cfg: Config, task) -> Callable:
    """accuracy + format + language; for an everyday question the reward of the task (data/bilingual.py)."""
    plain = reward_function(cfg, task)

    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = plain(completion, problem)
        if not isinstance(problem, Everyday):
            scores["reward"] += cfg.language_weight * scores["language"]
        return scores
    return reward_fn


def good(cfg: Config, task) -> Callable:
    """Rejection sampling by more than distil's two rules: accuracy and format are 1 if an answer is good, else 0."""
    plain = reward_function(cfg, task)

    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = plain(completion, problem)
        accepted = float(scores["accuracy"] and (isinstance(problem, Everyday) or scores["consistent"]))
        return scores | {"accuracy": accepted, "format": accepted}
    return reward_fn


def mixed(run: Run, longer: bool) -> Callable:
    """make_problem(rng) of arithmetic and everyday questions."""
    task = run.task

    def make_problem(rng: random.Random):
        return task.make_everyday(rng) if rng.random() < run.cfg.everyday_share else task.make_problem(rng, longer)
    return make_problem


# The stages, in the paper's order


def fine_tune(run: Run, name: str, turns: list[tuple[GPT, Callable]], model: GPT, steps: int, **settings) -> None:
    """Supervised fine-tuning of the model on good answers, prompts masked. The turns are those of train.distil."""
    cfg = dataclasses.replace(run.cfg, divergence="sft", on_policy=False, distill_muon_lr=run.cfg.sft_muon_lr,
                              distill_adam_lr=run.cfg.sft_adam_lr, **settings)
    distil(run, name, turns, model, steps, cfg, good(cfg, run.task))


def train_dev1(run: Run, name: str, base: GPT, zero: GPT) -> None:
    """The cold start: a few hundred good answers of zero."""
    cfg = run.cfg
    fine_tune(run, name, [(zero, run.task.make_problem)], base, cfg.cold_steps, distill_prompts=cfg.cold_prompts,
              distill_minibatches=4, distill_epochs=cfg.cold_epochs)


def train_dev2(run: Run, name: str, base: GPT, dev1: GPT) -> None:
    """RL on arithmetic, with the language reward."""
    cfg = run.cfg
    reinforce(run, name, dev1 if cfg.cold_start else base, cfg.dev2_steps, cfg.rl_prompts, run.task.make_problem,
              language_reward_function(cfg, run.task))


def train_dev3(run: Run, name: str, base: GPT, dev2: GPT) -> None:
    """Rejection sampling, and the base begins anew: of four steps, three learn from dev2's answers to problems of
    arithmetic, and one from the base's own to everyday questions."""
    task, cfg = run.task, run.cfg
    turns = [(dev2, lambda rng: task.make_problem(rng, longer=True))] * 3 + [(copy.deepcopy(base), task.make_everyday)]
    fine_tune(run, name, turns, base, cfg.sft_steps, distill_epochs=cfg.sft_epochs)


def train_r1(run: Run, name: str, dev3: GPT) -> None:
    """RL for all scenarios."""
    cfg = run.cfg
    reinforce(run, name, dev3, cfg.r1_steps, cfg.rl_prompts, mixed(run, longer=False),
              language_reward_function(cfg, run.task))


def train_student(run: Run, name: str, r1: GPT, student: GPT) -> None:
    """r1 into the student's base: by its probabilities (ours), or by its answers alone (the paper's way)."""
    cfg = dataclasses.replace(run.cfg, divergence="sft") if name == STUDENT_SFT else run.cfg
    distil(run, name, [(r1, mixed(run, cfg.distill_longer))], student, cfg.distill_steps, cfg, good(cfg, run.task))


# Each stage's function, and the stages whose models it is called with
PIPELINE = {BASE: (train_base, []), ZERO: (train_zero, [BASE]), DEV1: (train_dev1, [BASE, ZERO]),
            DEV2: (train_dev2, [BASE, DEV1]), DEV3: (train_dev3, [BASE, DEV2]), R1: (train_r1, [DEV3]),
            STUDENT_BASE: (train_base, []), STUDENT: (train_student, [R1, STUDENT_BASE]),
            STUDENT_SFT: (train_student, [R1, STUDENT_BASE]), STUDENT_RL: (train_zero, [STUDENT_BASE])}

if __name__ == "__main__":
    for table, column in ((STAGES, 0), (DEPENDS, 1)):
        table.clear()
        table.update({name: entry[column] for name, entry in PIPELINE.items()})
    end(main(["--task=bilingual", "--out=out/r1", *sys.argv[1:]], "r1.py", __doc__))
