"""Group relative policy optimisation (GRPO): reinforcement learning from rewards alone, as in DeepSeek-R1-Zero.

Terms, for readers who know PyTorch but not RL. The policy is the language model that is trained. It samples G
completions o_1..o_G of a prompt q; together they are a group. Each completion gets a reward r_i. Its advantage A_i says
how much better it did than its group. A rollout is the groups of P prompts: N = P * G completions with their rewards.
Training makes completions with a positive advantage more likely, and the others less likely.

DeepSeek-R1 (arXiv 2501.12948v2), eq. 1 to 3, written per token as in DeepSeekMath (2402.03300), eq. 3. All tokens of a
completion share its advantage. o_{i,t} is token t of completion i:

    A_i      = (r_i - mean(r)) / (std(r) + 1e-4)                                       group_advantages
    ratio    = pi_theta(o_{i,t} | q, o_{i,<t}) / pi_old(o_{i,t} | q, o_{i,<t})
    L_{i,t}  = - min(ratio A_i, clip(ratio, 1 - clip_low, 1 + clip_high) A_i)
    KL_{i,t} = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1
    loss     = sum over all tokens of w_i (L_{i,t} + kl_coef KL_{i,t})                 grpo_loss, token_weights

pi_theta is the policy as it is now. pi_old is the policy as it was when it sampled. pi_ref, the reference, is a frozen
copy of the model that RL began with. "On policy" means that pi_theta is still pi_old, so the ratio is 1.

Do not watch the loss. On policy it is minus the mean advantage, which is near 0, or minus that mean weighted by length
("token", "constant"). Its gradient, -A_i grad log pi_theta for each token, is not 0. Watch the reward.

docs/knobs.md says more about each formula. README lists what differs from the papers.
"""
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from model import GPT, token_logprobs


@dataclass
class Budget:
    """The settings that GRPO and distillation share."""
    rl_max_new_tokens: int = 80   # longest completion, in tokens, in every stage and in evaluation
    micro_batch: int = 0          # tokens computed at a time in training; 0: as many as suit the run


@dataclass
class GRPOConfig(Budget):
    """The settings of GRPO. A run sees them as --rl_steps=200 and so on."""
    rl_steps: int = 200           # rollouts
    rl_prompts: int = 64          # P, prompts of a rollout
    rl_samples: int = 8           # G, completions of each prompt
    rl_minibatches: int = 2       # updates on a rollout
    rl_lr: float = 3e-4           # learning rate of AdamW
    accuracy_weight: float = 1.0  # reward = accuracy_weight * accuracy + format_weight * format
    format_weight: float = 1.0    # R1 weighs both equally
    scale: Literal["std", "none"] = "std"  # what divides an advantage: see group_advantages
    normalize: Literal["sequence", "token", "constant"] = "token"  # the average: see token_weights
    clip_low: float = 0.2         # the ratio is clipped at 1 - clip_low
    clip_high: float = 0.2        # the ratio is clipped at 1 + clip_high
    kl_coef: float = 0.001        # weight of the KL penalty; 0 does without the reference
    ref_every: int = 0            # steps after which the policy becomes the reference; 0: never


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """How much better each completion did than its group: rewards (P, G) -> advantages (P, G).

    "std" divides by the group's standard deviation, as R1 does, plus 1e-4, as TRL does. That gives a prompt that is
    nearly always or nearly never solved more weight than a prompt that is half solved. Dr. GRPO (2503.20783) calls
    this a bias, because the RL objective is the mean reward over prompts, with equal weight for each. It does not
    divide ("none"). Raises ValueError for another scale, and for groups of one.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), scale="none").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    if rewards.size(1) < 2:
        raise ValueError("a group needs two or more completions, or there is nothing to compare")
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', not {scale!r}")
    adv = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "std":
        adv = adv / (rewards.std(dim=1, keepdim=True) + 1e-4)
    # subtle: the mean of equal rewards may be off in its last bit, which dividing by 1e-4 would turn into an advantage.
    return adv.masked_fill(no_signal(rewards), 0.0)


def no_signal(rewards: Tensor) -> Tensor:
    """Which groups teach nothing, because their rewards (P, G) are all equal -> (P, 1)."""
    return (rewards == rewards[:, :1]).all(dim=1, keepdim=True)


def token_weights(lengths: Tensor, normalize: str, max_len: int) -> Tensor:
    """w_i, the weight of each token of N completions in the loss: lengths in tokens (N,) -> (N,).

    "sequence" (DeepSeekMath) averages over each completion first, so a token of a long completion weighs less. A long
    wrong answer is then punished less per token than a short one, which lets wrong answers grow (the length bias).
    "token" (DAPO, 2503.14476; the default) gives all tokens of a minibatch the same weight. That weight still shrinks
    when all answers grow. "constant" (Dr. GRPO) divides by max_len, the generation budget, instead of the lengths.
    Dr. GRPO as a whole is --scale=none --normalize=constant. Raises ValueError for another name.
    """
    N = len(lengths)
    if normalize == "sequence":
        return 1 / (N * lengths)
    if normalize == "token":
        return torch.ones(N) / lengths.sum()
    if normalize == "constant":
        return torch.ones(N) / (N * max_len)
    raise ValueError(f"normalize must be 'sequence', 'token' or 'constant', not {normalize!r}")


def grpo_loss(logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None, adv: Tensor, weight: Tensor, *,
              clip_low: float, clip_high: float, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above -> (scalar loss, what the log shows of it: sums over the tokens, without gradient).

    Each argument is a vector over the M sampled tokens, (M,): the log-probabilities under the policy, pi_old and
    pi_ref (None without a penalty), the advantages and the weights.

    The clip: one rollout serves several updates, and the policy moves away from pi_old with each. A token loses its
    gradient once it has become likelier by enough (A > 0, ratio above 1 + clip_high) or unlikelier by enough (A < 0,
    ratio below 1 - clip_low). min() then picks the clipped term, a constant. A token that moved in the other direction
    keeps its gradient.

    The KL estimate ("k3") is never negative, and its mean over samples of pi_theta is KL(pi_theta || pi_ref). As a
    loss, it has the gradient of KL(pi_ref || pi_theta), because autograd treats the samples as constants (2506.09477).
    """
    assert logp_ref is not None or not kl_coef, "a KL penalty needs the reference's logp"
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * adv, clipped * adv)
    sums = {"ratio": ratio.detach().sum(),
            "clip_low": ((ratio < 1 - clip_low) & (adv < 0)).sum(),
            "clip_high": ((ratio > 1 + clip_high) & (adv > 0)).sum()}
    if logp_ref is not None:
        log_ratio = logp_ref - logp
        kl = log_ratio.exp() - log_ratio - 1
        loss = loss + kl_coef * kl
        sums["kl"] = kl.detach().sum()
    return (loss * weight).sum(), sums


