"""Twelve bugs that real RL code has had. docs/bugs.md shows the symptoms of each, and where it was seen.

    python experiments/bugs.py NAME --out=out    RL with the bug NAME for 60 steps, from out/base.pt
    python experiments/bugs.py --all --out=out   RL with each bug, and the controls without a bug
    python experiments/bugs.py NAME --test       the test that notices the bug NAME, without and with the bug
    python experiments/bugs.py --table           the tables of docs/bugs.md, from experiments/bugs.json
    python experiments/bugs.py --figure          experiments/bugs.png, from experiments/bugs.json
    python experiments/bugs.py --quiz            bugs_quiz.png, in another order, with letters for titles

RL computes in float32, with --rl_minibatches=2, the other settings of the base and --seed=0 (or another). Each curve
goes to out/bugs.json as soon as it is finished. --all leaves out the curves that are there already. With an --out,
--table and --figure read out/bugs.json. The figure has the seeds 1 and 2, too, where a bug and its control have them.

A bug is a patch: it replaces a public function by another, which is defined here. Most of these call the correct
function and spoil what goes in or comes out. So a bug has a few lines, and repeats no code that may change.
"""
import argparse
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import engine.speed.sampler  # noqa: E402
import grpo  # noqa: E402
import rewards  # noqa: E402
import train  # noqa: E402
from data.tokenizer import END_OF_TEXT_ID  # noqa: E402
from engine.ask import stored_config  # noqa: E402
from engine.evaluation import evaluate  # noqa: E402
from engine.files import load_checkpoint, write_file  # noqa: E402
from engine.loop import Run, Step, lr_schedule  # noqa: E402
from engine.machine import machine, tune_libraries  # noqa: E402
from engine.optimizer import Optimizer  # noqa: E402
from engine.tasks import make_task  # noqa: E402
from engine.terminal import UsageError  # noqa: E402
from grpo import Batch, Rollout  # noqa: E402
from model import GPT  # noqa: E402
from patches import patched, run_tests  # noqa: E402

CURVES = ROOT / "experiments" / "bugs.json"  # the curves that docs/bugs.md is about
STEPS = 60
HELD_OUT = 128  # test problems of the evaluation after the last step, 16 answers to each

# The functions that the bugs call. (patches.swap replaces the names in modules and dicts, and leaves these alone.)
correct = SimpleNamespace(**{name: getattr(grpo, name) for name in (
    "grpo_loss", "grpo_step", "make_batch", "make_minibatch", "sample_rollout")})


# The bugs. Each function has the arguments of the function that it replaces


def mask_from_padding(rollout: Rollout, rows: list[int], device: torch.device) -> Batch:
    """make_batch, if the padding is the stop token, and the mask is `token != padding`."""
    batch = correct.make_batch(rollout, rows, device)
    target = batch.idx[:, 1:].cpu()
    kept = target[batch.mask] != END_OF_TEXT_ID  # (M,)
    batch.mask = batch.mask & (target != END_OF_TEXT_ID)
    batch.row, batch.sampler_logp = batch.row[kept], batch.sampler_logp[kept]
    return batch


def without_stop_token(generate: Callable) -> Callable:
    """generate, but a completion ends before its stop token. (A completion of the stop token alone keeps it.)"""
    def wrapped(model, prompts, max_new_tokens, *, stop_ids, **options):
        completions, logp = generate(model, prompts, max_new_tokens, stop_ids=stop_ids, **options)
        kept = [len(c) - 1 if len(c) > 1 and c[-1] in stop_ids else len(c) for c in completions]
        return [c[:n] for c, n in zip(completions, kept)], [p[:n] for p, n in zip(logp, kept)]
    return wrapped


def at_temperature(factor: float, generate: Callable) -> Callable:
    """generate at another temperature than that of token_logprobs, which is 1."""
    def wrapped(*args, temperature=1.0, **options):
        return generate(*args, temperature=factor * temperature, **options)
    return wrapped


