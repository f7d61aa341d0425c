"""Variants of GRPO, each a function or two. docs/variants.md has the formulas, the results, and what they mean.

    python experiments/variants.py NAME --out=out    trains the variant NAME from out/base.pt; takes train.py's flags

    ours              train.py's loss without the KL penalty: token average, std, clip
    no_clip           ours without the clip
    deepseekmath      the loss is averaged over each completion first, as DeepSeekMath writes it
    reinforce         no group: the baseline is a running mean of the reward, and there is no ratio
    rloo              the baseline is the mean reward of the other completions of the group, and there is no ratio
    dr_grpo           no std, and a constant in place of the lengths
    dapo              a higher clip, only groups with a signal, a penalty for completions that are nearly too long
    gspo              one ratio for a completion
    cispo             the clip limits the factor of a token's gradient, and no token loses its gradient
    maxrl             advantages are divided by the mean reward of the group
    gdpo              accuracy and format become advantages of their own, which are then added
    deepseek_v32      no std, a KL penalty times the ratio, and completions that are too far off policy do not count

A variant is saved as NAME.pt beside base.pt, as the controls are (experiments/controls.py). A missing base is trained
first. A variant has some settings of its own, and refuses flags for these, and for settings that it does not use. If
the folder holds a zero.pt with other settings than the flags, take another folder: --base=out/base.pt --out=NEW.

`python experiments/findings.py --only=variants` measures all variants in two regimes (cells.py).
"""
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from torch import Tensor  # noqa: E402

import controls  # noqa: E402
from controls import RL, groups, run_grpo_with, sample_groups, usual  # noqa: E402
from engine.loop import Run, Stage, Step  # noqa: E402
from engine.parallel import end  # noqa: E402
from grpo import Batch, Rollout, group_advantages, grpo_loss, no_signal, token_loss  # noqa: E402
from model import GPT  # noqa: E402
from train import Config  # noqa: E402

LOGGED = 1e-9  # a KL coefficient that is too small to matter. With 0 there is no reference, and the log has no KL


# Advantages: (rollout of N completions, settings, generator) -> (N,). A class is one object for each run, which
# resume.pt saves


class RunningMean:
    """REINFORCE (Williams, 1992) with a baseline b: A_i = r_i - b. After each step, b becomes 0.9 b + 0.1 times the
    mean reward of the step. (In the first step it is this mean.) So no group is needed."""

    def __init__(self, decay: float = 0.9):
        self.decay, self.mean = decay, None

    def __call__(self, rollout: Rollout, cfg: Config, generator=None) -> Tensor:
        rewards = rollout.column("reward")
        baseline = rewards.mean() if self.mean is None else self.mean
        self.mean = self.decay * baseline + (1 - self.decay) * rewards.mean()
        return rewards - baseline

    def state_dict(self) -> dict:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict) -> None:
        self.mean = state["mean"]


def leave_one_out(rollout: Rollout, cfg: Config, generator=None) -> Tensor:
    """RLOO (2402.14740): A_i = r_i - the mean reward of the other G - 1 completions."""
    rewards, G = groups(rollout, cfg), cfg.rl_samples
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (G - 1)
    return (rewards - others).masked_fill(no_signal(rewards), 0.0).flatten()


def over_mean(rollout: Rollout, cfg: Config, generator=None) -> Tensor:
    """MaxRL (2602.02710): A_i = (r_i - mean r) / mean r, for a reward of 0 or 1. It maximises the log of the
    probability of a reward, so rarely solved prompts count for more. Here it is the weighted sum of this for accuracy
    and format."""
    adv = 0.0
    for name, weight in (("accuracy", cfg.accuracy_weight), ("format", cfg.format_weight)):
        rewards = groups(rollout, cfg, name)
        adv = adv + weight * group_advantages(rewards, "none") / rewards.mean(dim=1, keepdim=True).clamp(min=1e-4)
    return adv.flatten()