def token_loss(logp: Tensor, batch: "Batch", cfg) -> tuple[Tensor, dict[str, Tensor]]:
    """grpo_loss of a batch: logp (M,). A fork may hand grpo_update another loss of these arguments."""
    return grpo_loss(logp, batch.logp_old, batch.logp_ref, batch.adv, batch.weight,
                     clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef)


# One step


def grpo_step(policy: GPT, reference: GPT | None, optimizer, problems: list, reward_fn, task, cfg,
              generator: Generator | None = None, lr_scale: float = 1.0) -> tuple["Metrics", "Rollout"]:
    """One iteration of DeepSeekMath's Algorithm 1 on P problems -> (metrics, the rollout). The arguments are those of
    sample_rollout and grpo_update."""
    # 1) sample G completions of each prompt, and score them
    rollout = sample_rollout(policy, problems, reward_fn, task, cfg.rl_samples, cfg.rl_max_new_tokens, generator)
    # 2) compare each completion with its group
    rewards = rollout.column("reward").view(-1, cfg.rl_samples)  # (P, G)
    adv = group_advantages(rewards, cfg.scale).flatten()         # (N,)
    # 3) update the policy
    metrics = grpo_update(policy, reference, optimizer, rollout, adv, cfg, generator, lr_scale)
    return metrics, rollout


def sample_rollout(model: GPT, problems: list, reward_fn, task, samples: int, max_new_tokens: int,
                   generator: Generator | None = None) -> "Rollout":
    """Sample `samples` completions of each problem, and score them.

    The task has encode_prompt(problem) -> token ids, stop_ids (the tokens that end a completion) and encoding.
    reward_fn(text, problem) -> {"reward": what RL maximises, "accuracy": 0 or 1, ...} sees the text without its stop
    token. A completion that was cut off at max_new_tokens is scored and trained on like any other. It usually lacks its
    last tag and earns nothing, so the policy learns to finish in time.
    """
    prompts = [task.encode_prompt(problem) for problem in problems]
    completions, logp = model.generate(prompts, max_new_tokens, stop_ids=task.stop_ids,
                                       samples=samples, generator=generator)
    prompts = [prompt for prompt in prompts for _ in range(samples)]     # N of them
    problems = [problem for problem in problems for _ in range(samples)]
    truncated = [completion[-1] not in task.stop_ids for completion in completions]
    texts = [task.encoding.decode([t for t in completion if t not in task.stop_ids]) for completion in completions]
    scores = [reward_fn(text, problem) for text, problem in zip(texts, problems)]
    return Rollout(prompts, completions, logp, texts, truncated, scores)


