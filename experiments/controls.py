"""Controls: stages that could refute the claims about train.py's stages. Each is also an example of a fork.

    python experiments/controls.py NAME --out=out    trains the control NAME; takes the flags of train.py

    shuffled          zero, but the rewards of each group are shuffled, so that they carry no information
    format_alone      zero, but only the format is rewarded
    batch_baseline    zero, but the baseline of a reward is the mean of the whole rollout, not of its group
    all_completions   zero, but the KL penalty acts on all completions, as in Algorithm 1 of DeepSeekMath (2402.03300)
    student_rl        RL on student_base instead of distillation, with as many updates on as many completions
    student_short     the student, but distilled on problems of the lengths that zero was trained on
    zero_no_working   zero from base_no_working, whose corpus has no answers with steps
    zero_no_wait      zero from base_no_wait, whose corpus has no "wait" (for --task=countdown)

A control is saved as NAME.pt beside zero.pt. The stages of train.py never start from a control, but the report, --ask
and --evaluate of train.py include it. A control starts from the checkpoints in out/, and trains the missing ones first.
The settings that shaped these checkpoints must not change.
"""
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import train  # noqa: E402
from data import arithmetic, countdown  # noqa: E402
from distill import DistillConfig  # noqa: E402
from engine.arguments import Program  # noqa: E402
from engine.command import run_command  # noqa: E402
from engine.loop import Run, Stage, Step, Watch  # noqa: E402
from engine.optimizer import Optimizer  # noqa: E402
from engine.parallel import end  # noqa: E402
from engine.settings import Questions  # noqa: E402
from engine.tasks import make_task  # noqa: E402
from grpo import GRPOConfig, Rollout, group_advantages, grpo_update, sample_rollout, token_loss  # noqa: E402
from model import GPT  # noqa: E402

# Other advantages. Each function takes a rollout of N = P * G completions, the settings and a generator, and returns
# advantages (N,).


def groups(rollout: Rollout, cfg: train.Config, name: str = "reward") -> Tensor:
    """One of the scores, (P, G)."""
    return rollout.column(name).view(-1, cfg.rl_samples)


def usual(rollout: Rollout, cfg: train.Config, generator: torch.Generator | None = None) -> Tensor:
    """The advantages of train.py."""
    return group_advantages(groups(rollout, cfg), cfg.scale).flatten()


def shuffled(rollout: Rollout, cfg: train.Config, generator: torch.Generator) -> Tensor:
    """The rewards of each group are shuffled among its completions. Training cannot improve the policy, unless the code
    has a bug."""
    rewards = groups(rollout, cfg)
    order = torch.rand(rewards.shape, generator=generator, device=generator.device).argsort(dim=1)  # (P, G)
    return group_advantages(rewards.gather(1, order.cpu()), cfg.scale).flatten()


def batch_baseline(rollout: Rollout, cfg: train.Config, generator: torch.Generator) -> Tensor:
    """The whole rollout is one group. Completions of easy prompts then tend to have positive advantages, and those of
    hard prompts negative ones."""
    return group_advantages(rollout.column("reward")[None], cfg.scale)[0]


def all_completions(rollout: Rollout, cfg: train.Config, generator: torch.Generator) -> Tensor:
    """grpo_update skips rows with advantage 0. With an advantage of 1e-30 instead, it computes these rows, and they add
    nothing but the KL penalty."""
    adv = usual(rollout, cfg)
    return adv.where(adv != 0, 1e-30)


def train_with(advantages: Callable, run: Run, base: GPT) -> None:
    """A stage: zero, but with these advantages."""
    run_grpo_with(run, run.cfg, base, advantages)


def sample_groups(run: Run, cfg: train.Config, step: Step, policy: GPT) -> Rollout:
    """The rollout of a step of train.run_grpo: G completions of each of P new prompts."""
    problems = step.problems(cfg.rl_prompts, run.task.make_problem)
    return sample_rollout(policy, problems, train.reward_function(run), run.task, cfg.rl_samples,
                          cfg.rl_max_new_tokens, step.generator)


def run_grpo_with(run: Run, cfg: train.Config, policy: GPT, advantages: Callable, loss_fn: Callable = token_loss,
                  sample: Callable = sample_groups, **parts) -> None:
    """train.run_grpo with other functions for the advantages, the loss and the rollout. The loop has the parts of
    grpo_step instead of grpo_step. `parts` are further objects that resume.pt saves."""
    reference = run.frozen(policy) if cfg.kl_coef else None
    policy = run.fast(policy, training=True, sampling=True)
    optimizer = Optimizer(policy, cfg.rl_lr, beta2=0.999)
    parts |= {"model": policy, "optimizer": optimizer}
    if cfg.ref_every:
        parts["reference"] = reference
    watch = Watch(run.task.make_problem, train.reward_function(run))
    for step in run.steps(cfg.rl_steps, hold=0.0, watch=watch, **parts):
        rollout = sample(run, cfg, step, policy)
        adv = advantages(rollout, cfg, step.generator)  # (N,)
        metrics = grpo_update(policy, reference, optimizer, rollout, adv, cfg, step.generator, step.lr_scale, loss_fn)
        if cfg.ref_every and step.number % cfg.ref_every == 0:
            reference.load_state_dict(policy.state_dict())
        step.log(metrics, rollout)


# Another reward, other problems


def train_format_alone(run: Run, base: GPT) -> None:
    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = run.task.reward(completion, problem)
        return scores | {"reward": scores["format"]}

    train.run_grpo(run, run.cfg, base, run.cfg.rl_steps, run.task.make_problem, reward_fn)