def each_reward(rollout: Rollout, cfg: Config, generator=None) -> Tensor:
    """GDPO (2601.05242): advantages of each reward on its own, weighted and summed. Then their standard deviation over
    the rollout becomes 1. (Their mean is 0 already.) GRPO sees the sum of the rewards alone."""
    adv = (cfg.accuracy_weight * group_advantages(groups(rollout, cfg, "accuracy"))
           + cfg.format_weight * group_advantages(groups(rollout, cfg, "format")))
    return (adv / (adv.std() + 1e-4)).flatten()


def overlong(rollout: Rollout, cfg: Config, generator=None) -> Tensor:
    """DAPO's overlong shaping (2503.14476): the last fifth of the budget costs up to 1, linearly."""
    left = 1 - rollout.lengths() / cfg.rl_max_new_tokens               # (N,) share of the budget that is left
    rewards = rollout.column("reward") - (1 - 5 * left).clamp(min=0)  # (N,)
    return group_advantages(rewards.view(-1, cfg.rl_samples), cfg.scale).flatten()


DRIFT = 0.05  # of deepseek_v32, in nats per token


# Losses: (logp (M,), batch, settings) -> (scalar loss, sums), as grpo.token_loss


def row_means(x: Tensor, row: Tensor) -> Tensor:
    """For each token, the mean of x (M,) over the tokens of its completion, (M,)."""
    _, number, count = row.unique(return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(count)).index_add(0, number, x)
    return (sums / count)[number]


def kl_to_reference(logp: Tensor, batch: Batch) -> Tensor:
    """KL_{i,t} of grpo.py, (M,)."""
    log_x = batch.logp_ref - logp
    return log_x.exp() - log_x - 1