def grpo_update(policy: GPT, reference: GPT | None, optimizer, rollout: "Rollout", adv: Tensor, cfg,
                generator: Generator | None = None, lr_scale: float = 1.0, loss_fn=token_loss) -> "Metrics":
    """Update the policy once for each minibatch of the rollout, given the advantages (N,) -> metrics.

    cfg is a GRPOConfig, or has its fields. The reference may be None if kl_coef is 0. optimizer.step(lr_scale, share,
    has_gradient) clips the gradient, updates the weights, clears the gradient and returns its norm. loss_fn(logp,
    batch, cfg) -> (scalar, sums). Minibatches are made of rows, not of groups: the advantages are known already.
    """
    assert reference is not None or not cfg.kl_coef, "a KL penalty (kl_coef above 0) needs a reference"
    metrics = rollout_metrics(rollout)
    for name in ("ratio", "kl", "clip_low", "clip_high", "sampler_gap"):
        metrics.add(name, 0.0, 0)  # their mean is None in a step that computes nothing
    rewards = rollout.column("reward").view(-1, cfg.rl_samples)  # (P, G)
    metrics.add("no_signal", no_signal(rewards).sum(), len(rewards))
    # 1) deal the rows into minibatches
    device, parts = policy.embedding.weight.device, random_minibatches(len(adv), cfg.rl_minibatches, generator)
    minibatches = [make_minibatch(rollout, rows, adv, cfg, device) for rows in parts]
    # 2) log-probabilities under pi_old and pi_ref. pi_old is the policy before the first update, so the first minibatch
    #    can take it from step 3. They come from the training pass, not from the sampler, which rounds differently
    for number, (batches, _) in enumerate(minibatches):
        for batch in batches:
            # subtle: detach(), not no_grad(), under which torch.compile makes other code, which rounds differently
            if number > 0:
                batch.logp_old = token_logprobs(policy, batch.idx, batch.mask).detach()
            if cfg.kl_coef:
                batch.logp_ref = token_logprobs(reference, batch.idx, batch.mask).detach()
    # 3) one update for each minibatch
    for batches, share in minibatches:
        minibatch_loss = 0.0
        for batch in batches:  # their gradients add up
            logp = token_logprobs(policy, batch.idx, batch.mask)  # (M,)
            if batch.logp_old is None:
                batch.logp_old = logp.detach()
            loss, sums = loss_fn(logp, batch, cfg)
            loss.backward()
            minibatch_loss += loss.detach()
            for name, total in sums.items():
                metrics.add(name, total, len(logp))
            metrics.add("sampler_gap", (batch.logp_old - batch.sampler_logp).abs().sum(), len(logp))
        metrics.add("loss", minibatch_loss * share, share)
        metrics.add("grad_norm", optimizer.step(lr_scale, share, has_gradient=len(batches) > 0), 1)
    return metrics


def make_minibatch(rollout: "Rollout", rows: Tensor, adv: Tensor, cfg, device: torch.device) -> tuple:
    """What one update learns from: the rows as batches with their advantages and weights -> (batches, share).

    `share` is the number of tokens or rows that the loss is a mean over. Several processes weigh their gradients by it.
    Rows with advantage 0 teach nothing and are not computed. Nearly all of them belong to groups with equal rewards,
    most groups late in RL. So the KL penalty acts on the other rows only. With `live = rows` it would act on all, which
    is Algorithm 1 to the letter and takes longer.
    """
    lengths = torch.tensor([len(completion) for completion in rollout.completions])
    weight = torch.zeros(len(adv))
    weight[rows] = token_weights(lengths[rows], cfg.normalize, cfg.rl_max_new_tokens)
    live = rows[adv[rows] != 0]
    batches = micro_batches(rollout, live.tolist(), cfg.micro_batch, device)
    adv, weight = adv.to(device), weight.to(device)
    for batch in batches:
        batch.adv = adv[batch.row]        # (M,)
        batch.weight = weight[batch.row]  # (M,)
    share = int(lengths[rows].sum()) if cfg.normalize == "token" else len(rows)
    return batches, share


# Rows of a rollout as tensors, and what the log shows


@dataclass
class Rollout:
    """Sampled completions and their scores: N = P * G rows, the G rows of a prompt side by side."""
    prompts: list[list[int]]          # N prompts, token ids
    completions: list[list[int]]      # N completions, token ids, with the stop token if sampled
    sampler_logp: list[list[float]]   # log-probability of each sampled token, by the sampler
    texts: list[str]                  # N completions as text, without their stop token
    truncated: list[bool]             # N: was it cut off at the generation budget?
    scores: list[dict[str, float]]    # N: what reward_fn returned

    def column(self, name: str) -> Tensor:
        """One part of the scores, (N,)."""
        return torch.tensor([float(score[name]) for score in self.scores])


