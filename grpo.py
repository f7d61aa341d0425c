"""Group relative policy optimisation (GRPO): reinforcement learning from rewards alone, as in DeepSeek-R1-Zero.

Terms, for readers who know PyTorch but not RL:

    policy      pi_theta, the language model that is trained
    completion  o_i, the tokens that the policy samples after a prompt q
    group       G completions of one prompt
    reward      r_i, a number for completion i: see rewards.py
    advantage   A_i, how much better completion i is than its group. Training makes a completion with a positive
                advantage more likely and one with a negative advantage less likely
    rollout     the N = P * G completions of P prompts. It is split into minibatches; each of them gives one update
    pi_old      the policy that sampled the rollout. The first update is "on policy": pi_theta still is pi_old
    pi_ref      the reference, a frozen copy of the model that RL began with. A penalty on the Kullback-Leibler (KL)
                divergence, which says how much two distributions differ, keeps the policy near the reference

The loss is eq. 3 of DeepSeekMath (arXiv 2402.03300), but the weights w_i are a setting. For token t of completion i:

    A_i      = (r_i - mean(r)) / (std(r) + 1e-4), over the rewards r of the group        group_advantages
    ratio    = pi_theta(o_{i,t} | q, o_{i,<t}) / pi_old(o_{i,t} | q, o_{i,<t})
    L_{i,t}  = - min(ratio A_i, clip(ratio, 1 - clip_low, 1 + clip_high) A_i)
    KL_{i,t} = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1, probabilities of o_{i,t} as in the ratio
    loss     = sum over all tokens of w_i (L_{i,t} + kl_coef KL_{i,t})                   grpo_loss

All tokens of a completion have its advantage, because the reward is for the whole completion. The weights w_i, such as
1 / (number of tokens), make the sum an average. clip_low, clip_high and kl_coef are settings. The functions on the
right give the reasons for the 1e-4, for min and clip, and for this form of the KL.

R1's paper (2501.12948v2, eq. 1 to 3) has one ratio for a completion: the product of its tokens' ratios. PPO (proximal
policy optimisation), from which GRPO comes, estimates advantages with a second network, the critic. GRPO needs none.

Watch the reward: the loss does not say how good the policy is. On policy, and without the small KL term, the loss of a
rollout is minus the mean advantage over all tokens. A group's advantages add up to 0, so the loss is 0 if all lengths
are equal, and below 0 if the better completions are longer. But each token's gradient is -w_i A_i grad log pi_theta.
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
    rl_max_new_tokens: int = 80   # longest completion, in tokens, in all stages
    micro_batch: int = 0          # most tokens in a forward pass; 0: no limit (train.py: what suits the device)


@dataclass
class GRPOConfig(Budget):
    """The settings of GRPO. On the command line: --rl_steps=100 and so on."""
    rl_steps: int = 100           # steps of RL, each with a new rollout
    rl_prompts: int = 64          # P, prompts of a rollout
    rl_samples: int = 8           # G, completions of each prompt
    rl_minibatches: int = 4       # minibatches of a rollout, each for one update
    rl_lr: float = 3e-4           # learning rate of AdamW
    accuracy_weight: float = 1.0  # reward = accuracy_weight * accuracy + format_weight * format
    format_weight: float = 1.0    # R1 weighs both equally
    scale: Literal["std", "none"] = "std"  # the divisor of an advantage: see group_advantages
    normalize: Literal["sequence", "token", "constant"] = "token"  # the average: see token_weights
    clip_low: float = 0.2         # the ratio is clipped at 1 - clip_low; 0.2 as in PPO
    clip_high: float = 0.2        # the ratio is clipped at 1 + clip_high
    kl_coef: float = 0.001        # weight of the KL penalty, as in R1; with 0 there is no reference
    ref_every: int = 0            # every so many steps, the policy is copied into the reference; 0: never


def no_signal(rewards: Tensor) -> Tensor:
    """Which groups teach nothing, because all their rewards are equal? rewards (P, G) -> (P, 1) bool."""
    return (rewards == rewards[:, :1]).all(dim=1, keepdim=True)


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """How much better each completion is than its group: rewards (P, G) -> advantages (P, G).

    "std" divides by the standard deviation of the group, as R1 does. The 1e-4 avoids 0 / 0. If a prompt is nearly
    always or nearly never solved, the standard deviation is small. Dividing by it gives this prompt more weight than a
    prompt that is solved half of the time. The paper on Dr. GRPO (2503.20783) calls this a bias, and does not divide
    ("none"). Raises ValueError for another scale, and for groups of one.

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
    # subtle: rounding can make adv 0.001 where all rewards are equal. It must be 0: make_minibatch skips these rows.
    return adv.masked_fill(no_signal(rewards), 0.0)