def train_student_rl(run: Run, student_base: GPT) -> None:
    """RL with as many updates as distillation, on as many completions per update, and with problems of the same
    lengths."""
    def make_problem(rng):
        return run.task.make_problem(rng, longer=True)

    updates = run.cfg.distill_steps * run.cfg.distill_epochs * run.cfg.distill_minibatches
    completions = run.cfg.distill_prompts / run.cfg.distill_minibatches  # per update
    prompts = math.ceil(completions * run.cfg.rl_minibatches / run.cfg.rl_samples)
    cfg = replace(run.cfg, rl_prompts=prompts)
    n_steps = math.ceil(updates / cfg.rl_minibatches)
    train.run_grpo(run, cfg, student_base, n_steps, make_problem, train.reward_function(run))


def train_student_short(run: Run, zero: GPT, student_base: GPT) -> None:
    train.run_distillation(run, run.cfg, zero, student_base, run.cfg.distill_steps, run.task.make_problem,
                           train.reward_function(run))


# Another corpus. The class of a task has a table of response styles. A class that inherits from it has another table.


def without(styles: dict[str, float], gone: tuple[str, ...], instead: str) -> dict[str, float]:
    """The shares of the response styles, if the style `instead` takes the place of the styles in `gone`.

    >>> round(without(arithmetic.STYLES, arithmetic.WORKED, "blurt")["blurt"], 2)
    0.84
    """
    shares = dict(styles)
    for style in gone:
        shares[instead] += shares[style]
        shares[style] = 0.0
    return shares


class NoWorking(arithmetic.Arithmetic):
    styles = without(arithmetic.STYLES, arithmetic.WORKED, instead="blurt")


class NoWait(countdown.Countdown):
    styles = without(countdown.STYLES, ("rechecked",), instead="worked")


def make_task_of(kind: type) -> Callable:
    """make_task, but with the class `kind` instead of its base class, also inside a task with --problems or --corpus.
    The result raises ValueError for other tasks."""
    def change(task):
        if type(task) is kind.__base__:
            return kind(**vars(task))
        if "task" not in vars(task):
            raise ValueError(f"this control needs --task={kind.__base__.__name__.lower()}")
        task.task = change(task.task)
        return task

    return lambda cfg: change(make_task(cfg))


# The tables: the stage of each control, and the class of its task if this is not the class of train.py's task

RL = (Questions, GRPOConfig)
STUDENT_RL = (*RL, "distill_steps", "distill_prompts", "distill_minibatches", "distill_epochs")
CONTROLS = {
    "shuffled":          Stage(partial(train_with, shuffled), starts=("base",), settings=RL),
    "format_alone":      Stage(train_format_alone, starts=("base",), settings=RL),
    "batch_baseline":    Stage(partial(train_with, batch_baseline), starts=("base",), settings=RL),
    "all_completions":   Stage(partial(train_with, all_completions), starts=("base",), settings=RL),
    "student_rl":        Stage(train_student_rl, starts=("student_base",), settings=STUDENT_RL),
    "student_short":     Stage(train_student_short, starts=("zero", "student_base"),
                               settings=(Questions, DistillConfig)),
    "base_no_working":   train.STAGES["base"],
    "zero_no_working":   Stage(train.train_zero, starts=("base_no_working",), settings=RL),
    "base_no_wait":      train.STAGES["base"],
    "zero_no_wait":      Stage(train.train_zero, starts=("base_no_wait",), settings=RL),
}
FORUMS = {"base_no_working": NoWorking, "zero_no_working": NoWorking, "base_no_wait": NoWait, "zero_no_wait": NoWait}


def needed(name: str, stages: dict[str, Stage]) -> list[str]:
    """The stages that a control needs, in order: those that it starts from, directly or not, and then the control.

    >>> needed("student_rl", train.STAGES | CONTROLS), needed("zero_no_wait", train.STAGES | CONTROLS)
    (['student_base', 'student_rl'], ['base_no_wait', 'zero_no_wait'])
    """
    starts = [stage for start in stages[name].starts for stage in needed(start, stages)]
    return list(dict.fromkeys([*starts, name]))


def main(argv: list[str], controls: dict[str, Stage] = CONTROLS, doc: str = __doc__, program: str = "controls") -> int:
    """Run a command line, NAME and then flags of train.py -> exit code. NAME is a stage of the table `controls`."""
    name, *flags = argv or [""]
    if name in ("-h", "--help"):
        print(doc)
        return 0
    if name not in controls:
        print(f"{program}.py: {name!r} is not one of {', '.join(controls)}", file=sys.stderr)
        return 2
    stages = train.STAGES | controls
    preset = [flag.removeprefix("--preset=") for flag in flags if flag.startswith("--preset=")]
    flags = [f"--out={Path('out', *preset)}", *flags]  # where train.py writes by default; the last --out counts
    out = Path([flag.removeprefix("--out=") for flag in flags if flag.startswith("--out=")][-1])
    there = [stage for stage in stages if (out / f"{stage}.pt").exists()]
    # The table includes the controls that the folder already has, so a change of their settings is refused too.
    table = {stage: stages[stage] for stage in stages if stage in [*train.STAGES, *there, *needed(name, stages)]}
    maker = make_task_of(FORUMS[name]) if name in FORUMS else make_task
    for stage in needed(name, stages):
        if stage == name or stage not in there:
            code = run_command(Program(table, train.Config, doc, maker, f"experiments/{program}.py {name}"),
                               [*flags, f"--stage={stage}"])
            if code:
                return code
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal may not be able to show ± and ▁
        stream.reconfigure(errors="replace")
    end(main(sys.argv[1:]))