@dataclass
class Batch:
    """n rows of a rollout: prompt + completion, T tokens, padded on the right. M of these tokens were sampled.

        idx    User: 8*7 \\n Assistant:  <think> 8*7=56 ... <end> pad pad
        mask             0 ... 0        1       1      ... 1     0   0      one shorter: token t+1 is predicted at t
    """
    idx: Tensor           # (n, T) token ids
    mask: Tensor          # (n, T-1), on the CPU: True where idx[:, t+1] was sampled
    row: Tensor           # (M,) the rollout's row that each sampled token belongs to
    sampler_logp: Tensor  # (M,) its log-probability, as the sampler computed it
    adv: Tensor | None = None       # (M,) its advantage
    weight: Tensor | None = None    # (M,) its weight in the loss
    logp_old: Tensor | None = None  # (M,) its log-probability under pi_old
    logp_ref: Tensor | None = None  # (M,) its log-probability under pi_ref


def random_minibatches(n: int, n_batches: int, generator: Generator | None) -> list[Tensor]:
    """The numbers 0..n-1 in random order, dealt into n_batches parts of equal size, give or take one."""
    order = torch.randperm(n, generator=generator, device=generator.device if generator else None).cpu()
    return [order[i::n_batches] for i in range(n_batches)]


def micro_batches(rollout: Rollout, rows: list[int], max_tokens: int, device) -> list[Batch]:
    """Cut rows of a rollout into batches of similar lengths, of at most max_tokens tokens each (0: any number)."""
    # Lengths are rounded up to multiples of 8, because engine/speed/fast.py computes them so.
    size = [8 * math.ceil((len(p) + len(c) - 1) / 8) for p, c in zip(rollout.prompts, rollout.completions)]
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda row: size[row]):
        if not parts or (len(parts[-1]) + 1) * size[row] > (max_tokens or float("inf")):
            parts.append([])
        parts[-1].append(row)
    return [make_batch(rollout, part, device) for part in parts]


def make_batch(rollout: Rollout, rows: list[int], device: torch.device) -> Batch:
    """These rows as tensors. subtle: the mask is made from lengths. A mask made by comparing tokens with a pad id that
    is also the stop token would leave stopping untrained."""
    tokens = [torch.tensor(rollout.prompts[i] + rollout.completions[i]) for i in rows]
    idx = pad_sequence(tokens, batch_first=True)                         # (n, T)
    first = torch.tensor([len(rollout.prompts[i]) for i in rows])        # (n,) start of the completion
    length = torch.tensor([len(rollout.completions[i]) for i in rows])   # (n,)
    position = torch.arange(1, idx.size(1))  # of the tokens that are predicted
    mask = (first[:, None] <= position) & (position < (first + length)[:, None])  # (n, T-1)
    row = torch.tensor(rows).repeat_interleave(length)                   # (M,)
    sampler_logp = torch.tensor([logp for i in rows for logp in rollout.sampler_logp[i]])
    return Batch(idx.to(device), mask, row.to(device), sampler_logp.to(device))


class Metrics:
    """Means, kept as sums and counts, so that several processes can add theirs up."""

    def __init__(self):
        self.sums, self.counts = defaultdict(float), defaultdict(float)

    def add(self, name: str, total: float | Tensor, count: float) -> None:
        """Add `count` values whose sum is `total`. A tensor stays on its device, so nothing waits for a GPU here."""
        self.sums[name] += total
        self.counts[name] += count

    def means(self) -> dict[str, float | None]:
        """Each mean, or None of no values."""
        counts = self.counts
        return {name: float(total) / counts[name] if counts[name] else None for name, total in self.sums.items()}


def rollout_metrics(rollout: Rollout) -> Metrics:
    """The means of the scores, length (tokens, with the stop token), length_wrong (that of wrong answers), truncated
    (share) and entropy (nats a token, estimated from the samples)."""
    metrics, N = Metrics(), len(rollout.texts)
    lengths = torch.tensor([len(completion) for completion in rollout.completions])
    wrong = rollout.column("accuracy") == 0
    for name in rollout.scores[0]:
        metrics.add(name, rollout.column(name).sum(), N)
    metrics.add("length", lengths.sum(), N)
    metrics.add("length_wrong", lengths[wrong].sum(), int(wrong.sum()))
    metrics.add("truncated", sum(rollout.truncated), N)
    metrics.add("entropy", -sum(sum(logp) for logp in rollout.sampler_logp), int(lengths.sum()))
    metrics.add("tokens", lengths.sum(), 1)
    return metrics
