"""How the model answers one problem before RL and after 5, 20 and all steps of it: experiments/walkthrough.md.

    python experiments/walkthrough.py OUT [PROBLEM]     OUT holds a run of train.py; the default problem is 5-3*6+11

It trains zero once more, by train.py with the run's own settings, in a temporary folder, and samples answers to the
problem before some steps. The run itself is not touched.
"""
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from data.arithmetic import is_test  # noqa: E402
from grpo import group_advantages, grpo_step, sample_rollout  # noqa: E402
from model import GPT  # noqa: E402
from rewards import format_reward  # noqa: E402
from run import FIELDS, Config, UsageError, build_model, load_checkpoint, write_file  # noqa: E402

PAGE = ROOT / "experiments" / "walkthrough.md"
LOOKS = {0: "before RL: the base", 5: "after 5 steps", 20: "after 20 steps"}
SAMPLES, SHOWN = 256, 6

INTRODUCTION = """# One problem, step by step

`{command}` writes this page. It trains zero once more from the base in {out}/ (seed {seed}),
and samples answers to one problem on the way. The problem is `{question}`, {seen}.
Its answer is {answer}. At each of these steps the model of that moment answers it {samples} times at temperature 1.
*Likeliest* are its most frequent answers, with the
reward of each. *A group* is what one GRPO step would see of this problem: {group} answers, their rewards (accuracy +
format), and their advantages: the reward minus the group's mean, divided by the group's standard deviation. GRPO makes
the tokens of answers with a positive advantage likelier, and those with a negative one less likely. Nobody shows the
model a solution.
"""


def style(text: str) -> str:
    """How an answer is written, in words.

    >>> [style(t) for t in ("37", "<think></think><answer>37</answer>", "<think>8*7=56</think><answer>56</answer>")]
    ['no working', 'no working', 'works inside the tags']
    """
    if not re.search("[0-9]=", text):
        return "no working"
    return "works inside the tags" if format_reward(text) else "works, but the tags are not right"


def look(title: str, policy: GPT, problem, task, cfg: Config) -> list[str]:
    """The page's lines about the policy's answers."""
    rollout = sample_rollout(policy, [problem], train.reward_function(cfg, task), task, samples=SAMPLES,
                             max_new_tokens=cfg.rl_max_new_tokens,
                             generator=torch.Generator(cfg.device).manual_seed(cfg.seed))
    mean = lambda name: rollout.column(name).mean().item()
    styles = Counter(map(style, rollout.texts))
    scores = dict(zip(rollout.texts, rollout.scores))
    lines = [f"## {title}", "", f"Right {mean('accuracy'):.0%}, well formed {mean('format'):.0%}, "
             f"{sum(map(len, rollout.completions)) / SAMPLES:.1f} tokens on average; "
             + ", ".join(f"{name} {n / SAMPLES:.0%}" for name, n in styles.most_common()) + ".", "",
             "| likeliest | share | reward |", "|---|---|---|"]
    for text, n in Counter(rollout.texts).most_common(SHOWN):
        lines.append(f"| `{' '.join(text.split())}` | {n / SAMPLES:.1%} | {scores[text]['reward']:g} |")
    rewards = rollout.column("reward")[:cfg.rl_samples]
    advantages = group_advantages(rewards[None], cfg.scale)[0]
    lines += ["", "| a group | reward | advantage |", "|---|---|---|"]
    for text, reward, adv in zip(rollout.texts, rewards, advantages):
        lines.append(f"| `{' '.join(text.split())}` | {reward:g} | {adv:+.2f} |")
    best, largest = int((rewards == rewards.max()).sum()), advantages[advantages.abs().argmax()]
    said = "All earned the same: the group has no signal, and GRPO leaves it out."
    if largest:
        said = (f"{best} of {len(rewards)} earned the most. The largest advantage is {largest:+.2f}: the rarer a "
                "reward is in its group, the more it weighs.")
    return [*lines, "", said, ""]


def walk(out: Path, text: str) -> list[str]:
    """Train zero from the base in `out`, and look at its answers before some steps -> the page's lines. Raises
    UsageError if that fails."""
    cfg = Config(**json.loads((out / "results.json").read_text())["config"])
    if cfg.task != "arithmetic" or cfg.problems:
        raise UsageError("the page shows problems of the default task")
    task = train.make_task(cfg)
    problem, calls, lines = task.parse(text), itertools.count(), []

    def watched(policy, *args, **kwargs):
        done = next(calls)
        if done in LOOKS:
            lines.extend(look(LOOKS[done], policy, problem, task, cfg))
        return grpo_step(policy, *args, **kwargs)

    flags = [f"--{key}={value}" for key, value in vars(cfg).items() if value != FIELDS[key].default]
    with tempfile.TemporaryDirectory(dir=out) as folder, mock.patch.object(train, "grpo_step", watched):
        shutil.copy(out / "base.pt", folder)
        if train.main(["--stage=zero", f"--out={folder}", *flags]):
            raise UsageError("training zero failed")
        zero = build_model(load_checkpoint(Path(folder) / "zero.pt", "zero")).to(cfg.device)
        lines += look(f"after {cfg.rl_steps} steps: zero", zero, problem, task, cfg)
    seen = "which is held out of the corpus and of RL" if is_test(problem.question) else "which the models may have met"
    head = INTRODUCTION.format(command=f"python experiments/walkthrough.py {out}", out=out, seed=cfg.seed, seen=seen,
                               question=problem.question, answer=problem.answer, samples=SAMPLES, group=cfg.rl_samples)
    return [*head.splitlines(), "", *lines]


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        if not 1 <= len(argv) <= 2:
            raise UsageError("python experiments/walkthrough.py OUT [PROBLEM]")
        lines = walk(Path(argv[0]), argv[1] if len(argv) == 2 else "5-3*6+11")
        write_file(PAGE, "\n".join(lines).encode())
        print(f"wrote {PAGE.relative_to(ROOT)}")
        return 0
    except (ValueError, OSError) as error:
        print(f"walkthrough.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