def encode_again(model, problems, reward_fn, task, samples, max_new_tokens, generator=None) -> Rollout:
    """sample_rollout, but a rollout keeps texts only, and encodes them for the update."""
    rollout = correct.sample_rollout(model, problems, reward_fn, task, samples, max_new_tokens, generator)
    for i, text in enumerate(rollout.texts):
        stop = [] if rollout.truncated[i] else list(task.stop_ids[:1])
        room = model.config.block_size - len(rollout.prompts[i])
        tokens = (task.encoding.encode_ordinary(text) + stop)[:room]
        rollout.completions[i] = tokens
        rollout.sampler_logp[i] = (rollout.sampler_logp[i] + [0.0] * len(tokens))[:len(tokens)]
    return rollout


def batch_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """group_advantages, but with mean and standard deviation of the whole rollout."""
    adv = rewards - rewards.mean()
    return adv / (rewards.std() + 1e-4) if scale == "std" else adv


def advantages_without_epsilon(rewards: Tensor, scale: str = "std") -> Tensor:
    """group_advantages, as the formula of the papers is written: 0 / 0 if all rewards of a group are equal."""
    adv = rewards - rewards.mean(dim=1, keepdim=True)
    return adv / rewards.std(dim=1, keepdim=True) if scale == "std" else adv


def first_answer(completion: str) -> str | None:
    """extract_answer, but it takes the first <answer>, wherever it is: inside the thought, or without a thought."""
    found = re.search("<answer>(.*?)</answer>", completion, re.DOTALL)
    return None if found is None else found[1].strip()


def step_keeping_gradients(self, lr_scale=1.0, share=1.0, has_gradient=True, clip=1.0) -> Tensor:
    """Optimizer.step of one process, without zero_grad: each gradient is added to all earlier ones."""
    if not has_gradient:
        return torch.zeros(())
    norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
    for part, lr in zip(self.parts, self.lrs):
        for group in part.param_groups:
            group["lr"] = lr * lr_scale
        part.step()
    return norm


def step_moving_reference(policy: GPT, reference: GPT, *args):
    """grpo_step, but after each step the reference is the policy."""
    result = correct.grpo_step(policy, reference, *args)
    reference.load_state_dict(policy.state_dict())
    return result


def k1_loss(logp, logp_old, logp_ref, adv, weight, *, clip_low, clip_high, kl_coef):
    """grpo_loss with the plain log-ratio as its penalty. It has the mean of the KL, but not its gradient."""
    clips = {"clip_low": clip_low, "clip_high": clip_high}
    loss, sums = correct.grpo_loss(logp, logp_old, None, adv, weight, kl_coef=0.0, **clips)
    k1 = logp - logp_ref
    return loss + kl_coef * (k1 * weight).sum(), sums | {"kl": k1.detach().sum()}


def negative_kl_loss(*args, kl_coef, **options):
    """grpo_loss, which subtracts the penalty from the loss."""
    return correct.grpo_loss(*args, kl_coef=-kl_coef, **options)


def means_of_micro_batches(rollout, rows, adv, cfg, device) -> tuple[list[Batch], int]:
    """make_minibatch, but the loss of each micro-batch is the mean over its own tokens."""
    batches, share = correct.make_minibatch(rollout, rows, adv, cfg, device)
    for batch in batches:
        batch.weight = batch.weight / batch.weight.sum()
    return batches, share


class Bug(NamedTuple):
    """A bug, and what shows it."""
    patches: tuple      # (module or class, the name of a function in it, the function with the bug), one or more
    test: str           # the test that fails
    field: str          # the field of log.jsonl that shows the bug first
    symptom: str        # what somebody with this bug sees, in a few words
    also: str = "accuracy"  # another field that the figure shows
    control: str = "none"   # the run without the bug beside which it is shown
    settings: dict = {}     # settings of the run that the control does not have