def reinforce_loss(logp: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """- A_i log pi_theta: the policy gradient for samples of pi_theta. It has no ratio, so it is wrong after the first
    update on a rollout."""
    loss = -(batch.adv * logp * batch.weight).sum()
    return loss, {"kl": kl_to_reference(logp.detach(), batch).sum()}


def gspo_loss(logp: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (2507.18071): s_i = (pi_theta(o_i) / pi_old(o_i))^(1/|o_i|), the geometric mean of the ratios of
    a completion's tokens, takes the place of each of these ratios."""
    log_ratio = row_means(logp - batch.logp_old, batch.row)
    loss, sums = grpo_loss(batch.logp_old + log_ratio, batch.logp_old, None, batch.adv, batch.weight,
                           clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=0.0)
    return loss, sums | {"kl": kl_to_reference(logp.detach(), batch).sum()}


def cispo_loss(logp: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO (2506.13585): REINFORCE with the ratio as a factor that has no gradient. The clip limits this
    factor to 1 + clip_high, and every token keeps its gradient."""
    ratio = (logp - batch.logp_old).exp().detach()
    factor = ratio.clamp(max=1 + cfg.clip_high)
    loss = -(factor * batch.adv * logp * batch.weight).sum()
    clipped = (ratio > 1 + cfg.clip_high) & (batch.adv > 0)
    return loss, {"ratio": ratio.sum(), "clip_fraction_high": clipped.sum(),
                  "kl": kl_to_reference(logp.detach(), batch).sum()}


def deepseek_v32_loss(logp: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """DeepSeek-V3.2 (2512.02556). The KL is multiplied by the ratio, which makes its gradient that of
    KL(pi_theta || pi_ref). The L of a completion with a negative advantage is 0 once the mean of log(pi_old / pi_theta)
    over its tokens is above DRIFT."""
    drift = row_means((batch.logp_old - logp).detach(), batch.row)
    masked = (batch.adv < 0) & (drift > DRIFT)
    adv = batch.adv.masked_fill(masked, 0.0)
    loss, sums = grpo_loss(logp, batch.logp_old, None, adv, batch.weight,
                           clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=0.0)
    ratio = (logp - batch.logp_old).exp()
    kl = kl_to_reference(logp, batch)
    loss = loss + cfg.kl_coef * (ratio * kl * batch.weight).sum()
    return loss, sums | {"kl": kl.detach().sum(), "masked": masked.sum()}


# The rollout


def sample_with_signal(run: Run, cfg: Config, step: Step, policy: GPT) -> Rollout:
    """DAPO's dynamic sampling (2503.14476): sample up to four rollouts, until there are P groups with a signal. If
    there are fewer, the step has fewer. If there is none, it has the last rollout. The log describes these groups
    alone."""
    kept, problems = Rollout([], [], [], [], [], []), []
    for _ in range(4):
        rollout = sample_groups(run, cfg, step, policy)
        live = (~no_signal(groups(rollout, cfg))).flatten().nonzero().flatten().tolist()
        for i in live[:len(step.asked) - len(problems)]:
            problems.append(step.asked[i])
            for column, new in zip(vars(kept).values(), vars(rollout).values()):
                column += new[i * cfg.rl_samples:(i + 1) * cfg.rl_samples]
        if len(problems) == len(step.asked):
            break
    step.asked = problems or step.asked
    return kept if problems else rollout


# The table


class Variant(NamedTuple):
    """What a variant has in place of train.py's parts."""
    settings: dict = {}                   # its own settings
    advantages: Callable = usual
    loss_fn: Callable = token_loss
    sample: Callable = sample_groups
    unused: tuple[str, ...] = ()          # settings that it does not use


NEVER = 1e6  # a clip that no ratio reaches
NO_RATIO = ("scale", "clip_low", "clip_high")
VARIANTS = {
    "ours":         Variant(),
    "no_clip":      Variant({"clip_low": NEVER, "clip_high": NEVER}),
    "deepseekmath": Variant({"normalize": "sequence"}),
    "reinforce":    Variant({"normalize": "constant"}, RunningMean, reinforce_loss, unused=NO_RATIO),
    "rloo":         Variant({"normalize": "constant"}, leave_one_out, reinforce_loss, unused=NO_RATIO),
    "dr_grpo":      Variant({"normalize": "constant", "scale": "none"}),
    "dapo":         Variant({"clip_high": 0.28}, overlong, sample=sample_with_signal),
    "gspo":         Variant({"normalize": "sequence", "clip_low": 0.03, "clip_high": 0.04}, loss_fn=gspo_loss),
    "cispo":        Variant({"clip_high": 4.0}, loss_fn=cispo_loss, unused=("clip_low",)),
    "maxrl":        Variant(advantages=over_mean, unused=("scale",)),
    "gdpo":         Variant(advantages=each_reward, unused=("scale",)),
    "deepseek_v32": Variant({"normalize": "sequence", "scale": "none", "kl_coef": 0.001}, loss_fn=deepseek_v32_loss),
}


def own_settings(name: str) -> dict:
    """The settings of a variant."""
    return {"kl_coef": LOGGED} | VARIANTS[name].settings


def train_variant(name: str, run: Run, base: GPT) -> None:
    """The stage of a variant: RL from the base, in one process."""
    variant, parts = VARIANTS[name], {}
    cfg = replace(run.cfg, **own_settings(name))
    advantages = variant.advantages
    if isinstance(advantages, type):
        advantages = parts["baseline"] = advantages()
    run_grpo_with(run, cfg, base, advantages, variant.loss_fn, variant.sample, **parts)


STAGES = {name: Stage(partial(train_variant, name), starts=("base",), settings=RL) for name in VARIANTS}


def main(argv: list[str]) -> int:
    """Run a command line, NAME and then flags of train.py -> exit code."""
    name, *flags = argv or [""]
    if name in VARIANTS:
        given = [flag.removeprefix("--").partition("=")[0] for flag in flags]
        refused = {key: f"sets {key}={value} itself" for key, value in own_settings(name).items()}
        refused |= {key: f"does not use {key}" for key in VARIANTS[name].unused}
        for key in given:
            if key in refused:
                print(f"variants.py: {name} {refused[key]}", file=sys.stderr)
                return 2
    return controls.main(argv, STAGES, __doc__, "variants")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal may not be able to show ±
        stream.reconfigure(errors="replace")
    end(main(sys.argv[1:]))