def token_weights(lengths: Tensor, normalize: str, max_len: int) -> Tensor:
    """w_i, the weight in the loss of each token of N completions: lengths in tokens (N,) -> (N,).

    "sequence" (DeepSeekMath) gives every completion the same weight, so each token of a long completion weighs less.
    The tokens of a long wrong answer are then punished less than those of a short one. So long wrong answers become
    more frequent (the length bias). The other two avoid this bias:
    "token" (DAPO, 2503.14476; the default) gives every token of a minibatch the same weight.
    "constant" (Dr. GRPO) gives every token the same weight in all minibatches. max_len is rl_max_new_tokens.
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
    """The loss at the top of this file -> (scalar loss, dict of sums over the tokens, for the log).

    All arguments are vectors over the M sampled tokens, (M,): log-probabilities under pi_theta, pi_old and pi_ref (None
    without a penalty), advantages, and weights.

    The tokens were sampled from pi_old, not from pi_theta. The factor `ratio` corrects for this (importance weighting).
    When the policies differ a lot, a few tokens with huge ratios dominate the gradient, and it becomes noise. So min()
    and clip make a token's gradient 0 once its probability has moved far enough in the wanted direction:

        A > 0   the token is to become more likely. Above 1 + clip_high, min() takes the constant (1 + clip_high) A
        A < 0   the token is to become less likely. Below 1 - clip_low, min() takes the constant (1 - clip_low) A

    A constant has no gradient. In all other cases min() takes ratio A.

    KL_{i,t} is x - log(x) - 1 for x = pi_ref/pi_theta (the estimator k3 of the literature). Its mean over samples of
    pi_theta is KL(pi_theta || pi_ref), because the mean of x is 1, and that of -log(x) is the KL. No KL_{i,t} is
    negative. Its gradient is another one, because autograd does not differentiate the sampling. On average it is that
    of KL(pi_ref || pi_theta) (proof: arXiv 2506.09477), which also pulls the policy towards the reference.
    """
    assert logp_ref is not None or not kl_coef, "a KL penalty needs the reference's logp"
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * adv, clipped * adv)
    sums = {"ratio": ratio.detach().sum(),
            "clip_fraction_low": ((ratio < 1 - clip_low) & (adv < 0)).sum(),
            "clip_fraction_high": ((ratio > 1 + clip_high) & (adv > 0)).sum()}
    if logp_ref is not None:
        log_x = logp_ref - logp
        kl = log_x.exp() - log_x - 1
        loss = loss + kl_coef * kl
        sums["kl"] = kl.detach().sum()
    return (loss * weight).sum(), sums


@dataclass
class Rollout:
    """Completions and their scores. Each list has N = P * G entries (rows); the G rows of a prompt are adjacent."""
    prompts: list[list[int]]          # token ids
    completions: list[list[int]]      # token ids, with the stop token if it was sampled
    sampler_logp: list[list[float]]   # log-probability of each token, by the sampler
    texts: list[str]                  # the completions as text, without the stop token
    truncated: list[bool]             # was the completion cut off at rl_max_new_tokens?
    scores: list[dict[str, float]]    # what reward_fn returned

    def column(self, name: str) -> Tensor:
        """One of the scores, such as "reward", for all rows, (N,)."""
        return torch.tensor([float(scores[name]) for scores in self.scores])

    def lengths(self) -> Tensor:
        """The number of tokens of each completion, (N,)."""
        return torch.tensor([len(completion) for completion in self.completions])


@dataclass
class Batch:
    """n rows of a rollout as tensors: prompts and completions, T tokens, padded on the right.

        idx     User:   8   *   7   Assistant:   <think>   ...   </answer>   <end>   pad
        mask      0     0   0   0       1           1      ...       1         0

    The logits at position t predict token t+1. So the mask is 1 at the M positions that predict a sampled token: from
    the last token of the prompt on. All vectors (M,) have the order of these positions, row after row.
    """
    idx: Tensor           # (n, T) token ids
    mask: Tensor          # (n, T-1), on the CPU (see model.select): was idx[:, t+1] sampled?
    row: Tensor           # (M,) the row of the rollout that each sampled token belongs to
    sampler_logp: Tensor  # (M,) its log-probability, as the sampler computed it
    # make_minibatch adds adv and weight. grpo_update adds logp_old and logp_ref.
    adv: Tensor | None = None       # (M,) its advantage
    weight: Tensor | None = None    # (M,) its weight in the loss
    logp_old: Tensor | None = None  # (M,) its log-probability under pi_old
    logp_ref: Tensor | None = None  # (M,) its log-probability under pi_ref


def token_loss(logp: Tensor, batch: Batch, cfg) -> tuple[Tensor, dict[str, Tensor]]:
    """grpo_loss of a batch: logp (M,) -> (scalar loss, sums). To try another loss, write a function with these
    arguments, and pass it to grpo_step as loss_fn."""
    return grpo_loss(logp, batch.logp_old, batch.logp_ref, batch.adv, batch.weight,
                     clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef)


def grpo_step(policy: GPT, reference: GPT | None, optimizer, problems: list, reward_fn, task, cfg,
              generator: Generator | None = None, lr_scale: float = 1.0,
              loss_fn=token_loss) -> tuple["Metrics", Rollout]:
    """One step of GRPO on P problems -> (metrics, the rollout). cfg is a GRPOConfig, or has its fields. The learning
    rate is multiplied by lr_scale. sample_rollout explains reward_fn and task, grpo_update explains the rest."""
    # a) sample G completions of each prompt, and score them
    rollout = sample_rollout(policy, problems, reward_fn, task, cfg.rl_samples, cfg.rl_max_new_tokens, generator)
    # b) compare each completion with its group
    rewards = rollout.column("reward").view(-1, cfg.rl_samples)  # (P, G)
    adv = group_advantages(rewards, cfg.scale).flatten()         # (N,)
    # c) update the policy
    metrics = grpo_update(policy, reference, optimizer, rollout, adv, cfg, generator, lr_scale, loss_fn)
    return metrics, rollout


def sample_rollout(model: GPT, problems: list, reward_fn, task, samples: int, max_new_tokens: int,
                   generator: Generator | None = None) -> Rollout:
    """Sample `samples` completions of each problem, and score them.

    The task must have encode_prompt(problem) -> token ids, stop_ids (the tokens that end a completion) and encoding
    (the tokenizer). reward_fn(text, problem) gets the text of a completion without its stop token. It returns a dict
    with "reward" (the number that RL maximises), "accuracy" (0 or 1), and further scores for the log.

    A completion that was cut off at max_new_tokens is scored and trained on like any other. It usually lacks its last
    tag and earns nothing, so the policy learns to finish in time.
    """
    prompts = [task.encode_prompt(problem) for problem in problems]
    completions, logp = model.generate(prompts, max_new_tokens, stop_ids=task.stop_ids,
                                       samples=samples, generator=generator)
    prompts = [prompt for prompt in prompts for _ in range(samples)]     # P -> N
    problems = [problem for problem in problems for _ in range(samples)]
    truncated = [completion[-1] not in task.stop_ids for completion in completions]
    texts = [task.encoding.decode([t for t in completion if t not in task.stop_ids]) for completion in completions]
    scores = [reward_fn(text, problem) for text, problem in zip(texts, problems)]
    return Rollout(prompts, completions, logp, texts, truncated, scores)


def grpo_update(policy: GPT, reference: GPT | None, optimizer, rollout: Rollout, adv: Tensor, cfg,
                generator: Generator | None = None, lr_scale: float = 1.0, loss_fn=token_loss) -> "Metrics":
    """Update the policy, once for each minibatch of the rollout, given the advantages (N,) -> metrics.

    The optimizer is a small wrapper around torch's (docs/own.md has one of six lines). Its step(lr_scale, share,
    has_gradient) clips the gradient, updates the weights, clears the gradient, and returns the norm of the gradient
    before clipping. share is the weight of this process in the mean of all processes' gradients. If no process has one,
    as all advantages are 0, nothing changes. reference may be None if kl_coef is 0. loss_fn: see token_loss.
    """
    assert reference is not None or not cfg.kl_coef, "a KL penalty (kl_coef above 0) needs a reference"
    metrics = rollout_metrics(rollout)
    for name in ("ratio", "kl", "clip_fraction_low", "clip_fraction_high", "sampler_gap"):
        metrics.add(name, 0.0, 0)  # no values yet; if all advantages are 0, the log has null
    rewards = rollout.column("reward").view(-1, cfg.rl_samples)  # (P, G)
    metrics.add("no_signal", no_signal(rewards).sum(), len(rewards))
    # 1) split the rows into minibatches. (A group may be split, because its advantages are known already)
    device = policy.embedding.weight.device
    split = random_minibatches(len(adv), cfg.rl_minibatches, generator)
    minibatches = [make_minibatch(rollout, rows, adv, cfg, device) for rows in split]
    # 2) log-probabilities under pi_old and pi_ref, by the code of step 3, so that the first ratio is exactly 1. The
    #    sampler rounds differently. So does a compiled model under no_grad(), so we call detach() instead
    for batches, _ in minibatches[1:]:  # the first minibatch gets its logp_old in step 3
        for batch in batches:
            batch.logp_old = token_logprobs(policy, batch.idx, batch.mask).detach()
    if cfg.kl_coef:
        for batches, _ in minibatches:
            for batch in batches:
                batch.logp_ref = token_logprobs(reference, batch.idx, batch.mask).detach()
    # 3) one update for each minibatch
    for batches, share in minibatches:
        minibatch_loss = 0.0
        for batch in batches:  # their gradients add up
            logp = token_logprobs(policy, batch.idx, batch.mask)  # (M,)
            if batch.logp_old is None:  # in the first minibatch pi_theta still is pi_old
                batch.logp_old = logp.detach()
            loss, sums = loss_fn(logp, batch, cfg)
            loss.backward()
            minibatch_loss += loss.detach()
            for name, total in sums.items():
                metrics.add(name, total, len(logp))
            gap = (batch.logp_old - batch.sampler_logp).abs()  # rounding alone, if all is well
            metrics.add("sampler_gap", gap.sum(), len(logp))
        metrics.add("loss", minibatch_loss * share, share)  # a mean over minibatches, weighted by share
        grad_norm = optimizer.step(lr_scale, share, has_gradient=len(batches) > 0)
        metrics.add("grad_norm", grad_norm, 1)
    return metrics


# Minibatches, and what is logged


def make_minibatch(rollout: Rollout, rows: Tensor, adv: Tensor, cfg, device: torch.device) -> tuple[list[Batch], int]:
    """These rows of a rollout as batches with advantages and weights -> (batches, share).

    Completions with advantage 0 are skipped to save time: their only gradient is that of the KL penalty, and late in RL
    they are the majority. DeepSeekMath trains on all completions. To do so here, replace the line `live = ...` below by
    `live = rows`; the accuracy was the same (experiments/findings.md, 12).

    share is the weight of this minibatch in a mean: its number of tokens if normalize is "token", else its number of
    rows. The skipped completions count, as in token_weights.
    """
    lengths = rollout.lengths()[rows]
    weight = torch.zeros(len(adv))
    weight[rows] = token_weights(lengths, cfg.normalize, cfg.rl_max_new_tokens)
    live = rows[adv[rows] != 0]
    batches = micro_batches(rollout, live.tolist(), cfg.micro_batch, device)
    adv, weight = adv.to(device), weight.to(device)
    for batch in batches:
        batch.adv = adv[batch.row]        # (M,)
        batch.weight = weight[batch.row]  # (M,)
    share = int(lengths.sum()) if cfg.normalize == "token" else len(rows)
    return batches, share


def random_minibatches(n: int, n_minibatches: int, generator: Generator | None) -> list[Tensor]:
    """The numbers 0 to n-1, shuffled and split into minibatches, whose sizes differ by 1 at most."""
    device = generator.device if generator else None  # randperm must run on the generator's device
    order = torch.randperm(n, generator=generator, device=device).cpu()
    return [order[i::n_minibatches] for i in range(n_minibatches)]


def micro_batches(rollout: Rollout, rows: list[int], max_tokens: int, device: torch.device) -> list[Batch]:
    """Split rows, sorted by length, into the fewest batches of equal size with at most max_tokens tokens each, padding
    included (0: no limit). The last may be smaller. Their gradients add up to that of all rows, in less memory."""
    limit = max_tokens or float("inf")
    # The model reads all tokens but the last, and a run pads them to a multiple of 8 (engine/speed/fast.py).
    length = [8 * math.ceil((len(p) + len(c) - 1) / 8) for p, c in zip(rollout.prompts, rollout.completions)]
    rows, parts = sorted(rows, key=lambda row: length[row]), []
    for n_parts in range(1, len(rows) + 1):
        size = math.ceil(len(rows) / n_parts)
        parts = [rows[i:i + size] for i in range(0, len(rows), size)]
        if all(len(part) * length[part[-1]] <= limit for part in parts):
            break
    return [make_batch(rollout, part, device) for part in parts]


def make_batch(rollout: Rollout, rows: list[int], device: torch.device) -> Batch:
    """These rows as tensors. subtle: the mask is made from lengths, not by comparing tokens with the id of the padding.
    Where this id is also the stop token, such a mask would hide the stop token, and the policy would never learn it."""
    tokens = [torch.tensor(rollout.prompts[i] + rollout.completions[i]) for i in rows]
    idx = pad_sequence(tokens, batch_first=True)                         # (n, T)
    start = torch.tensor([len(rollout.prompts[i]) for i in rows])        # (n,) of the completions
    length = torch.tensor([len(rollout.completions[i]) for i in rows])   # (n,)
    target = torch.arange(1, idx.size(1))  # (T-1,) position t predicts token t+1
    mask = (start[:, None] <= target) & (target < (start + length)[:, None])  # (n, T-1)
    row = torch.tensor(rows).repeat_interleave(length)                   # (M,)
    sampler_logp = torch.tensor([logp for i in rows for logp in rollout.sampler_logp[i]])
    return Batch(idx.to(device), mask, row.to(device), sampler_logp.to(device))


class Metrics:
    """Means, kept as sums and counts, so that several processes can add theirs up."""

    def __init__(self):
        self.sums, self.counts = defaultdict(float), defaultdict(float)

    def add(self, name: str, total: float | Tensor, count: float) -> None:
        """Add `count` values whose sum is `total`. (A call of total.item() would make the CPU wait for the GPU.)"""
        self.sums[name] += total
        self.counts[name] += count

    def means(self) -> dict[str, float | None]:
        """The mean of each metric, or None if no value was added."""
        counts = self.counts
        return {name: float(total) / counts[name] if counts[name] else None for name, total in self.sums.items()}


def rollout_metrics(rollout: Rollout) -> Metrics:
    """The metrics of a rollout: the mean of each score, and

    length, length_wrong   mean tokens of all and of wrong completions, with the stop token
    truncated              share of completions that were cut off
    entropy                in nats per token (natural logarithm): the mean of -log p over the sampled tokens
    tokens                 number of sampled tokens, for the speed in the log
    """
    metrics, N, lengths = Metrics(), len(rollout.texts), rollout.lengths()
    wrong = rollout.column("accuracy") == 0
    for name in rollout.scores[0]:
        metrics.add(name, rollout.column(name).sum(), N)
    metrics.add("length", lengths.sum(), N)
    metrics.add("length_wrong", lengths[wrong].sum(), int(wrong.sum()))
    metrics.add("truncated", sum(rollout.truncated), N)
    metrics.add("entropy", -sum(sum(logp) for logp in rollout.sampler_logp), int(lengths.sum()))
    metrics.add("tokens", lengths.sum(), 1)
    return metrics