SAMPLERS = ((GPT, "generate", GPT.generate), (engine.speed.sampler, "generate", engine.speed.sampler.generate))
BUGS = {
    "pad_is_stop": Bug(
        ((grpo, "make_batch", mask_from_padding),),
        "tests/test_grpo.py::test_a_rollout_trains_the_tokens_that_were_sampled", "truncated",
        "Answers never end; here the log shows nothing", also="length"),
    "last_token": Bug(
        tuple((owner, name, without_stop_token(generate)) for owner, name, generate in SAMPLERS),
        "tests/test_sampler.py::test_completions_end_with_the_stop_token_they_sampled", "truncated",
        "The reward rises, but all answers count as cut off", also="length"),
    "temperature": Bug(
        tuple((owner, name, at_temperature(0.6, generate)) for owner, name, generate in SAMPLERS),
        "tests/test_sampler.py::test_generate_and_token_logprobs_agree_while_rows_leave", "sampler_gap",
        "The reward is higher than the evaluation says", also="entropy"),
    "encoded_again": Bug(
        ((grpo, "sample_rollout", encode_again),),
        "tests/test_grpo.py::test_a_rollout_trains_the_tokens_that_were_sampled", "sampler_gap",
        "The KL has spikes in single steps", also="kl"),
    "batch_baseline": Bug(
        ((grpo, "group_advantages", batch_advantages),),
        "tests/test_grpo.py::test_advantages_are_trls", "grad_norm",
        "The gradient falls less as groups lose their signal", also="no_signal"),
    "zero_by_zero": Bug(
        ((grpo, "group_advantages", advantages_without_epsilon),),
        "tests/test_grpo.py::test_equal_rewards_are_no_advantage", "loss",
        "The reward is 0 after one step, and the loss is NaN", also="length"),
    "answer_in_thought": Bug(
        ((rewards, "extract_answer", first_answer),),
        "tests/test_rewards.py::test_table", "format",
        "The accuracy is above the format", control="none_accuracy"),
    "gradients_kept": Bug(
        ((Optimizer, "step", step_keeping_gradients),),
        "tests/test_optimizer.py::test_optimizer_step_scales_clears_and_reports_the_norm", "grad_norm",
        "The gradient is near 1 or above from step 2 on, and accuracy dips"),
    "reference_moves": Bug(
        ((grpo, "grpo_step", step_moving_reference),),
        "tests/test_heart.py::test_grpo_alone", "kl",
        "The KL stays near 0 while the policy changes", control="none_kl"),
    "k1": Bug(
        ((grpo, "grpo_loss", k1_loss),),
        "tests/test_grpo.py::test_k3_as_a_loss_has_the_gradient_of_kl_ref_policy", "kl",
        "The KL begins below 0", control="none_kl"),
    "kl_sign": Bug(
        ((grpo, "grpo_loss", negative_kl_loss),),
        "tests/test_grpo.py::test_on_policy_loss_and_gradient", "kl",
        "The reward rises and then falls to 0, and the KL explodes", control="none_strong_kl"),
    "micro_batch_means": Bug(
        ((grpo, "make_minibatch", means_of_micro_batches),),
        "tests/test_grpo.py::test_memory_budget_does_not_change_the_step", "grad_norm",
        "Loss and gradient are many times too large", also="loss", settings={"micro_batch": 1024}),
}
CONTROLS = {  # runs without a bug, and their settings
    "none": {},
    "none_kl": {"kl_coef": 0.1},              # the default, 0.001, is too weak to be missed
    "none_strong_kl": {"kl_coef": 1.0},
    "none_accuracy": {"format_weight": 0.0},  # the format is not rewarded
}
OTHERS = {  # further runs: the bug, and the settings
    "answer_in_thought_with_format": ("answer_in_thought", {}),
    "k1_strong": ("k1", {"kl_coef": 1.0}),
    "kl_sign_weak": ("kl_sign", {"kl_coef": 0.1}),
}
RUNS = ({name: ("", settings) for name, settings in CONTROLS.items()} | OTHERS
        | {name: (name, CONTROLS[bug.control] | bug.settings) for name, bug in BUGS.items()})


# The curves


class Curve(Run):
    """A run that writes no files. It goes on after a loss that is not a number, at which train.py stops."""

    def steps(self, n: int, *, hold: float, watch, **parts) -> Iterator[Step]:
        self.rows = []  # the metrics of each step
        for number in range(1, n + 1):
            step = Step(number, number == n, *self.seeded(number, "zero"), lr_schedule(number, n, hold))
            yield step
            row = step.metrics.means()
            self.rows.append(row)
            print(f"{number}/{n}", *(f"{key} {row[key]:.3g}" for key in ("reward", "accuracy", "length")),
                  repr(step.rollout.texts[0])[:60], flush=True)


def make_run(out: Path, seed: int, steps: int, settings: dict) -> tuple[Curve, GPT]:
    """A run with the settings of out/base.pt, and the base, in float32. Raises UsageError if there is no base."""
    content = load_checkpoint(out / "base.pt", "base")
    cfg = replace(stored_config(train.Config, content["config"]), seed=seed, rl_steps=steps, rl_minibatches=2,
                  dtype="float32", **settings)
    torch.set_num_threads(cfg.threads)
    run = Curve(cfg, make_task(cfg), out, {}, train.STAGES)
    return run, run.build(content)


def train_with(name: str, out: Path, seed: int, steps: int) -> dict:
    """RL with a bug, or a control -> {"commit": .., "machine": .., "settings": .., "rows": {field: its value in each
    step}, "pass@1": .., ..}.

    "pass@1", "pass@1_se", "format" and "length" are of the last policy without the bug: figures of evaluate().
    """
    bug, settings = RUNS[name]
    patches = BUGS[bug].patches if bug else ()
    run, policy = make_run(out, seed, steps, settings)
    print(f"{name}, seed {seed}", flush=True)
    with patched(patches):
        train.train_zero(run, policy)
    problems = run.task.heldout_problems(HELD_OUT, "test", 0)
    found = evaluate(policy, problems, run.task, max_new_tokens=run.cfg.rl_max_new_tokens,
                     generator=torch.Generator().manual_seed(0))
    print(f"{name}, seed {seed}: pass@1 on {HELD_OUT} test problems {found['pass@1']:.3f}", flush=True)
    return {"commit": commit(), "machine": machine(run.cfg), "settings": settings,
            "rows": {field: [rounded(row[field]) for row in run.rows] for field in run.rows[0] if field != "tokens"},
            **{key: rounded(found[key]) for key in ("pass@1", "pass@1_se", "format", "length")}}


def commit() -> str:
    """The commit of this code, for the files with results. It ends in -dirty if the code is not as committed."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def rounded(value: float | None) -> float | str | None:
    """Four digits of a number. JSON has no NaN, so that becomes a text, which float() reads.

    >>> rounded(0.123456), rounded(float("nan")), rounded(None)
    (0.1235, 'nan', None)
    """
    if value is None:
        return None
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def read_curves(path: Path) -> dict[str, dict]:
    """The stored curves by NAME-SEED, or {} if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_json(path: Path, content: dict) -> None:
    """Write JSON with one line for each list."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text)
    write_file(path, (text + "\n").encode())


# What docs/bugs.md shows

SHOWN = (1, 2, 5, 10, 20, 40, 60)  # steps
SCALES = {"sampler_gap": "log", "grad_norm": "log", "kl": "symlog"}  # of axes that are not linear


def table(curves: dict[str, dict], name: str) -> str:
    """A Markdown table of the reward and of the field that shows a bug first, with the bug and without it."""
    bug = BUGS[name]
    pairs = [("with the bug", curves[f"{name}-0"]), ("correct", curves[f"{bug.control}-0"])]
    lines = [f"| step | {' | '.join(map(str, SHOWN))} | pass@1 after the last |", "|---" * (len(SHOWN) + 2) + "|"]
    for field in (bug.field, bug.also, "reward"):
        for label, curve in pairs:
            cells = [shown(curve["rows"][field][step - 1]) for step in SHOWN]
            end = correct_answers(curve) if field == "reward" else ""
            lines.append(f"| `{field}`, {label} | {' | '.join(cells)} | {end} |")
    return "\n".join(lines)


def all_runs(curves: dict[str, dict]) -> str:
    """A Markdown table of all stored runs and the pass@1 of their last policies."""
    lines = ["| run | settings | seed | pass@1 | format |", "|---|---|---|---|---|"]
    for key in sorted(curves, key=lambda key: (list(RUNS).index(key.rpartition("-")[0]), key)):
        name, _, seed = key.rpartition("-")
        curve = curves[key]
        settings = " ".join(f"`--{setting}={value}`" for setting, value in curve["settings"].items())
        lines.append(f"| `{name}` | {settings} | {seed} | {correct_answers(curve)} | {100 * curve['format']:.1f} |")
    return "\n".join(lines)


def correct_answers(curve: dict) -> str:
    """The pass@1 of a run's last policy, with its standard error, in %."""
    return f"{100 * curve['pass@1']:.1f} ± {100 * curve['pass@1_se']:.1f}"


def shown(value: float | str | None) -> str:
    """A number with three digits, as a cell of a table.

    >>> shown(0.123456), shown(12345.0), shown("nan"), shown(None)
    ('0.123', '12,345', 'NaN', 'null')
    """
    if value is None or value == "nan":
        return "null" if value is None else "NaN"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(curves: dict[str, dict], path: Path, quiz: bool = False) -> list[str]:
    """A PNG file with three panels for each bug: the reward, and two other fields -> the names of the bugs in the order
    of the figure. With `quiz`, this is another order, and letters replace the titles."""
    import matplotlib
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 6.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(6, 6, figsize=(11, 11), layout="constrained")
    names = random.Random(3).sample(list(BUGS), len(BUGS)) if quiz else list(BUGS)
    for i, (name, row) in enumerate(zip(names, axes.reshape(12, 3))):
        bug = BUGS[name]
        more = [seed for seed in (2, 1) if {f"{name}-{seed}", f"{bug.control}-{seed}"} <= curves.keys()]
        for ax, field in zip(row, ("reward", bug.field, bug.also)):
            for run, colour, label in ((bug.control, "#8a8a8a", "correct"), (name, "#c8590b", "with the bug")):
                for seed in (0,) if quiz else (*more, 0):
                    values = [math.nan if v is None else float(v) for v in curves[f"{run}-{seed}"]["rows"][field]]
                    ax.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.4 if seed else 1.2,
                            label=None if seed else label)
            if math.isnan(values[0]) and math.isnan(values[-1]):
                ax.text(0.5, 0.5, "with the bug: NaN", color=colour, ha="center", transform=ax.transAxes)
            ax.set_yscale(SCALES.get(field, "linear"), **({"linthresh": 1e-5} if field == "kl" else {}))
            if field in ("accuracy", "format"):  # beside each other, they are compared
                ax.set_ylim(0, 1.02)
            ax.set_title(field, loc="left", fontsize=6.5, color="#555555")
        title = row[0].annotate(chr(65 + i) if quiz else f"{i + 1}. {bug.symptom}", (0, 1), (0, 16), fontweight="bold",
                                xycoords="axes fraction", textcoords="offset points", fontsize=8)
        title.set_in_layout(False)  # it is wider than its panel
    axes[0, 0].legend(frameon=False, loc="lower right")
    figure.get_layout_engine().set(hspace=0.16, rect=(0, 0, 1, 0.975))  # room for the titles
    figure.supxlabel("RL step", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return names


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bugs.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=RUNS, metavar="NAME")
    for flag in ("all", "test", "table", "figure", "quiz"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--out", type=Path, metavar="DIR", help="has base.pt, and gets bugs.json (default: out)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(argv)
    if not (options.name or options.all or options.table or options.figure or options.quiz):
        parser.error(f"name a bug ({', '.join(BUGS)}), or give --all, --table, --figure or --quiz")
    if options.test and options.name not in BUGS:
        parser.error("--test needs the NAME of a bug")
    return options


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    options = parse(argv)
    out = options.out or Path("out")
    path = out / "bugs.json"
    stored = path if options.out else CURVES
    if options.test:
        bug = BUGS[options.name]
        for label, patches in (("without the bug", ()), ("with the bug", bug.patches)):
            found = run_tests([bug.test], patches)
            print(f"{bug.test}, {label}: {sum(map(bool, found.values()))} of {len(found)} fail")
    elif options.table:
        curves = read_curves(stored)
        print("\n\n".join([*(f"{name}\n\n{table(curves, name)}" for name in BUGS), all_runs(curves)]))
    elif options.figure:
        draw(read_curves(stored), stored.with_suffix(".png"))
    elif options.quiz:
        names = draw(read_curves(stored), Path("bugs_quiz.png"), quiz=True)
        print("bugs_quiz.png:", ", ".join(f"{chr(65 + i)} {name}" for i, name in enumerate(names)))
    else:
        tune_libraries()
        for name in RUNS if options.all else [options.name]:
            if options.all and f"{name}-{options.seed}" in read_curves(path):
                continue
            curve = train_with(name, out, options.seed, options.steps)
            write_json(path, read_curves(path) | {f"{name}-{options.seed}": curve})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"bugs.py: {error}", file=sys.stderr)
        sys.exit(2)
